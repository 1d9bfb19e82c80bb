"""Building blocks of the models: projections, norms, the layers of attention and MLP."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from specjax.models import attention, kv_cache
from specjax.models.config import DecoderConfig
from specjax.models.quantised import Kernel, Quantised, converted, integer_factors, integer_product, quantise
from specjax.models.rotary import rotate
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import QUANTISED, cpu_has_amx, dtype_named

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


# On CPU, products with at most this many rows are computed as in `_few_rows` or `quantised.integer_product`. With AMX
# that is slower for more than 16 rows of bfloat16: 32 rows take 1.3 times as long as in one plain product.
_FEW_ROWS, _FEW_AMX_ROWS = 64, 16

# On CPU, float16 kernels are converted to float32 in blocks of this size, which stay in the processor's cache.
_BLOCK_BYTES = 1 << 21


def product(inputs: Float[Array, "B T I"], kernel: Kernel, dtype: DTypeLike) -> Float[Array, "B T O"]:
    """`inputs @ kernel.T` in this dtype, computed from factors in the dtype of the inputs."""
    if meshes.platform() == "cpu":
        multiply = _quantised_cpu_product if isinstance(kernel, Quantised) else _cpu_product
        return multiply(inputs, kernel, dtype)
    batch, steps, _ = inputs.shape
    if meshes.platform() == "tpu" and batch * steps <= meshes.num_shards("batch"):
        # One row on each device: vector instructions would multiply it, in four times the cycles. They do not if there
        # are two. With the barrier the compiler does not cut the products to one row itself, where it once failed.
        rows = jnp.pad(inputs, ((0, 0), (0, 1), (0, 0)))
        return jax.lax.optimization_barrier(_summed(rows, kernel, dtype))[:, :steps]
    return _summed(inputs, kernel, dtype)


def _summed(inputs, kernel, dtype):
    multiply = functools.partial(jnp.einsum, "BTI,OI->BTO")
    if not isinstance(kernel, Quantised):
        return multiply(inputs, converted(kernel, inputs.dtype), preferred_element_type=dtype)
    pairs, scales = integer_factors(inputs, kernel)
    outputs = sum(multiply(*pair, preferred_element_type=jnp.float32) for pair in pairs)
    return (outputs * scales[None, None]).astype(dtype)


def _quantised_cpu_product(inputs, kernel, dtype):
    rows = inputs.shape[0] * inputs.shape[1]
    if rows > _FEW_ROWS or not meshes.on_one_cpu():
        return _summed(inputs, kernel, dtype)
    outputs = integer_product(inputs.reshape(rows, -1).astype(jnp.float32), kernel).astype(dtype)
    return outputs.reshape(*inputs.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cpu_product(inputs, kernel, dtype):
    """`product` on CPU, with a gradient that materialises both factors before multiplying them.

    Otherwise the compiler fuses a strided transpose into the preceding operation, such as the activation's gradient,
    which made a training step 10% slower. Products of bfloat16 factors are summed in float32 and rounded last: the CPU
    has instructions for that (AMX), and takes four times as long to round within the product.
    """
    few = _FEW_AMX_ROWS if inputs.dtype == jnp.bfloat16 and cpu_has_amx() else _FEW_ROWS
    if inputs.shape[0] * inputs.shape[1] <= few and meshes.on_one_cpu():
        kernel = kernel if inputs.dtype == jnp.float32 else kernel.astype(inputs.dtype)
        return _few_rows(inputs.reshape(-1, inputs.shape[2]), kernel, dtype).reshape(*inputs.shape[:2], -1)
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if kernel.dtype == jnp.bfloat16 and cpu_has_amx():
        return sum(multiply("BTI,OI->BTO", part, kernel) for part in _bfloat16_parts(inputs)).astype(dtype)
    return multiply("BTI,OI->BTO", inputs, converted(kernel, inputs.dtype)).astype(dtype)


def _few_rows(rows: Float[Array, "R I"], kernel: Float[Array, "O I"], dtype: DTypeLike) -> Float[Array, "R O"]:
    """`rows @ kernel.T` with the kernel as the left factor, which for 2 to 8 rows takes the CPU half the time.

    Some numbers of rows are slow, so several are padded to 4 or to a multiple of 8: 12 rows took 2.3 times the time of
    one, 16 rows 1.9 times. The barriers keep the compiler from exchanging the factors and from multiplying fewer rows.
    """
    count = rows.shape[0]
    if kernel.dtype == jnp.bfloat16 and count == 1 and not cpu_has_amx():
        # The conversion is fused with the sum. On a CPU without bfloat16 instructions (AVX2), SmolLM2 then decodes at
        # 0.8 of float32's speed; with `_bfloat16_products`, at 0.4. With AMX those take a tenth of this time.
        rows = jax.lax.optimization_barrier(rows.astype(jnp.float32))
        products = jnp.einsum("OI,RI->OR", kernel.astype(jnp.float32), rows)
        return jax.lax.optimization_barrier(products).T.astype(dtype)
    if kernel.dtype == jnp.bfloat16:
        return _bfloat16_products(rows, kernel).T.astype(dtype)
    if count > 1:
        rows = jax.lax.optimization_barrier(jnp.pad(rows, ((0, -count % (4 if count <= 4 else 8)), (0, 0))))
    if kernel.dtype == jnp.float32:
        products = jnp.einsum("OI,RI->OR", kernel, rows)
    else:
        products = _block_products(rows.astype(jnp.float32), kernel)
    return jax.lax.optimization_barrier(products)[:, :count].T.astype(dtype)


def _bfloat16_products(rows: Float[Array, "R I"], kernel: Float[Array, "O I"]) -> Float[Array, "O R"]:
    """`kernel @ rows.T` in float32, as precise as after converting the bfloat16 kernel, which takes much longer.

    A float32 number is the sum of three bfloat16 numbers, so three products of bfloat16 factors give the result. Three
    rows are also the fewest that the CPU's library multiplies without converting the kernel.
    """
    parts = _bfloat16_parts(rows)
    stacked = jnp.concatenate(parts)
    stacked = jax.lax.optimization_barrier(jnp.pad(stacked, ((0, max(3 - len(stacked), 0)), (0, 0))))
    products = jnp.einsum("OI,RI->OR", kernel, stacked, preferred_element_type=jnp.float32)
    products = jax.lax.optimization_barrier(products)[:, : len(parts) * len(rows)]
    return products.reshape(-1, len(parts), len(rows)).sum(1)


def _bfloat16_parts(array: Float[Array, "*X"]) -> list[Float[Array, "*X"]]:
    """bfloat16 arrays whose sum is the array: itself, or three for float32."""
    parts, rest = [], array
    for _ in range(1 if array.dtype == jnp.bfloat16 else 3):
        parts.append(rest.astype(jnp.bfloat16))
        rest = rest - parts[-1].astype(rest.dtype)
    return parts


def _block_products(rows: Float[Array, "R I"], kernel: Float[Array, "O I"]) -> Float[Array, "O R"]:
    """`kernel @ rows.T`, where blocks of a float16 kernel are converted one by one, and stay in the CPU's cache."""
    outputs, width = kernel.shape
    size = min(max(_BLOCK_BYTES // (4 * width), 1), outputs)

    def multiply(index, products):
        start = jnp.minimum(index * size, outputs - size)  # the last block overlaps the one before it
        block = jax.lax.dynamic_slice_in_dim(kernel, start, size).astype(jnp.float32)
        part = jnp.einsum("OI,RI->OR", jax.lax.optimization_barrier(block), rows)
        return jax.lax.dynamic_update_slice_in_dim(products, part, start, 0)

    start = jnp.zeros((outputs, rows.shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, -(-outputs // size), multiply, start)


def _cpu_product_backward(dtype, saved, gradient):
    inputs, kernel = saved
    inputs, gradient = jax.lax.optimization_barrier((inputs, gradient.astype(inputs.dtype)))
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    to_inputs = multiply("BTO,OI->BTI", gradient, converted(kernel, inputs.dtype)).astype(inputs.dtype)
    return to_inputs, multiply("BTO,BTI->OI", gradient, inputs).astype(kernel.dtype)


_cpu_product.defvjp(lambda *factors: (_cpu_product(*factors), factors[:2]), _cpu_product_backward)


def kernel_params(kernel: Float[Array, "*X O I"], dtype: str, axes: tuple) -> tuple[nnx.Param, nnx.Param | None]:
    """The parameters that hold a kernel in this dtype: itself, or integers and their scales, see `Quantised`."""
    if dtype not in QUANTISED:
        return nnx.Param(kernel.astype(dtype_named(dtype)), axes=axes), None
    values, scales = quantise(kernel, dtype)
    return nnx.Param(values, axes=axes), nnx.Param(scales, axes=(*axes[:-1], None))


def kernel_of(kernel: nnx.Param, scales: nnx.Param | None) -> Kernel:
    """The kernel that these parameters hold."""
    return kernel[...] if scales is None else Quantised(kernel[...], scales[...])


def bias_dtype(dtype: str):
    """The dtype of the bias next to a kernel of this dtype: float32 next to a quantised one."""
    return jnp.float32 if dtype in QUANTISED else dtype_named(dtype)


class Linear(nnx.Module):
    """`x @ kernel.T` in the dtype of x, with a kernel `[out, in]`; `logits` returns it in float32, unrounded.

    Every row of the kernel is contiguous, which decoding on CPU needs (see `_few_rows`); so is that of an embedding,
    which a tied head multiplies with.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        scale: float,
        dtype: str,
        rngs: nnx.Rngs,
        bias=False,
    ):
        kernel = (jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32) * scale).T
        self.kernel, self.scales = kernel_params(kernel, dtype, axes[::-1])
        self.bias = nnx.Param(jnp.zeros((outputs,), bias_dtype(dtype)), axes=axes[1:]) if bias else None

    def __call__(self, inputs: Float[Array, "B T I"], dtype: DTypeLike | None = None) -> Float[Array, "B T O"]:
        dtype = dtype or inputs.dtype
        outputs = product(inputs, kernel_of(self.kernel, self.scales), dtype)
        return outputs if self.bias is None else outputs + self.bias[...].astype(dtype)[None, None]

    def logits(self, inputs: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        return self(inputs, jnp.float32)


class Norm(nnx.Module):
    """A norm over `width` channels in float32, of the kind in the config, with a learned gain.

    "rms" divides by the root mean square (arXiv 1910.07467), "rms_plus_one" has the gain 1 + `scale`, and "layer" first
    subtracts the mean, and adds a learned bias (arXiv 1607.06450).
    """

    def __init__(self, config: DecoderConfig, width: int, axis: str = "norm"):
        param = lambda values: nnx.Param(values((width,), dtype_named(config.float_dtype)), axes=(axis,))
        self.offset = 1.0 if config.norm == "rms_plus_one" else 0.0
        self.scale = param(jnp.zeros if self.offset else jnp.ones)
        self.bias = param(jnp.zeros) if config.norm == "layer" else None
        self.epsilon = config.norm_epsilon

    def __call__(self, inputs: Float[Array, "*X D"]) -> Float[Array, "*X D"]:
        channels = lambda param: jnp.expand_dims(param[...].astype(jnp.float32), range(inputs.ndim - 1))
        wide = inputs.astype(jnp.float32)
        if self.bias is not None:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        gain = channels(self.scale) + self.offset if self.offset else channels(self.scale)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon) * gain
        return (normed if self.bias is None else normed + channels(self.bias)).astype(inputs.dtype)


def query_scale(config: DecoderConfig) -> float:
    """The factor on the dot products of queries and keys."""
    return config.head_size**-0.5 if config.query_scale is None else config.query_scale


def projections(
    config: DecoderConfig, rngs: nnx.Rngs, inputs: int | None = None
) -> tuple[Linear, Linear, Linear, Linear]:
    """The query, key, value and output projections of an attention layer; `inputs` is the width of what the first three
    read, by default that of the config."""
    make = functools.partial(Linear, dtype=config.param_dtype, rngs=rngs)
    inputs = inputs or config.width
    scale, bias = inputs**-0.5, config.attention_bias
    inner, kv_inner = config.heads * config.head_size, config.kv_heads * config.head_size
    # If the scores are not scaled by head_size ** -0.5, the initial query kernel is, so initial scores are the same.
    heads, kv_heads = meshes.Parts("heads", config.heads), meshes.Parts("kv_heads", config.kv_heads)
    query = make(inputs, inner, ("embed", heads), scale * config.head_size**-0.5 / query_scale(config), bias=bias)
    key = make(inputs, kv_inner, ("embed", kv_heads), scale, bias=bias)
    value = make(inputs, kv_inner, ("embed", kv_heads), scale, bias=bias)
    output_scale = (inner * 2 * config.layers) ** -0.5
    return query, key, value, make(inner, config.width, (heads, "embed"), output_scale, bias=config.output_bias)


def split_heads(x: Float[Array, "B T I"], size: int) -> Float[Array, "B X T H"]:
    """Splits the channels into heads of `size` channels and moves the heads in front of the tokens."""
    return x.reshape(*x.shape[:2], -1, size).swapaxes(1, 2)


def join_heads(x: Float[Array, "B X T H"]) -> Float[Array, "B T I"]:
    """The inverse of `split_heads`."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


class Attention(nnx.Module):
    """Causal grouped-query self-attention of one layer."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs, inputs: int | None = None):
        self.query, self.key, self.value, self.output = projections(config, rngs, inputs)
        self.query_norm = self._head_norm(config, "heads")
        self.key_norm = self._head_norm(config, "kv_heads")
        sinks = jnp.zeros((config.heads,), dtype_named(config.float_dtype))
        self.sinks = nnx.Param(sinks, axes=(meshes.Parts("heads", config.heads),)) if config.attention_sinks else None
        self.head_size, self.joint_qk_norm = config.head_size, config.joint_qk_norm
        self.scale, self.softcap = query_scale(config), config.attention_softcap
        self.window = config.window(layer)

    @property
    def how(self) -> dict[str, float]:
        """What does not depend on the queries in `attention.attend`."""
        return {"scale": self.scale, "softcap": self.softcap}

    @staticmethod
    def _head_norm(config, name):
        if not config.qk_norm:
            return None
        if not config.joint_qk_norm:
            return Norm(config, config.head_size, "head")
        count = getattr(config, name)
        return Norm(config, count * config.head_size, meshes.Parts(name, count))

    def __call__(self, inputs, angles, positions, mask, keys, values, *, bias=None, causal=True):
        """Returns the output `[B, T, D]` and the updated cache arrays (None, None without a cache).

        Args:
          angles: cosine and sine of the rotary angles; None rotates nothing.
          bias: [B or 1, N, T, S], added to the scores.
          causal: False attends in both directions; only without a cache.
        """
        queries, (new_keys, new_values) = self.queries(inputs, angles), self.keys_values(inputs, angles)
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        how = {"window": self.window, "bias": bias, "sinks": sinks, **self.how}
        if keys is None:
            mixed = attention.attend_to_text(queries, new_keys, new_values, positions, mask, causal=causal, **how)
        else:
            keys, values = kv_cache.write(keys, values, new_keys, new_values, positions[:, 0])
            keys, values = (meshes.pin_undivided(x, 1, "kv_heads") for x in (keys, values))
            mixed = attention.attend_to_prefix(queries, keys, values, positions, mask, **how)
        return self.output(join_heads(mixed)), keys, values

    def queries(self, inputs, angles):
        """The queries `[B, N, T, H]`, normed and rotated."""
        return self._heads(self.query(inputs), self.query_norm, angles)

    def keys_values(self, inputs, angles):
        """The keys, normed and rotated, and the values, `[B, K, T, H]` each."""
        return self._heads(self.key(inputs), self.key_norm, angles), split_heads(self.value(inputs), self.head_size)

    def _heads(self, channels, norm, angles):
        norm = norm or (lambda x: x)
        if self.joint_qk_norm:
            heads = split_heads(norm(channels), self.head_size)
        else:
            heads = norm(split_heads(channels, self.head_size))
        return heads if angles is None else rotate(heads, angles)


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (arXiv 2002.05202), or without a gate `down(act(up(x)))`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, inner: int | None = None):
        make = functools.partial(Linear, dtype=config.param_dtype, rngs=rngs, bias=config.mlp_bias)
        scale, inner = config.width**-0.5, inner or config.mlp_width
        self.gate = make(config.width, inner, ("embed", "mlp"), scale) if config.gated_mlp else None
        self.up = make(config.width, inner, ("embed", "mlp"), scale)
        self.down = make(inner, config.width, ("mlp", "embed"), (inner * 2 * config.layers) ** -0.5)
        self.activation = config.activation

    def __call__(self, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activate(self.up(inputs)))
        return self.down(activate(self.gate(inputs)) * self.up(inputs))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(graph: nnx.GraphDef, options: tuple, platform: str, params: Any, inputs: tuple) -> Any:
    del platform  # part of the key, because what is traced depends on it
    return nnx.merge(graph, params)(*inputs, **dict(options))


def traced_once(layer: nnx.Module, **options: Any) -> Callable:
    """`layer` as a function of arrays that is traced and lowered once for all layers of this structure and shape.

    XLA inlines the calls, so the compiled program is the same. Tracing the loop of a model of 30 layers took 2.8 s, and
    takes 0.9 s.
    """
    graph, params = nnx.split(layer)
    return lambda *inputs: _call(graph, tuple(sorted(options.items())), meshes.platform(), params, inputs)


def recomputed(block: Callable, remat: bool) -> Callable:
    """`block`, which with `remat` holds only its inputs for the backward pass, and there computes the rest again.

    `jax.checkpoint` does the same, but only its barriers keep the compiler from computing all layers again before the
    backward pass needs them, and XLA drops barriers on CPU.

    Args:
      block: a function of hidden states and other trees of arrays, whose first result has the shape of these states.
    """

    def run(*inputs: Any) -> Any:
        call, closed = jax.closure_convert(block, *inputs)

        @jax.custom_vjp
        def once(inputs, closed):
            return call(*inputs, *closed)

        def backward(saved, gradients):
            (hidden, *others), closed = saved
            # Adds 0, which is known only when the gradient is.
            hidden = hidden + 0 * jax.tree.leaves(gradients)[0].astype(hidden.dtype)
            again = lambda inputs, closed: call(*inputs, *closed)
            return jax.vjp(again, (hidden, *others), closed)[1](gradients)

        once.defvjp(lambda *saved: (once(*saved), saved), backward)
        return once(inputs, closed)

    return run if remat else block
