"""Kernels kept in 8 or 4 bits for decoding: integers, and float32 scales that groups of them share.

Only weights are quantised, and each to the nearest integer: products are as precise as the dtype of the inputs. The
inputs of a group are not neighbours but lie at equal distances, so operations on a group are operations on vectors.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax.runtime.errors import UserError

# The most inputs of an int4 kernel's group, divided by 2.
_HALF_GROUP = 20
# Number of float32 values that a processor instruction handles.
_VECTOR = 16
# The scales of an output's groups are multiples of this fraction of the largest, so that int4 times a multiple is int8.
_STEPS = 15
# From this many numbers on, `integer_product` is faster with the kernel as the left factor.
_LARGE = 1 << 22


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

    The scales of an output's groups are multiples of a fifteenth of the largest of them.

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
        scales, low, high = _in_steps(xp.where(largest > -smallest, largest, smallest) / -8, xp), -8, 7
    inverse = xp.where(scales == 0, 0, 1 / xp.where(scales == 0, 1, scales))
    integers = xp.clip(xp.round(grouped * inverse), low, high).astype(xp.int8)
    scales = scales[..., 0, :]
    if dtype == "int8":
        return Quantised(integers.reshape(kernel.shape), scales)
    codes = (integers + 8).astype(xp.uint8)
    return Quantised((codes[..., ::2, :] | codes[..., 1::2, :] << 4).reshape(*outer, -1), scales)


def _in_steps(scales: Any, xp: Any) -> Any:
    """The scales `[.., O, 1, G]`, rounded away from 0 to multiples of 1 / `_STEPS` of the largest in each output."""
    unit = abs(scales).max(-1, keepdims=True) / _STEPS
    return xp.sign(scales) * xp.ceil(abs(scales) / xp.where(unit == 0, 1, unit) - 1e-3) * unit


def _groups(inputs: int, dtype: str) -> int:
    """The number of groups, each of about 32 inputs in int4 if that divides well."""
    if dtype == "int8":
        return 1
    if inputs % 2:
        raise UserError(f"int4 needs an even number of inputs, and a kernel has {inputs}; choose int8 as param_dtype")
    sizes = [size for size in range(1, _HALF_GROUP + 1) if inputs // 2 % size == 0]
    fits = lambda size: size >= 8 and inputs // 2 // size % _VECTOR == 0
    return inputs // 2 // max(sizes, key=lambda size: (fits(size), -abs(size - 16)))


def factors(inputs: Float[Array, "*X I"], kernel: Kernel) -> list[tuple[Array, Array]]:
    """Pairs of inputs `[.., I / n]` and kernels `[.., O, I / n]` in their dtype; their products sum to the product."""
    if not isinstance(kernel, Quantised):
        return [(inputs, converted(kernel, inputs.dtype))]
    planes = [(_scaled(plane, kernel.scales)).astype(inputs.dtype) for plane in _planes(kernel.values)]
    return list(zip(_inputs_by_plane(inputs, kernel), planes, strict=True))


def integer_factors(inputs: Float[Array, "*X I"], kernel: Quantised) -> tuple[list[tuple[Array, Array]], Array]:
    """`factors` whose kernels are integers, and the scales `[O]` by which to multiply the sum of products.

    The TPU compiler converts int8 kernels within the product, so a block moves 1 byte per number, and 2 in bfloat16.
    Scaling the outputs takes it 0.3 of the cycles of scaling the kernel. Int4 it writes again: 3.4 or more bytes.
    """
    steps, units = _steps_of(kernel)
    planes = [plane.astype(inputs.dtype) for plane in _planes(kernel.values)]
    if steps is not None:
        steps = jax.lax.optimization_barrier(steps.astype(jnp.int8)).astype(inputs.dtype)
        planes = [plane * steps for plane in planes]
    return list(zip(_inputs_by_plane(inputs, kernel), planes, strict=True)), units


def _inputs_by_plane(inputs: Array, kernel: Quantised) -> list[Array]:
    """The inputs `[.., I / n]` of each of the n `_planes`."""
    grouped = inputs.reshape(*inputs.shape[:-1], -1, kernel.per_value, kernel.scales.shape[-1])
    return [grouped[..., number, :].reshape(*inputs.shape[:-1], -1) for number in range(kernel.per_value)]


def _planes(values: Array) -> list[Array]:
    """The integers of the first, and for int4 of the second, input of each entry of `values`."""
    if values.dtype != jnp.uint8:
        return [values]
    codes = values.astype(jnp.int32)
    return [(codes & 15) - 8, (codes >> 4) - 8]


def _scaled(integers: Array, scales: Array) -> Array:
    grouped = integers.astype(jnp.float32).reshape(*integers.shape[:-1], -1, scales.shape[-1])
    return (grouped * scales[..., None, :]).reshape(integers.shape)


def converted(kernel: Float[Array, "*X O I"], dtype: Any) -> Float[Array, "*X O I"]:
    """The kernel in this dtype; bfloat16 to float32 by shifts, because XLA on CPU converts one value at a time."""
    if kernel.dtype == jnp.bfloat16 and dtype == jnp.float32:
        bits = jax.lax.bitcast_convert_type(kernel, jnp.uint16).astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
    return kernel.astype(dtype)


def integer_product(rows: Float[Array, "R I"], kernel: Quantised) -> Float[Array, "R O"]:
    """`rows @ kernel.T` in float32 on CPU, where XLA has a fast product of int8 factors from two rows on.

    Each row is written as a scale times 128^2 a + 128 b + c, with a, b and c in int8, so 21 bits remain of its numbers;
    float32 has 24. The sums of products are exact, so a row's result does not depend on the number of rows.
    """
    kernels, scales = _as_int8(kernel)
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    unit = jnp.where(largest == 0, 1, largest) / (127 * 128 * 128)
    integers = jnp.round(jnp.concatenate(_inputs_by_plane(rows, kernel), axis=-1) / unit).astype(jnp.int32)
    upper = _divided(integers, 128 * 128)
    integers -= upper * 128 * 128
    middle = _divided(integers, 128)
    parts = jnp.concatenate([upper, middle, integers - middle * 128]).astype(jnp.int8)
    parts, kernels = jax.lax.optimization_barrier((parts, kernels))
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.int32)
    if kernels.size >= _LARGE:
        products = jax.lax.optimization_barrier(multiply("OI,RI->OR", kernels, parts)).T
    else:
        products = jax.lax.optimization_barrier(multiply("RI,OI->RO", parts, kernels))
    places = jnp.asarray([128 * 128, 128, 1], jnp.float32)[:, None, None]
    sums = jnp.sum(products.astype(jnp.float32).reshape(3, len(rows), -1) * places, axis=0)
    return sums * unit * scales[None]


def _divided(integers: Array, by: int) -> Array:
    """The nearest integers to `integers / by`, a power of 2."""
    return (integers + by // 2) // by


def _as_int8(kernel: Quantised) -> tuple[Array, Array]:
    """The planes as one int8 array `[O, I]`, and its float32 scales `[O]`."""
    steps, units = _steps_of(kernel)
    if steps is None:
        return kernel.values, units
    halves = kernel.values & 15, kernel.values >> 4
    return jnp.concatenate([(half.astype(jnp.int8) - 8) * steps.astype(jnp.int8) for half in halves], axis=-1), units


def _steps_of(kernel: Quantised) -> tuple[Array | None, Array]:
    """The scales as integers for each entry of `values`, None for int8, and for each output the unit of these."""
    if kernel.per_value == 1:
        return None, kernel.scales[:, 0]
    units = jnp.max(jnp.abs(kernel.scales), axis=-1, keepdims=True) / _STEPS
    steps = jnp.round(kernel.scales / jnp.where(units == 0, 1, units)).astype(jnp.int32)
    return jnp.tile(steps, (1, kernel.values.shape[-1] // steps.shape[-1])), units[:, 0]
