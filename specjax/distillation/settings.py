"""Checks a training config before anything is compiled."""

import math
from typing import Any

from specjax.distillation import data_sources, objective
from specjax.models.attachment import AttachedDraft
from specjax.models.language_model import NEXT
from specjax.runtime.errors import UserError, nearest

# Values of `train.best_metric`, and whether the best one is the lowest or the highest.
BEST_METRICS = {"validation_loss": "min", "validation_acceptance": "max"}

# Numeric keys of a training stage, by section, that share a range.
_FROM_ONE = {
    "data": ("batch_size", "sequence_length", "prompt_length_min", "prompt_length_max"),
    "train": ("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_last"),
    "optimizer": ("accumulation",),
    "loss": ("chunk",),
    "rollouts": ("gamma", "replays"),
    "speculative_eval": ("prompts", "gamma", "max_new_tokens"),
}
_FROM_ZERO = {
    "loss": ("balance", "anchors"),
    "optimizer": ("warmup_steps", "weight_decay", "final_fraction"),
    "speculative_eval": ("every",),
}
_BELOW_ONE = {"optimizer": ("hold_fraction", "beta1", "beta2")}
_UP_TO_ONE = {"loss": ("selected",), "rollouts": ("decay",)}
_ABOVE_ZERO = {"loss": ("temperature",), "optimizer": ("peak_learning_rate", "clip_norm")}


def check_numbers(config: Any) -> None:
    """Raises UserError for a number of a training stage that is out of its range, before anything is loaded."""
    ranges = (
        (_FROM_ONE, lambda x: 1 <= x < math.inf, "1 or more"),
        (_FROM_ZERO, lambda x: 0 <= x < math.inf, "0 or more"),
        (_BELOW_ONE, lambda x: 0 <= x < 1, "0 or more and below 1"),
        (_UP_TO_ONE, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        (_ABOVE_ZERO, lambda x: 0 < x < math.inf, "above 0 and finite"),
    )
    for keys, fits, description in ranges:
        for section, names in keys.items():
            for name in names:
                if not fits(config[section][name]):
                    raise UserError(f"{section}.{name} is {config[section][name]}; it must be {description}")
    data, warmup = config.data, config.optimizer.warmup_steps
    if data.prompt_length_min > data.prompt_length_max:
        raise UserError(
            f"data.prompt_length_min is {data.prompt_length_min}; it must be at most data.prompt_length_max "
            f"({data.prompt_length_max})"
        )
    if warmup >= config.train.steps:
        raise UserError(f"optimizer.warmup_steps is {warmup}; it must be below train.steps ({config.train.steps})")


def check(config: Any, inputs: Any) -> None:
    """Checks that the settings of training are valid and fit the models.

    Args:
      inputs: a `trainer.TrainingInputs`.

    Raises:
      UserError: naming the setting.
    """
    check_numbers(config)
    has_target = inputs.target is not None
    data, train, loss = config.data, config.train, config.loss
    predicts_next = inputs.draft.predicts == NEXT
    hard_labels = loss.divergence == objective.CROSS_ENTROPY
    if isinstance(inputs.draft, AttachedDraft) and (not has_target or (predicts_next and hard_labels)):
        raise UserError(
            "an adapter learns from the target that it is attached to: set `target`, and loss.divergence to one that "
            f'compares with it, not "{loss.divergence}"'
        )
    writes = not isinstance(inputs.draft, AttachedDraft) or (predicts_next and inputs.draft.attachment.writes)
    if data.draft > 0 and not writes:
        raise UserError(
            f"data.draft is {data.draft}, but the model to train predicts further tokens and writes no text; "
            "set data.draft to 0, and data.target to have the target write"
        )
    for role, model in (("model", inputs.draft), ("target", inputs.target)):
        if model is not None and model.config.compute_dtype == "float16":
            raise UserError(
                f"the {role} computes in float16, in which gradients underflow to 0; set model.compute_dtype to "
                "bfloat16 or float32"
            )
    objective.Loss.of_config(loss, inputs.draft, inputs.target, inputs.reference)
    if data.assisted > 0 and hard_labels:
        raise UserError(
            f'data.assisted is {data.assisted}, and "{loss.divergence}" does not learn from refused drafts; set '
            "loss.divergence to one that compares with the target"
        )
    data_sources.check_fractions(data_sources.fractions_of(data), has_target=has_target)
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
    generated = inputs.longest_prompt + data.generation.max_new_tokens if data.fixed < 1 else 0
    longest = max(data.sequence_length, generated)
    for role, model in (("model", inputs.draft), ("target", inputs.target)):
        if model is not None and longest > model.config.max_positions:
            raise UserError(
                f"rows of {longest} tokens do not fit the {role}'s {model.config.max_positions} positions; "
                "lower data.sequence_length or data.generation.max_new_tokens"
            )
