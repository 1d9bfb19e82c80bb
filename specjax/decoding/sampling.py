"""Converts logits to adjusted probabilities, and draws tokens with random numbers keyed by prompt and position."""

import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

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

    All are traced, so changing a value does not recompile.

    Attributes:
      temperature: divides the logits; 0 is greedy, which is compiled separately (`Plan.greedy`).
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: then keep the most probable tokens whose total probability reaches p; 1 keeps all.
      lenience: epsilon of a lossy rule; smaller accepts more. Exact rules do not use it.
      threshold: drafting stops after a token whose distribution at temperature 1 has a largest probability below this.
      costs: cost of a block that drafts 0 .. gamma tokens, in any unit; None unless the draft length is adaptive.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    lenience: Float[Array, ""]
    threshold: Float[Array, ""]
    costs: Float[Array, "gamma_plus_1"] | None = None

    @classmethod
    def of(
        cls,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        *,
        lenience: float = 1.0,
        threshold: float = 0.0,
        costs: Sequence[float] | None = None,
    ) -> "Sampling":
        """Converts values to arrays. Raises UserError for a value out of range."""
        tiny = float(jnp.finfo(jnp.float32).tiny)  # devices flush smaller numbers to 0
        if temperature != 0 and not tiny <= temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or a positive number, not {temperature}.")
        if top_k < 0:
            raise UserError(f"top_k must be 0 (off) or a positive number of tokens, not {top_k}.")
        if not tiny <= top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {top_p}.")
        if not tiny <= lenience <= 1:
            raise UserError(f"lenience must lie in (0, 1], not {lenience}; 1 is the strictest, smaller accepts more.")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold must lie in [0, 1] (0: never stop drafting), not {threshold}.")
        if costs is not None and not all(0 < cost < float("inf") for cost in costs):
            raise UserError(f"the costs of blocks must be positive numbers, not {tuple(costs)}.")
        floats = map(jnp.float32, (top_p, lenience, threshold))
        block_costs = None if costs is None else jnp.asarray(costs, jnp.float32)
        return cls(jnp.float32(temperature), jnp.int32(top_k), *floats, block_costs)


def _truncate(probs: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T V"]:
    """Keeps the top-k tokens, then the top-p of these, and renormalises. All tokens tied at a cut-off are kept."""
    find_edge = _edge_by_bisection if meshes.num_shards("vocab") > 1 else _edge_by_sorting
    cut = jnp.where(probs >= find_edge(probs, sampling), probs, 0)
    return cut / jnp.sum(cut, axis=-1, keepdims=True)


def _edge_by_sorting(probs: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T 1"]:
    """The smallest probability that top-k and top-p keep."""
    vocab = probs.shape[-1]
    descending = -jnp.sort(-probs, axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    kth = jnp.take_along_axis(descending, jnp.broadcast_to(k - 1, (*probs.shape[:-1], 1)), axis=-1)
    descending = jnp.where(descending >= kth, descending, 0)
    before = jnp.cumsum(descending, axis=-1) - descending
    wanted = sampling.top_p * jnp.sum(descending, axis=-1, keepdims=True)
    inside = (before < wanted) | (sampling.top_p >= 1)  # at top_p 1, rounding must not drop any token
    return jnp.min(jnp.where(inside & (descending > 0), descending, jnp.inf), axis=-1, keepdims=True)


def _edge_by_bisection(probs: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T 1"]:
    """As `_edge_by_sorting`, but with sums only, because sorting would gather a vocabulary sharded over devices.

    The edge is the largest value such that the values at or above it are at least k, and then have a share p of the
    mass. Non-negative floats have the order of their bit patterns, so 31 bisections over these find it exactly.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def largest(enough):
        def halve(_, span):
            low, high = span
            middle = low + (high - low + 1) // 2
            fits = enough(bits >= middle)
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

        shape = (*probs.shape[:-1], 1)
        one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
        # Rounding may leave a probability just above 1.
        return jax.lax.fori_loop(0, 31, halve, (jnp.zeros(shape, jnp.int32), jnp.full(shape, one + 16)))[0]

    vocab = probs.shape[-1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    kth = largest(lambda above: jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32) >= k)
    mass = lambda above: jnp.sum(jnp.where(above & (bits >= kth), probs, 0), axis=-1, keepdims=True)
    wanted = sampling.top_p * mass(True)
    share = largest(lambda above: (mass(above) >= wanted) & (mass(above) > 0))
    edge = jnp.where(sampling.top_p >= 1, kth, jnp.maximum(share, kth))
    return jax.lax.bitcast_convert_type(edge, jnp.float32)


def probabilities(logits: Float[Array, "B T V"], sampling: Sampling, *, greedy: bool) -> Float[Array, "B T V"]:
    """The adjusted distribution: softmax at the temperature, cut to top-k, then to top-p; one-hot when greedy."""
    if greedy:
        return jax.nn.one_hot(
            jnp.argmax(meshes.pin_last(logits, "vocab"), axis=-1), logits.shape[-1], dtype=jnp.float32
        )
    logits = meshes.pin_last(logits.astype(jnp.float32), "vocab")
    # Subtract the maximum before dividing; otherwise a small temperature could overflow several logits to infinity.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    probs = jax.nn.softmax(logits / sampling.temperature, axis=-1)
    cuts = (sampling.top_k > 0) | (sampling.top_p < 1)
    return jax.lax.cond(cuts, _truncate, lambda probs, _: probs, probs, sampling)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """Random numbers of one block, a pure function of (row key, position of the token, stream).

    So a row's text does not depend on the other rows, its place in the batch or the mesh.

    Attributes:
      row_keys: one key per row, folded from the run's seed and the prompt's index.
      lengths: position of the first token that this block can emit (the number of committed tokens).
      greedy: take the most probable token without random numbers.
      shared: draft and target use the same stream (the rule `coupled`).
    """

    row_keys: Key[Array, "B"]
    lengths: Int[Array, "B"]
    greedy: bool = dataclasses.field(metadata={"static": True})
    shared: bool = dataclasses.field(metadata={"static": True})

    def _keys(self, offsets: Int[Array, "B"], stream: Stream) -> Key[Array, "B"]:
        fold = jax.vmap(lambda key, position: jax.random.fold_in(jax.random.fold_in(key, position), stream))
        return fold(self.row_keys, self.lengths + offsets)

    def uniforms(self, count: int) -> Float[Array, "B count"]:
        """Uniform numbers in [0, 1) for accepting the first `count` drafted tokens of the block."""
        draws = [
            jax.vmap(lambda key: jax.random.uniform(key, ()))(
                self._keys(jnp.full_like(self.lengths, offset), Stream.ACCEPT)
            )
            for offset in range(count)
        ]
        return jnp.stack(draws, axis=1) if draws else jnp.zeros((self.lengths.shape[0], 0), jnp.float32)

    def scores(self, weights: Float[Array, "B V"], offsets: Int[Array, "B"], stream: Stream) -> Float[Array, "B V"]:
        """Log-weights plus Gumbel noise (none when greedy): their argmax is a draw in proportion to `weights`."""
        if self.greedy:
            return jnp.log(weights)
        keys = self._keys(offsets, Stream.SHARED if self.shared else stream)
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, weights.shape[-1:]))(keys)
        return jnp.log(weights) + gumbel

    def choose(self, weights: Float[Array, "B V"], offsets: Int[Array, "B"], stream: Stream) -> Int[Array, "B"]:
        """Draws a token for position `lengths + offsets` with probability proportional to `weights`.

        Weights need not be normalised; a token of weight 0 is never drawn. A sharded vocabulary is not gathered.
        """
        if self.greedy:
            return jnp.argmax(weights, axis=-1).astype(jnp.int32)
        return jnp.argmax(self.scores(weights, offsets, stream), axis=-1).astype(jnp.int32)


def row_keys(seed: int, indices: Int[Array | np.ndarray, "B"]) -> Key[Array, "B"]:
    """One key for each prompt, folded from the seed and the prompt's index in the whole run."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(jnp.asarray(indices))
