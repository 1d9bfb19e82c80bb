"""Stages of `lossy.py` and `garden.py`: training of a model of a named size, distillation of it, and evaluation."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import common

# Layers and width. Wide enough that verifying five tokens costs little more than one step on a CPU, and smaller ones.
SHAPES = {"large": (3, 384), "medium": (2, 256), "small": (2, 160), "draft": (1, 128)}
_TINY = {"large": (2, 32), "medium": (1, 32), "small": (1, 16), "draft": (1, 16)}

GAMMA = 4


def task(seed: Any, size: int) -> ConfigDict:
    """Short sums: a small target learns to answer them, and its draft by itself does not."""
    return common.task("short_sums", seed=seed, size=size)


def trained(seed: Any, shape: str, *, steps: int, rate: float, tokenizer: str, smoke: bool) -> ConfigDict:
    """Plain training of a model of a size in SHAPES; `tokenizer` is a checkpoint, "" trains a tokenizer."""
    section = common.training_to_plateau(learning_rate=rate, seed=seed)
    section.task = task(0, 64 if smoke else 40_000)
    section.tokenizer.update({"path": tokenizer, "vocab_size": 400})
    layers, width = (_TINY if smoke else SHAPES)[shape]
    heads = {"heads": width // 16, "kv_heads": width // 16, "head_size": 16} if smoke else {}
    heads = heads or {"heads": width // 32, "kv_heads": width // 32, "head_size": 32}
    section.model.update({"layers": layers, "width": width, **heads, "mlp_width": width * 8 // 3, "max_positions": 256})
    # Every question with its answer fits a row.
    section.data.update({"batch_size": 8, "sequence_length": 60, "prompt_length_min": 32, "prompt_length_max": 32})
    section.data.generation.max_new_tokens = 34
    section.optimizer.update({"final_fraction": 0.02, "hold_fraction": 0.1})
    _set_steps(section, steps)
    if smoke:
        section.data.batch_size = 2
        section.optimizer.warmup_steps = 1
        _set_steps(section, 2)
    return section


def _set_steps(section: ConfigDict, steps: int) -> None:
    section.train.update(
        {"steps": steps, "eval_every": -(-steps // 3), "eval_batches": 2, "checkpoint_every": -(-steps // 3)}
    )


def taught(
    seed: Any, shape: str, *, init: str, target: str, steps: int, rate: float, on_policy: bool, smoke: bool
) -> ConfigDict:
    """Distillation from `target` by forward KL, on the model's own text or on the data; `init` as in `model.init`."""
    section = trained(seed, shape, steps=steps, rate=rate, tokenizer=target, smoke=smoke)
    section.model.init = init
    section.target = target
    section.loss.divergence = "forward_kl"
    section.data.update({"fixed": float(not on_policy), "draft": float(on_policy)})
    return section


def evaluation(
    seed: Any,
    target: str,
    drafters: Mapping[str, Mapping],
    *,
    timed: bool,
    temperatures: tuple,
    smoke: bool,
    prompts: int = 96,
) -> ConfigDict:
    """Quality and block efficiency on many prompts; with `timed`, speed on a few prompts, one at a time."""
    section = common.evaluation(target, drafters, seed=seed)
    section.task = task(seed, 1)  # other problems for every seed
    section.selection.update({"count": 32 if timed else prompts, "length_min": 1, "length_max": 64})
    section.max_new_tokens = 40
    section.batch_sizes = (1,) if timed else (32,)
    section.temperatures = temperatures
    section.measure_parts = False
    if smoke:
        section.selection.count = 3
        section.max_new_tokens = 6
        section.batch_sizes = (1,) if timed else (3,)
    return section
