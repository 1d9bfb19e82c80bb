"""Weights in 8-bit floats (E4M3) with scales of blocks (`fp8`, as DeepSeek and Qwen publish), rows or whole tensors.

A value is the stored number times its scale. `fp8` calls the scales `weight_scale_inv`, although they multiply, and
`compressed-tensors` calls them `weight_scale`; scales of activations are not needed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.hub.weights import Stored
from specjax.runtime.errors import UserError


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of a block; None if scales belong to rows or to the whole tensor."""
    block = settings.get("weight_block_size")
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
    if weight.dtype != "F8_E4M3":
        raise UserError(f"{weight.name} is stored as {weight.dtype}, not as F8_E4M3; copy the checkpoint again")
    fitting = [(1,), (weight.shape[0],), (weight.shape[0], 1)]
    if (block := _block(settings)) is not None:
        fitting = [tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))]
    if scales.shape not in fitting:
        raise UserError(
            f"{scales.name} has shape {list(scales.shape)}, but {weight.name} of shape {list(weight.shape)} needs "
            f"{' or '.join(str(list(sizes)) for sizes in fitting)}; copy both again"
        )
    return weight.shape


def values(parts: Mapping[str, Any], index: tuple[slice, ...], settings: Mapping[str, Any]) -> np.ndarray:
    """The values of a slice [O, I]."""
    numbers, scales = parts["weight"][index].astype(np.float32), parts["scales"]
    block = _block(settings)
    if block is None:
        every = scales[(slice(None),)].astype(np.float32).reshape(-1, 1)
        return numbers * (every if len(every) == 1 else every[index[0]])
    places = [np.arange(i.start, i.stop) // step for i, step in zip(index, block, strict=True)]
    read = scales[tuple(slice(place[0], place[-1] + 1) for place in places)].astype(np.float32)
    rows, columns = (place - place[0] for place in places)
    return numbers * read[rows[:, None], columns[None]]
