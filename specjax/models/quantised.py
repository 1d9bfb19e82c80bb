"""Kernels kept in 8 or 4 bits for decoding: integers, and float32 scales that groups of them share.

Only weights are quantised, and each to the nearest integer: products are computed in the dtype of the inputs. The
inputs of a group are not neighbours but lie at equal distances, so that sums over a group are sums of vectors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax.runtime.errors import UserError

# `strided_product` adds at most this many slices of a kernel in one operation, which takes longer to compile with more,
_SLICES = 20
# and at most so many that the processor's fastest cache holds their inputs. int8 has slices of at most so many lanes.
_INPUTS, _LANES = 4096, 160
# Number of float32 values that a processor instruction handles.
_VECTOR = 16


class Quantised(NamedTuple):
    """A kernel `[.., O, I]` in integers.

    Attributes:
      values: int8 [.., O, I]; or for int4 uint8 [.., O, I / 2], where byte r G + g has inputs 2 r G + g (lower half)
        and (2 r + 1) G + g, each as the integer + 8.
      scales: float32 [.., O, G]; group g has the inputs g, g + G, g + 2 G, and so on. For int8, G is 1.
    """

    values: Any
    scales: Any

    @property
    def per_value(self) -> int:
        """How many inputs one entry of `values` has."""
        return 2 if self.values.dtype == jnp.uint8 else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return (*self.values.shape[:-1], self.values.shape[-1] * self.per_value)


Kernel = Array | Quantised


def quantise(kernel: Float[Any, "*X O I"], dtype: str) -> Quantised:
    """The nearest integers: int8 in -127 .. 127 with a scale per output, int4 in -8 .. 7 with a scale per group.

    Args:
      kernel: a NumPy or JAX array; the result has arrays of the same kind.
      dtype: "int8" or "int4".

    Raises:
      UserError: for int4 with an odd number of inputs.
    """
    xp = np if isinstance(kernel, np.ndarray) else jnp
    *outer, inputs = kernel.shape
    grouped = kernel.astype(xp.float32).reshape(*outer, -1, _groups(inputs, dtype))
    largest, smallest = grouped.max(-2, keepdims=True), grouped.min(-2, keepdims=True)
    if dtype == "int8":
        scales, low, high = xp.maximum(largest, -smallest) / 127, -127, 127
    else:  # the number of the largest magnitude becomes -8, so that all 16 integers are used
        scales, low, high = xp.where(largest > -smallest, largest, smallest) / -8, -8, 7
    inverse = xp.where(scales == 0, 0, 1 / xp.where(scales == 0, 1, scales))
    integers = xp.clip(xp.round(grouped * inverse), low, high).astype(xp.int8)
    scales = scales[..., 0, :]
    if dtype == "int8":
        return Quantised(integers.reshape(kernel.shape), scales)
    codes = (integers + 8).astype(xp.uint8)
    return Quantised((codes[..., ::2, :] | codes[..., 1::2, :] << 4).reshape(*outer, -1), scales)


def _groups(inputs: int, dtype: str) -> int:
    """The number of groups, each of about 32 inputs in int4 if that divides well."""
    if dtype == "int8":
        return 1
    if inputs % 2:
        raise UserError(f"int4 needs an even number of inputs, and a kernel has {inputs}; choose int8 as param_dtype")
    sizes = [size for size in range(1, _SLICES + 1) if inputs // 2 % size == 0]
    fits = lambda size: size >= 8 and inputs // 2 // size % _VECTOR == 0
    return inputs // 2 // max(sizes, key=lambda size: (fits(size), -abs(size - 16)))


def factors(inputs: Float[Array, "*X I"], kernel: Kernel) -> list[tuple[Array, Array]]:
    """Pairs of inputs `[.., I / n]` and kernels `[.., O, I / n]` in their dtype; their products sum to the product."""
    if not isinstance(kernel, Quantised):
        return [(inputs, converted(kernel, inputs.dtype))]
    planes = [(_scaled(plane, kernel.scales)).astype(inputs.dtype) for plane in _planes(kernel.values)]
    grouped = inputs.reshape(*inputs.shape[:-1], -1, len(planes), kernel.scales.shape[-1])
    parts = [grouped[..., number, :].reshape(*inputs.shape[:-1], -1) for number in range(len(planes))]
    return list(zip(parts, planes, strict=True))


def _planes(values: Array) -> list[Array]:
    """The integers of the first, and for int4 of the second, input of each entry of `values`."""
    if values.dtype != jnp.uint8:
        return [values]
    codes = values.astype(jnp.int32)
    return [(codes & 15) - 8, (codes >> 4) - 8]


def _scaled(integers: Array, scales: Array) -> Array:
    grouped = integers.astype(jnp.float32).reshape(*integers.shape[:-1], -1, scales.shape[-1])
    return (grouped * scales[..., None, :]).reshape(integers.shape)


def dequantised(kernel: Kernel, dtype: Any) -> Float[Array, "*X O I"]:
    """The kernel in this float dtype."""
    if not isinstance(kernel, Quantised):
        return kernel.astype(dtype)
    planes = [_scaled(plane, kernel.scales).astype(dtype) for plane in _planes(kernel.values)]
    rounds = [plane.reshape(*plane.shape[:-1], -1, kernel.scales.shape[-1]) for plane in planes]
    return jnp.stack(rounds, -2).reshape(kernel.shape)


def converted(kernel: Float[Array, "*X O I"], dtype: Any) -> Float[Array, "*X O I"]:
    """The kernel in this dtype; bfloat16 to float32 by shifts, because XLA on CPU converts one value at a time."""
    if kernel.dtype == jnp.bfloat16 and dtype == jnp.float32:
        bits = jax.lax.bitcast_convert_type(kernel, jnp.uint16).astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
    return kernel.astype(dtype)


def strided_product(rows: Float[Array, "R I"], kernel: Quantised) -> Float[Array, "R O"]:
    """`rows @ kernel.T` in float32, for one or a few rows on CPU.

    XLA on CPU writes converted integers to memory before it multiplies them, and adds the products of a row one by one.
    Here slices of a row are converted, multiplied and added as vectors, which reads memory at its full speed.
    """
    groups, outputs = kernel.scales.shape[-1], kernel.values.shape[0]
    lanes = _lanes(kernel.values.shape[-1]) if groups == 1 else groups
    values = kernel.values.reshape(outputs, -1, lanes)
    inputs = rows.reshape(len(rows), -1, kernel.per_value, lanes)
    step = min(_SLICES, max(_INPUTS // (lanes * kernel.per_value), 1))
    ones, total = jnp.ones(lanes, jnp.float32), 0
    for first in range(0, values.shape[1], step):
        sums = 0
        for index in range(first, min(first + step, values.shape[1])):
            for number, plane in enumerate(_planes(values[:, index])):
                sums += plane.astype(jnp.float32)[:, None] * inputs[None, :, index, number]
        sums = sums if groups == 1 else sums * kernel.scales[:, None]
        # In this order of outputs and rows, the compiler writes the sums as vectors.
        total += jnp.einsum("ORL,L->OR", jax.lax.optimization_barrier(sums), ones)
    return (total * kernel.scales if groups == 1 else total).T


def _lanes(width: int) -> int:
    """The length of the slices into which `width` inputs are cut: a multiple of the processor's vectors if possible."""
    sizes = [size for size in range(1, min(_LANES, max(width // 8, 1)) + 1) if width % size == 0]
    return max(sizes, key=lambda size: (size % _VECTOR == 0, size))
