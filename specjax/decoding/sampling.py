"""Converts logits to adjusted probabilities, and draws tokens with random numbers keyed by prompt and position."""

import dataclasses
import enum
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from specjax.runtime import checks
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError


class Stream(enum.IntEnum):
    """The purpose of a random draw. Draws with different purposes at one position are independent."""

    DRAFT = 0
    ACCEPT = 1
    RECOVER = 2
    SHARED = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Numeric settings of sampling, of lossy rules and of when drafting stops.

    All are traced, so changing a value does not recompile. Turning top-k, top-p or min-p on or off does: a cut that is
    off is None and takes no operation, and a conditional would make the host wait on a GPU.

    Attributes:
      temperature: divides the logits; 0 is greedy, which is compiled separately (`Plan.greedy`).
      top_k: keep the k most probable tokens; None keeps all.
      top_p: then keep the most probable tokens whose total probability reaches p; None keeps all.
      min_p: then keep the tokens with at least this share of the largest probability; None keeps all.
      lenience: epsilon of a lossy rule; smaller accepts more. Exact rules do not use it.
      threshold: drafting stops after a token whose distribution at temperature 1 has a largest probability below this.
      block_costs: cost of a block that drafts 0 .. gamma tokens, in any unit; None unless the draft length is adaptive.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None
    lenience: Float[Array, ""]
    threshold: Float[Array, ""]
    block_costs: Float[Array, "gamma_plus_1"] | None = None

    @classmethod
    def of(
        cls,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        *,
        min_p: float = 0.0,
        lenience: float = 1.0,
        threshold: float = 0.0,
        block_costs: Sequence[float] | None = None,
    ) -> "Sampling":
        """Converts values to arrays; top_k 0, top_p 1 and min_p 0 are off.

        Raises:
          UserError: for a value out of range.
        """
        tiny = float(jnp.finfo(jnp.float32).tiny)  # devices flush smaller numbers to 0
        if temperature != 0 and not tiny <= temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or a positive number, not {temperature}.")
        if top_k < 0:
            raise UserError(f"top_k must be 0 (off) or a positive number of tokens, not {top_k}.")
        if not tiny <= top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {top_p}.")
        if not 0 <= min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1] (0: off), not {min_p}.")
        if not tiny <= lenience <= 1:
            raise UserError(f"lenience must lie in (0, 1], not {lenience}; 1 is the strictest, smaller accepts more.")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold must lie in [0, 1] (0: never stop drafting), not {threshold}.")
        if block_costs is not None and not all(0 < cost < float("inf") for cost in block_costs):
            raise UserError(f"the costs of blocks must be positive numbers, not {tuple(block_costs)}.")
        return cls(
            jnp.float32(temperature),
            jnp.int32(top_k) if top_k else None,
            jnp.float32(top_p) if top_p < 1 else None,
            jnp.float32(min_p) if min_p else None,
            jnp.float32(lenience),
            jnp.float32(threshold),
            None if block_costs is None else jnp.asarray(block_costs, jnp.float32),
        )


def _truncate(probs: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T V"]:
    """Cuts by top-k, then top-p, then min-p, and renormalises. All tokens tied at a cut-off are kept."""
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return probs
    edge = _edge(probs, sampling)
    if sampling.min_p is not None:
        edge = jnp.maximum(edge, sampling.min_p * jnp.max(probs, axis=-1, keepdims=True))
    cut = jnp.where(probs >= edge, probs, 0)
    return cut / jnp.sum(cut, axis=-1, keepdims=True)


def _edge(probs: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T 1"]:
    """The smallest probability that top-k and top-p keep, found with sums only; 0 without them.

    Sorting takes ten times as long on CPU at 150,000 ids, and would gather a vocabulary sharded over devices. The edge
    is the largest value such that the values at or above it are at least k, and then have a share p of the mass.
    Non-negative floats have the order of their bit patterns, so 31 bisections over these find it exactly.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)
    # Rounding may leave a probability just above 1.
    highest = jnp.full((*probs.shape[:-1], 1), jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 16)

    def largest(enough):
        def halve(_, span):
            low, high = span
            middle = low + (high - low + 1) // 2
            fits = enough(bits >= middle)
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

        return jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(highest), highest))[0]

    edge, left = jnp.zeros_like(highest), probs
    if sampling.top_k is not None:
        k = jnp.minimum(sampling.top_k, probs.shape[-1])
        edge = largest(lambda above: jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32) >= k)
        left = jnp.where(bits >= edge, probs, 0)
    if sampling.top_p is not None:
        share = sampling.top_p * jnp.sum(left, axis=-1, keepdims=True)

        def enough(above):
            mass = jnp.sum(jnp.where(above, left, 0), axis=-1, keepdims=True)
            return (mass >= share) & (mass > 0)

        edge = jnp.maximum(edge, largest(enough))
    return jax.lax.bitcast_convert_type(edge, jnp.float32)


def most_probable(scores: Float[Array, "*X V"]) -> Int[Array, "*X"]:
    """The first index of the largest score; `argmax`, which on CPU takes ten times as long."""
    largest = jnp.max(scores, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    last = scores.shape[-1] - 1  # for scores that are not a number
    return jnp.min(jnp.where(scores == largest, index, last), axis=-1)


def finite_rows(logits: Float[Array, "*X V"]) -> Bool[Array, "*X"]:
    """Whether each row defines a distribution: no NaN, no +infinity, and not only -infinity (probability 0)."""
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    # On every device: its sharding would spread to the layers, and the loop then gathers weights on TPU slices.
    return meshes.constrain(finite, (None,) * finite.ndim)


def probabilities(logits: Float[Array, "B T V"], sampling: Sampling, *, greedy: bool) -> Float[Array, "B T V"]:
    """The adjusted distribution: softmax at the temperature, cut by top-k, top-p and min-p; one-hot when greedy."""
    if greedy:
        return jax.nn.one_hot(most_probable(meshes.pin_last(logits, "vocab")), logits.shape[-1], dtype=jnp.float32)
    logits = meshes.pin_last(logits.astype(jnp.float32), "vocab")
    # Subtract the maximum before dividing; otherwise a small temperature could overflow several logits to infinity.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    return _truncate(jax.nn.softmax(logits / sampling.temperature, axis=-1), sampling)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """Random numbers of one block, a pure function of (row key, position of the token, stream).

    So a row's text does not depend on the other rows, its place in the batch or the mesh. A position whose drafted
    token was refused has the same numbers in the next block, unless `by_block`.

    Attributes:
      row_keys: one key per row, folded from the run's seed and the prompt's index.
      lengths: position of the first token that this block can emit (the number of committed tokens).
      greedy: take the most probable token without random numbers.
      shared: draft and target use the same stream (the rule `coupled`).
      by_block: the numbers also depend on `lengths`, so no two blocks have the same ones (the rule `block`).
    """

    row_keys: Key[Array, "B"]
    lengths: Int[Array, "B"]
    greedy: bool = dataclasses.field(metadata={"static": True})
    shared: bool = dataclasses.field(metadata={"static": True})
    by_block: bool = dataclasses.field(default=False, metadata={"static": True})

    def _keys(self, offsets: Int[Array, "B"] | Int[Array, ""], stream: Stream) -> Key[Array, "B"]:
        fold = jax.vmap(lambda key, position: jax.random.fold_in(jax.random.fold_in(key, position), stream))
        if not self.by_block:
            return fold(self.row_keys, self.lengths + offsets)
        keys = fold(self.row_keys, self.lengths)
        return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(offsets, self.lengths.shape))

    def uniforms(self, count: int) -> Float[Array, "B count"]:
        """Uniform numbers in [0, 1) for accepting the first `count` drafted tokens of the block."""
        if count == 0:
            return jnp.zeros((self.lengths.shape[0], 0), jnp.float32)
        at = lambda offset: jax.vmap(jax.random.uniform)(self._keys(offset, Stream.ACCEPT))
        return jax.vmap(at, out_axes=1)(jnp.arange(count, dtype=jnp.int32))

    def perturbed(self, weights: Float[Array, "B V"], offsets: Int[Array, "B"]) -> Float[Array, "B V"]:
        """Log-weights plus the Gumbel noise that draft and target share; their argmax is the rule `coupled`'s choice.

        At JAX's default resolution the noise is never large, and tokens in the tail are drawn too rarely.
        """
        draw = lambda key: jax.random.gumbel(key, weights.shape[-1:], mode="high")
        return jnp.log(weights) + jax.vmap(draw)(self._keys(offsets, Stream.SHARED))

    def choose(self, weights: Float[Array, "B V"], offsets: Int[Array, "B"], stream: Stream) -> Int[Array, "B"]:
        """Draws a token for position `lengths + offsets` with probability proportional to `weights`.

        Weights need not be normalised; a token of weight 0 is never drawn. A sharded vocabulary is not gathered.
        """
        if self.greedy or self.shared:
            scores = weights if self.greedy else self.perturbed(weights, offsets)
            return most_probable(scores)
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(self._keys(offsets, stream))
        return _draw(weights, uniforms)


# Number of blocks of ids of `_draw` (a divisor of it if the vocabulary has one), and maximum number of ids per block.
_BLOCKS, _BLOCK_SIZE = 512, 2048


def _draw(weights: Float[Array, "B V"], uniforms: Float[Array, "B 2"]) -> Int[Array, "B"]:
    """Draws an id in proportion to its weight: first a block of ids by the blocks' sums, then an id of this block.

    One cumulative sum over a large vocabulary would lose small weights to rounding. The blocks depend on V only, so the
    draw does not depend on the mesh. If the devices divide their number, no device needs the blocks of another one.
    """
    batch, vocab = weights.shape
    count = math.gcd(vocab, _BLOCKS)
    if vocab // count > _BLOCK_SIZE:
        count = _BLOCKS
        weights = jnp.pad(weights, ((0, 0), (0, -vocab % count)))
    blocks = weights.reshape(batch, count, -1)
    index = _inverse(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    if meshes.num_shards("vocab") == 1:
        block = jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]
    else:  # indexing would gather the blocks of all devices
        chosen = jnp.arange(count)[None] == index[:, None]
        block = jnp.sum(jnp.where(chosen[..., None], blocks, 0), axis=1)
    return index * blocks.shape[2] + _inverse(block, uniforms[:, 1])


def _inverse(weights: Float[Array, "B N"], uniforms: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first index at which the cumulative sum of the weights exceeds the uniform share of their total."""
    sums = jnp.cumsum(weights, axis=-1)
    reached = (sums > uniforms[:, None] * sums[:, -1:]).astype(jnp.int32)
    # Sums can be rounded differently, so a weight of 0 is excluded explicitly.
    return jnp.argmax(jnp.where(weights > 0, 1 + reached, 0), axis=-1).astype(jnp.int32)


def row_keys(seed: int, indices: Int[Array | np.ndarray, "B"]) -> Key[Array, "B"]:
    """One key for each prompt, folded from the seed and the prompt's index in the whole run.

    Raises:
      UserError: for a seed that is not in 0 .. 2**32 - 1.
    """
    checks.seed("seed", seed)
    return _row_keys(np.uint32(seed), indices)


@jax.jit
def _row_keys(seed, indices):
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(indices)
