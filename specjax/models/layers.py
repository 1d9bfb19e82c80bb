"""Building blocks of the decoder: norm, rotary positions, attention over a cache prefix, gated MLP."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.models import kv_cache
from specjax.runtime.dtypes import dtype_named


class Linear(nnx.Module):
    """`x @ kernel` with the kernel stored `[in, out]` (on CPU the transposed layout made five rows cost three)."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str, str], scale: float, dtype: str, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32) * scale
        self.kernel = nnx.Param(kernel.astype(dtype_named(dtype)), axes=axes)

    def __call__(self, inputs: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        return inputs @ self.kernel[...].astype(inputs.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32 (arXiv 1910.07467), with a learned gain."""

    def __init__(self, width: int, epsilon: float, dtype: str):
        self.scale = nnx.Param(jnp.ones((width,), dtype_named(dtype)), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = inputs.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * self.scale[...].astype(jnp.float32)[None, None]).astype(inputs.dtype)


def rotary_angles(
    positions: Int[Array, "B T"], head_size: int, theta: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine of the rotary angles (arXiv 2104.09864), float32."""
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(heads: Float[Array, "B X T H"], angles) -> Float[Array, "B X T H"]:
    """Turns the pairs (h, h + H/2) of each head, the half-split order of Hugging Face checkpoints."""
    cosine, sine = (a[:, None].astype(heads.dtype) for a in angles)
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def attend(
    queries: Float[Array, "B N T H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: "Float[Array, 'B T S'] | jax.Array",
) -> Float[Array, "B N T H"]:
    """Softmax attention of grouped queries over the slots where `visible` [B, T, S] holds; weights in float32."""
    batch, heads, steps, size = queries.shape
    kv_heads = keys.shape[1]
    # The query heads of a group and the T tokens become rows of one product a key head: [B, K, G*T, H].
    grouped = queries.reshape(batch, kv_heads, (heads // kv_heads) * steps, size)
    scores = jnp.einsum("BKRH,BKSH->BKRS", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, steps, -1) * (size**-0.5)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, kv_heads, (heads // kv_heads) * steps, -1)
    mixed = jnp.einsum("BKRS,BKSH->BKRH", weights, values)
    return mixed.reshape(batch, heads, steps, size)


def attend_to_prefix(queries, keys, values, positions, mask):
    """`attend` over the shortest listed prefix of the cache that holds every visible slot.

    A short text in a large cache must not pay for the large cache. The switch is around attention alone and only
    reads the cache; around the whole forward it would copy the cache every step.
    """
    lengths = kv_cache.prefixes(keys.shape[2])

    def branch(length):
        def run(queries, keys, values, positions, mask):
            visible = jnp.arange(length)[None, None] <= positions[..., None]
            if mask is not None:
                visible &= mask[..., :length]
            return attend(queries, keys[:, :, :length], values[:, :, :length], visible)

        return run

    if len(lengths) == 1:
        return branch(lengths[0])(queries, keys, values, positions, mask)
    needed = jnp.max(positions) + 1
    index = jnp.sum(needed > jnp.asarray(lengths[:-1], needed.dtype))
    return jax.lax.switch(index, [branch(n) for n in lengths], queries, keys, values, positions, mask)


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config, rngs: nnx.Rngs):
        make = functools.partial(Linear, dtype=config.param_dtype, rngs=rngs)
        scale = config.width**-0.5
        inner, kv_inner = config.heads * config.head_size, config.kv_heads * config.head_size
        self.query = make(config.width, inner, ("embed", "heads"), scale)
        self.key = make(config.width, kv_inner, ("embed", "kv_heads"), scale)
        self.value = make(config.width, kv_inner, ("embed", "kv_heads"), scale)
        self.output = make(inner, config.width, ("heads", "embed"), (inner * 2 * config.layers) ** -0.5)
        self.head_size = config.head_size

    def __call__(self, inputs, angles, positions, mask, keys, values):
        """Returns the mixed output and the updated cache arrays (None, None without a cache)."""
        split = lambda x: x.reshape(*x.shape[:2], -1, self.head_size).swapaxes(1, 2)
        queries = rotate(split(self.query(inputs)), angles)
        new_keys, new_values = rotate(split(self.key(inputs)), angles), split(self.value(inputs))
        if keys is None:
            visible = positions[:, None, :] <= positions[:, :, None]
            mixed = attend(queries, new_keys, new_values, visible if mask is None else visible & mask)
        else:
            keys = kv_cache.write(keys, new_keys, positions[:, 0])
            values = kv_cache.write(values, new_values, positions[:, 0])
            mixed = attend_to_prefix(queries, keys, values, positions, mask)
        mixed = mixed.swapaxes(1, 2).reshape(*inputs.shape[:2], -1)
        return self.output(mixed), keys, values


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, config, rngs: nnx.Rngs):
        make = functools.partial(Linear, dtype=config.param_dtype, rngs=rngs)
        scale = config.width**-0.5
        self.gate = make(config.width, config.mlp_width, ("embed", "mlp"), scale)
        self.up = make(config.width, config.mlp_width, ("embed", "mlp"), scale)
        self.down = make(
            config.mlp_width, config.width, ("mlp", "embed"), (config.mlp_width * 2 * config.layers) ** -0.5
        )

    def __call__(self, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(inputs)) * self.up(inputs))


class Block(nnx.Module):
    """One pre-norm layer: attention, then MLP, each with its residual."""

    def __init__(self, config, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon, config.param_dtype)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon, config.param_dtype)
        self.mlp = GatedMLP(config, rngs)

    def __call__(self, hidden, angles, positions, mask, keys, values):
        mixed, keys, values = self.attention(self.attention_norm(hidden), angles, positions, mask, keys, values)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), keys, values
