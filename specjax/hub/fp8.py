"""Weights in 8-bit floats (E4M3) with scales of blocks (`fp8`, as DeepSeek and Qwen publish), rows or whole tensors.

A value is the stored number times its scale. `fp8` calls the scales `weight_scale_inv`, although they multiply, and
`compressed-tensors` calls them `weight_scale`; scales of activations are not needed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.hub.weights import Stored, check_dtype, check_shape, covering
from specjax.runtime.errors import UserError


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of a block; None if scales belong to rows or to the whole tensor."""
    block = settings.get("weight_block_size")
    for group in (settings.get("config_groups") or {}).values():  # of compressed-tensors
        block = block or (group.get("weights") or {}).get("block_structure")
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise UserError(f'"weight_block_size" is {block!r}; it must be two positive numbers, such as [128, 128]')
    return tuple(block)


def shape(parts: Mapping[str, Stored], settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape [O, I] of the weight. Raises UserError if the scales do not fit it."""
    weight, scales = parts["weight"], parts["scales"]
    if settings.get("format", "float-quantized") != "float-quantized":
        raise UserError(
            f'"format" is {settings["format"]!r}, which is not supported; only float-quantized is, so take the '
            "checkpoint in bfloat16"
        )
    check_dtype(weight, "F8_E4M3")
    rows = weight.shape[0]
    fitting = [(), (1,), (rows,), (rows, 1)]
    if (block := _block(settings)) is not None:
        fitting = [tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))]
    check_shape(scales, fitting, f"{weight.name} of shape {list(weight.shape)}")
    return weight.shape


def values(parts: Mapping[str, Stored], index: tuple[slice, ...], settings: Mapping[str, Any]) -> np.ndarray:
    """The values of a slice [O, I]."""
    numbers, scales = parts["weight"].read(index).astype(np.float32), parts["scales"]
    block = _block(settings)
    if block is None:
        every = scales.read().astype(np.float32).reshape(-1, 1)
        return numbers * (every if len(every) == 1 else every[index[0]])
    blocks, within = zip(*map(covering, index, block), strict=True)
    spread = scales.read(blocks).astype(np.float32)
    for axis, step in enumerate(block):
        spread = spread.repeat(step, axis)
    return numbers * spread[within]
