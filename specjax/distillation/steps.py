"""The jitted functions of training, which can be called with arrays or lowered with shapes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from specjax.distillation import data_sources, first_fit, objective, update
from specjax.distillation.rollouts import ROLLOUT_AXES, Rollouts
from specjax.models.attachment import AttachedDraft
from specjax.models.language_model import LanguageModel
from specjax.runtime import mesh as meshes


@dataclasses.dataclass(frozen=True)
class TrainingFunctions:
    """The jitted functions of training, and the model that generates the draft's text.

    Attributes:
      update: (state, target's parameters or None, batch, window) -> (state, metrics); the state is donated. The window
        is static, see `objective.Loss`.
      validation_loss: (parameters, target's parameters, batch, window) -> Sums.
      generate: (parameters, prompts, lengths, step, model) -> batch; the model is static.
      rollouts: (draft's parameters, target's parameters, prompts, lengths, step) -> batch, see `Rollouts`; None if
        there are none.
      author: the draft with logits of the target's vocabulary size, which generates on-policy text.
      has_teacher: whether the training loss compares draft and target.
      needs_teacher: whether `update` needs the target's parameters: for the loss, or to train an attachment.
      reads: after how many of the target's layers `update` needs its states.
      moments: (parameters, target's parameters, batch) -> Moments; None if the draft is not fitted before step 0.
    """

    update: Callable
    validation_loss: Callable
    generate: Callable
    rollouts: Callable | None
    author: LanguageModel
    has_teacher: bool
    needs_teacher: bool
    reads: tuple[int, ...]
    moments: Callable | None


def make_functions(
    config: Any,
    draft: LanguageModel,
    target: LanguageModel | None,
    eos_ids: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    placed: update.TrainState,
    mesh: meshes.AnyMesh,
    reference: LanguageModel | None = None,
    replicate: bool = False,
) -> TrainingFunctions:
    """Builds the functions without compiling them.

    Args:
      config: with the sections seed, data, rollouts, loss, optimizer and train.
      placed: shardings of the state, see `update.state_shardings`.
      reference: see `objective.Loss`; `update` then takes its parameters too.
      replicate: see `Plan.replicate_draft`.
    """
    loss = objective.Loss.of_config(config.loss, draft, target, reference)
    has_teacher = loss.divergence is not None
    # With hard labels training skips the target's forward pass; the validation loss still measures the acceptance.
    training_loss = loss if has_teacher else dataclasses.replace(loss, target=None)
    rate = update.learning_rate(config.optimizer, config.train.steps)
    step = update.make_step(training_loss, optimizer, rate, config.optimizer.accumulation)
    replicated = jax.NamedSharding(mesh, jax.P())
    generate = data_sources.Generation(**config.data.generation, eos_ids=eos_ids, seed=config.seed)
    taps = draft.attachment.taps if isinstance(draft, AttachedDraft) else ()
    is_fitted = first_fit.fitted_batches(draft) > 0
    axes = update.BATCH_AXES | (update.SOURCE_AXES if draft.is_encoder_decoder else {})
    rollouts = None
    if config.data[data_sources.ASSISTED]:
        decode = Rollouts.of_config(config.rollouts, generate, draft, target, replicate)
        rollouts = jax.jit(decode, out_shardings=meshes.shardings(axes | ROLLOUT_AXES, mesh))
    return TrainingFunctions(
        update=jax.jit(step, donate_argnums=0, static_argnums=3, out_shardings=(placed, replicated)),
        validation_loss=jax.jit(loss.on_all(), static_argnums=3, out_shardings=replicated),
        generate=jax.jit(generate, static_argnums=4, out_shardings=meshes.shardings(axes, mesh)),
        rollouts=rollouts,
        author=draft.with_vocab_size((target or draft).vocab_size),
        has_teacher=has_teacher,
        needs_teacher=has_teacher or isinstance(draft, AttachedDraft),
        reads=tuple(sorted({*taps, *([target.layers] if has_teacher or is_fitted else [])})),
        moments=moments_of(draft, target, replicated) if is_fitted else None,
    )


def moments_of(draft: AttachedDraft, target: LanguageModel, replicated: jax.NamedSharding) -> Callable:
    return jax.jit(functools.partial(first_fit.moments, draft, target), out_shardings=replicated)
