"""Weights in 4 bits as GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) store them: 8 numbers in an int32.

A weight is [O, I]; the files have its transpose. `scales` [G, O] and zero points `qzeros` [G, O / 8] belong to groups
of inputs. GPTQ packs 8 inputs in `qweight` [I / 8, O] and names each input's group in `g_idx` [I]. AWQ packs 8 outputs
in `qweight` [I, O / 8], in another order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.hub.weights import Stored, check_shape, covering
from specjax.runtime.errors import UserError

_PACKED = 8
_IN_ORDER = np.arange(_PACKED)
# For each of 8 outputs, its place in the int32: AWQ packs the even ones first.
_AWQ_PLACES = np.asarray([0, 4, 1, 5, 2, 6, 3, 7])


def _unpacked(packed: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """The numbers 0 .. 15 of int32 values, which lie next to each other on `axis`."""
    shifts = np.expand_dims(4 * places, [i for i in range(packed.ndim + 1) if i != axis + 1])
    numbers = np.expand_dims(packed.view(np.uint32), axis + 1) >> shifts.astype(np.uint32) & 15
    return numbers.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])


def _checked(
    parts: Mapping[str, Stored], settings: Mapping[str, Any], packs_inputs: bool, key: str, formats: tuple[str, ...]
) -> tuple[int, int]:
    """The shape [O, I] of the weight. `key` is the older name of the setting "format"."""
    name = key if settings.get(key) is not None else "format"
    if str(settings.get(name) or formats[0]).lower() not in formats:
        raise UserError(f'"{name}" is {settings[name]!r}, which is not supported; take one in {" or ".join(formats)}')
    bits, packed = settings.get("bits", 4), parts["weight"]
    if bits != 4:
        raise UserError(f'"bits" is {bits!r}, which is not supported; take the checkpoint in 4 bits or in bfloat16')
    for tensor in (packed, parts["zeros"]):
        if tensor.dtype != "I32" or len(tensor.shape) != 2:
            raise UserError(
                f"{tensor.name} has dtype {tensor.dtype} and shape {list(tensor.shape)}, not int32 and two axes; "
                "copy the checkpoint again"
            )
    rows, columns = packed.shape
    inputs, outputs = (_PACKED * rows, columns) if packs_inputs else (rows, _PACKED * columns)
    group = settings.get("group_size", 128)
    group = inputs if group == -1 else group
    if type(group) is not int or group < 1 or inputs % group:
        raise UserError(
            f'"group_size" is {group!r}, which does not divide the {inputs} inputs of {packed.name}; correct it'
        )
    check_shape(parts["scales"], [(inputs // group, outputs)], f"{packed.name} in groups of {group}")
    check_shape(parts["zeros"], [(inputs // group, outputs // _PACKED)], f"{packed.name} in groups of {group}")
    return outputs, inputs


def gptq_shape(parts: Mapping[str, Stored], settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape [O, I] of the weight. Raises UserError if its parts do not fit each other."""
    outputs, inputs = _checked(parts, settings, True, "checkpoint_format", ("gptq", "gptq_v2"))
    check_shape(parts["groups"], [(inputs,)], parts["weight"].name)
    return outputs, inputs


def gptq_values(parts: Mapping[str, Stored], index: tuple[slice, ...], settings: Mapping[str, Any]) -> np.ndarray:
    """The values of a slice [O, I]. Files of the first format have each zero point less 1, modulo 16."""
    outputs, inputs = index
    rows, within = covering(inputs, _PACKED)
    numbers = _unpacked(parts["weight"].read((rows, outputs)), 0, _IN_ORDER)[within]
    groups = parts["groups"].read(inputs)
    is_second = "gptq_v2" in (settings.get("checkpoint_format") or settings.get("format") or "").lower()
    scales, zeros = _of_groups(parts, outputs, _IN_ORDER)
    return _scaled(numbers, (zeros[groups] + (0 if is_second else 1)) & 15, scales[groups])


def awq_shape(parts: Mapping[str, Stored], settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape [O, I] of the weight. Raises UserError if its parts do not fit each other."""
    return _checked(parts, settings, False, "version", ("gemm",))


def awq_values(parts: Mapping[str, Stored], index: tuple[slice, ...], settings: Mapping[str, Any]) -> np.ndarray:
    """The values of a slice [O, I]."""
    outputs, inputs = index
    columns, within = covering(outputs, _PACKED)
    numbers = _unpacked(parts["weight"].read((inputs, columns)), 1, _AWQ_PLACES)[:, within]
    scales, zeros = _of_groups(parts, outputs, _AWQ_PLACES)
    group = settings.get("group_size", 128)
    groups = np.arange(inputs.start, inputs.stop) // group if group != -1 else np.zeros(len(numbers), int)
    return _scaled(numbers, zeros[groups], scales[groups])


def _of_groups(parts: Mapping[str, Stored], outputs: slice, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scales and zero points of every group, for these outputs."""
    columns, within = covering(outputs, _PACKED)
    zeros = _unpacked(parts["zeros"].read((slice(None), columns)), 1, places)[:, within]
    return parts["scales"].read((slice(None), outputs)).astype(np.float32), zeros


def _scaled(numbers: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return ((numbers.astype(np.float32) - zeros.astype(np.float32)) * scales).T
