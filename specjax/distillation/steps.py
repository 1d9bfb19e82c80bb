"""The functions that a training step calls, ready to be compiled: for arrays, or for shapes alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from specjax.distillation import data_sources, objective, update
from specjax.models.language_model import LanguageModel
from specjax.runtime import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Steps:
    """What training runs on devices.

    Attributes:
      update: (state, teacher's parameters, batch) -> (state, metrics); the state is donated.
      validation_loss: (parameters, target's parameters, batch) -> Sums.
      generate: (model, parameters, prompts, lengths, step) -> batch; the model is static.
      author: the model that writes the draft's text: what it would draft, in ids that the target has.
      needs_teacher: whether `update` wants the target's parameters.
    """

    update: Callable
    validation_loss: Callable
    generate: Callable
    author: LanguageModel
    needs_teacher: bool


def make_steps(
    config: Any,
    draft: LanguageModel,
    target: LanguageModel | None,
    eos_ids: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    placed: update.TrainState,
    mesh: meshes.AnyMesh,
) -> Steps:
    """Builds the functions; nothing is compiled yet.

    Args:
      config: with the sections seed, data, loss, optimizer and train.
      placed: shardings of the state, see `update.state_shardings`.
    """
    settings = (config.loss.divergence, config.loss.beta, config.loss.temperature, config.loss.chunk)
    # Hard labels need no teacher: its forward would only cost time in training.
    plain = config.loss.divergence == objective.CROSS_ENTROPY
    teacher = None if plain else target
    drafts_for = draft if target is None else target
    rate = update.learning_rate(config.optimizer, config.train.steps)
    step = update.make_step(update.Loss(draft, teacher, *settings), optimizer, rate, config.optimizer.accumulation)
    whole = jax.NamedSharding(mesh, jax.P())
    generation = config.data.generation
    generate = data_sources.Generation(
        generation.temperature,
        generation.top_k,
        generation.top_p,
        generation.max_new_tokens,
        eos_ids,
        config.seed,
    )
    axes = update.BATCH_AXES | (update.SOURCE_AXES if draft.is_encoder_decoder else {})
    return Steps(
        update=jax.jit(step, donate_argnums=0, out_shardings=(placed, whole)),
        validation_loss=jax.jit(update.Loss(draft, target, *settings), out_shardings=whole),
        generate=jax.jit(generate, static_argnums=0, out_shardings=meshes.shardings(axes, mesh)),
        author=draft.with_vocab_size(drafts_for.vocab_size),
        needs_teacher=not plain or draft.needs_target,
    )
