"""Softmax attention: over the used prefix of a cache, or of a text to itself, in blocks of queries where it is long."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.models import kv_cache
from specjax.runtime import mesh as meshes


def attend(
    queries: Float[Array, "B N T H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: "Float[Array, 'B T S'] | jax.Array",
    *,
    scale: float,
    softcap: float = 0.0,
    bias: Float[Array, "_ N T S"] | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B N T H"]:
    """Grouped-query softmax attention to the slots where `visible` [B, T, S] is true; weights in float32.

    Args:
      keys: in any dtype; they are converted to that of the queries, and values too.
      scale: factor on the dot products of queries and keys.
      softcap: scores become softcap * tanh(scores / softcap), arXiv 2408.00118; 0 is off.
      bias: added to the scores; its batch axis may be 1.
      sinks: for each query head the score of one more slot, whose value is zero (gpt-oss, arXiv 2508.10925): it joins
        the denominator of the softmax, so the weights of the real slots sum to less than 1.
    """
    batch, heads, steps, size = queries.shape
    kv_heads = keys.shape[1]
    keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
    if meshes.platform() == "tpu" and heads * steps == kv_heads:  # one row for each key head is slow, see `product`
        twice = lambda x: None if x is None else jnp.concatenate([x, x], axis=-2)
        how = {"scale": scale, "softcap": softcap, "bias": twice(bias), "sinks": sinks}
        return attend(twice(queries), keys, values, twice(visible), **how)[:, :, :1]
    # One product for each key head, whose rows are the group's query heads and the T tokens: [B, K, G*T, H].
    grouped = queries.reshape(batch, kv_heads, (heads // kv_heads) * steps, size)
    scores = _products(grouped, keys)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, steps, -1)
    scores = scores if scale == 1 else scores * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], kv_heads, heads // kv_heads, *bias.shape[2:])
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1) if sinks is None else _softmax_with_sinks(scores, sinks)
    weights = weights.astype(values.dtype).reshape(batch, kv_heads, (heads // kv_heads) * steps, -1)
    mixed = jnp.einsum("BKRS,BKSH->BKRH", weights, values, preferred_element_type=jnp.float32)
    return mixed.astype(values.dtype).reshape(batch, heads, steps, size)


# On CPU, `_products` of several texts with at most this many queries of a key head have the keys as the left factor.
_FEW_QUERIES = 4


def _products(queries: Float[Array, "B K R H"], keys: Float[Array, "B K S H"]) -> Float[Array, "B K R S"]:
    """The dot products of queries and keys in float32.

    The CPU's library copies the right factor before it multiplies, so for few queries of several texts the keys are the
    left one, and queries are padded to a number that is fast: 16 texts of 180 tokens decode 1.5 times as fast. With
    one query, with more, or in bfloat16, that takes longer.
    """
    batch, _, rows, _ = queries.shape
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    few = batch > 1 and 1 < rows <= _FEW_QUERIES and queries.dtype == jnp.float32
    if not (few and meshes.on_one_cpu()):
        return multiply("BKRH,BKSH->BKRS", queries, keys)
    padded = jax.lax.optimization_barrier(jnp.pad(queries, ((0, 0), (0, 0), (0, _FEW_QUERIES - rows), (0, 0))))
    products = jax.lax.optimization_barrier(multiply("BKSH,BKRH->BKSR", keys, padded))
    return products[..., :rows].swapaxes(2, 3)


def _softmax_with_sinks(scores: Float[Array, "B K G T S"], sinks: Float[Array, "N"]) -> Float[Array, "B K G T S"]:
    """The softmax over the slots and the head's sink, without the sink's own weight."""
    sinks = sinks.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    exponentials = jnp.exp(scores - largest)
    return exponentials / (jnp.sum(exponentials, axis=-1, keepdims=True) + jnp.exp(sinks - largest))


# At most this many scores of each head are in memory at a time, unless blocks would have fewer queries than this.
_SCORES, _FEWEST_QUERIES = 1 << 20, 64


def by_queries(
    attend_some: Callable, slots: int, queries: Float[Array, "*X T H"], *others: Any
) -> Float[Array, "*X T H"]:
    """`attend_some(queries, *others)`, for long texts in blocks of queries, so that scores `[T, S]` never exist.

    The blocks run one after the other, and again in the backward pass. Arrays that `attend_some` closes over (keys,
    values, sinks) get the sum of the blocks' gradients in their own dtype, which should be float32.

    Args:
      attend_some: attention of any of the T queries.
      slots: S, the number of slots that each query is compared with.
      others: further arguments, trees of arrays that all have the queries on axis -2, or 1 there for all queries.
    """
    rows, length = queries.shape[0], queries.shape[-2]
    rows = max(rows // meshes.num_shards("batch"), 1)
    block = max(_SCORES // (rows * slots), _FEWEST_QUERIES)
    if length <= block:
        return attend_some(queries, *others)
    count = -(-length // block)
    block = -(-length // count)

    def split(x):
        if x.shape[-2] == 1:
            return None
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, count * block - length), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], count, block, x.shape[-1]), -3, 0)

    arguments, structure = jax.tree.flatten((queries, *others))

    # prevent_cse is not needed inside a scan, and its barriers would only cost time.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(blocks):
        chosen = [x if part is None else part for x, part in zip(arguments, blocks, strict=True)]
        return attend_some(*jax.tree.unflatten(structure, chosen))

    mixed = jnp.moveaxis(jax.lax.map(run, list(map(split, arguments))), 0, -3)
    return mixed.reshape(*mixed.shape[:-3], count * block, mixed.shape[-1])[..., :length, :]


def visible_slots(positions, slots, mask, window: int, causal: bool = True):
    """Whether the query at each of `positions` [B, T] may attend to each of `slots` [B or 1, 1, S]: [B, T, S].

    With a window of 3, position 5 attends to 3, 4 and 5; 0 is no window.
    """
    visible = slots <= positions[..., None] if causal else jnp.full((*positions.shape, slots.shape[-1]), True)
    if window:
        visible &= slots > positions[..., None] - window
    return visible if mask is None else visible & mask[..., : slots.shape[-1]]


def attend_to_prefix(queries, keys, values, positions, mask, *, window=0, bias=None, **how):
    """`attend` over the shortest of `kv_cache.prefixes` that contains every visible slot.

    So the cost of attention depends on the length of the text, not on the cache's capacity. The switch contains only
    attention, which reads the cache; a switch around the forward pass would copy the cache in every step.

    On a GPU every switch makes the host wait for the device, once per layer, so attention reads all of the cache.
    """
    dtype = queries.dtype
    queries = queries.astype(keys.dtype)  # on CPU, caches of bfloat16 models are float32
    # T tokens occupy at least T slots, so shorter prefixes need no branch; each branch is compiled in every layer.
    lengths = [length for length in kv_cache.prefixes(keys.shape[2]) if length >= queries.shape[2]]
    lengths = lengths[-1:] if meshes.platform() == "gpu" else lengths

    def branch(length):
        def run(queries, keys, values, positions, mask):
            added = None if bias is None else bias[..., :length]
            keys, values, slots = keys[:, :, :length], values[:, :, :length], jnp.arange(length)[None, None]

            def attend_some(queries, positions, mask, added):
                visible = visible_slots(positions[..., 0], slots, mask, window)
                return attend(queries, keys, values, visible, bias=added, **how)

            return by_queries(attend_some, length, queries, positions[..., None], mask, added)

        return run

    if len(lengths) == 1:
        return branch(lengths[0])(queries, keys, values, positions, mask).astype(dtype)
    needed = jnp.max(positions) + 1
    index = jnp.sum(needed > jnp.asarray(lengths[:-1], needed.dtype))
    mixed = jax.lax.switch(index, [branch(n) for n in lengths], queries, keys, values, positions, mask)
    return mixed.astype(dtype)


def attend_to_text(queries, keys, values, positions, mask, *, window=0, bias=None, causal=True, **how):
    """`attend` of the tokens of a text to each other, without a cache."""
    slots, keys, values = positions[:, None], keys.astype(jnp.float32), values.astype(jnp.float32)

    def attend_some(queries, positions, mask, bias):
        visible = visible_slots(positions[..., 0], slots, mask, window, causal)
        return attend(queries, keys, values, visible, bias=bias, **how)

    return by_queries(attend_some, slots.shape[2], queries, positions[..., None], mask, bias)
