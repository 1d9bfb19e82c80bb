"""Which settings of training make sense together, asked before anything is compiled."""

from typing import Any

from specjax.distillation import data_sources, objective
from specjax.models.language_model import NEXT
from specjax.runtime.errors import UserError, nearest

# What `train.best_metric` may name, and which way it is better.
BEST_METRICS = {"validation_loss": "min", "validation_acceptance": "max"}


def check(config: Any, material: Any) -> None:
    """Refuses settings of training that make no sense together, before anything is compiled.

    Raises:
      UserError: naming the setting.
    """
    has_target = material.target is not None
    data, train, loss = config.data, config.train, config.loss
    writes = material.draft.predicts == NEXT
    if material.draft.needs_target and (not has_target or (writes and loss.divergence == objective.CROSS_ENTROPY)):
        raise UserError(
            "an adapter learns from the target that it is attached to: set `target`, and loss.divergence to one that "
            f'compares with it, not "{loss.divergence}"'
        )
    if data.draft > 0 and not writes:
        raise UserError(
            f"data.draft is {data.draft}, but what is trained guesses further tokens and writes no text of its own; "
            "set data.draft to 0, and data.target to have the target write"
        )
    objective.check(loss.divergence, loss.beta, loss.temperature, loss.chunk, has_target=has_target)
    data_sources.check_fractions(data_sources.fractions_of(data), has_target=has_target)
    for name in ("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_last"):
        if train[name] < 1:
            raise UserError(f"train.{name} is {train[name]}; it must be 1 or more")
    if train.checkpoint_every % train.eval_every:
        raise UserError(
            f"train.checkpoint_every ({train.checkpoint_every}) must be a multiple of train.eval_every "
            f"({train.eval_every}), so that each checkpoint has its validation metrics"
        )
    known = [name for name in BEST_METRICS if has_target or name != "validation_acceptance"]
    if train.best_metric not in known:
        raise UserError(f'train.best_metric "{train.best_metric}" is not measured{nearest(train.best_metric, known)}')
    rows = config.optimizer.accumulation * config.mesh.data * config.mesh.fsdp
    if data.batch_size % rows:
        raise UserError(
            f"data.batch_size ({data.batch_size}) must be a multiple of optimizer.accumulation * mesh.data * "
            f"mesh.fsdp ({rows})"
        )
    generated = material.longest_prompt + data.generation.max_new_tokens if data.fixed < 1 else 0
    longest = max(data.sequence_length, generated)
    for role, model in (("model", material.draft), ("target", material.target)):
        if model is not None and longest > model.config.max_positions:
            raise UserError(
                f"rows of {longest} tokens do not fit the {role}'s {model.config.max_positions} positions; "
                "lower data.sequence_length or data.generation.max_new_tokens"
            )
