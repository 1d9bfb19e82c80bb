"""MXFP4 weights of gpt-oss: 32 numbers of 4 bits and their power of two (OCP Microscaling Formats, version 1.0).

A number (E2M1) has a sign, two bits of exponent and one of mantissa; a byte holds two, the first in its lower half. The
scale (E8M0) is an exponent with a bias of 127. The checkpoint has `blocks` [E, O, G, 16] and `scales` [E, O, G] of
experts whose unquantised kernels are [E, I, O], with I = 32 G inputs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.hub.weights import Stored, check_dtype, check_shape, covering
from specjax.runtime.errors import UserError

BLOCK = 32
_MAGNITUDES = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NUMBERS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
# The two numbers of each byte, as the bits of one integer, so that one look-up gives both.
_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=1).view(np.uint64)[:, 0]
_SCALES = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float32 values [.., 32 G] of `blocks` [.., G, 16] and `scales` [.., G], both uint8."""
    numbers = np.take(_PAIRS, blocks).view(np.float32)
    with np.errstate(over="ignore"):  # the largest numbers of the format are above float32's
        numbers *= _SCALES[scales][..., None]
    return numbers.reshape(*scales.shape[:-1], -1)


def shape(parts: Mapping[str, Stored], settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape [E, I, O] of the kernels. Raises UserError if the scales do not fit the blocks."""
    del settings
    blocks, scales = parts["blocks"], parts["scales"]
    for tensor in (blocks, scales):
        check_dtype(tensor, "U8")
    if len(blocks.shape) != 4 or blocks.shape[-1] != BLOCK // 2:
        raise UserError(
            f"{blocks.name} has shape {list(blocks.shape)}, not [experts, outputs, blocks, {BLOCK // 2}]; copy the "
            "checkpoint again"
        )
    check_shape(scales, [blocks.shape[:-1]], blocks.name)
    experts, outputs, groups, _ = blocks.shape
    return experts, groups * BLOCK, outputs


def values(parts: Mapping[str, Stored], index: tuple[slice, ...], settings: Mapping[str, Any]) -> np.ndarray:
    """The values of a slice [E, I, O] of the kernels; only blocks with a value in the slice are decoded."""
    del settings
    experts, inputs, outputs = index
    groups, within = covering(inputs, BLOCK)
    decoded = decode(*(parts[name].read((experts, outputs, groups)) for name in ("blocks", "scales")))
    return decoded[..., within].swapaxes(1, 2)
