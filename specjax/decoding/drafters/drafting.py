"""Drafting token by token until a row is unsure: what drafters with probabilities have in common."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.drafters.base import Context, Proposal
from specjax.models import kv_cache
from specjax.runtime.mesh import pin_last

# first(carry) -> (logits [B, V], carry): what follows the pending token.
First = Callable[[Any], tuple[Float[Array, "B V"], Any]]

# step(tokens [B], offset, carry) -> (logits [B, V], carry): what follows these tokens, which stand at
# `lengths + offset - 1`.
Step = Callable[[Int[Array, "B"], Any, Any], tuple[Float[Array, "B V"], Any]]

# behind(tokens [B], offset, carry) -> carry: what else is done with tokens just drawn, which stand at
# `lengths + offset - 1`.
Behind = Callable[[Int[Array, "B"], Any, Any], Any]


def unsure(logits: Float[Array, "B V"], threshold: Float[Array, ""]) -> Bool[Array, "B"]:
    """Whether the largest probability at temperature 1 is below the threshold (arXiv 2404.18911, section 3.2).

    The temperature of sampling does not enter: what is cut to its best tokens would always look sure.
    """
    logits = logits.astype(jnp.float32)
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)) < threshold


def draft(
    context: Context,
    gamma: int,
    carry: Any,
    first: First,
    step: Step,
    behind: Behind = lambda tokens, offset, carry: carry,
    *,
    stops: bool,
    adjusted: bool = False,
) -> tuple[Proposal, Any]:
    """Draws a token from what `first` says, others from what `step` makes of each, until all rows are done.

    A row is done when it has gamma tokens, as many as `context.most` allows it, or stops behind a token from whose
    distribution it was unsure. That token is kept and verified, and the stop asks nothing of its value, so the output
    law is the target's whatever the threshold (traced, of `Sampling`). Rows that are done and rows that have ended run
    along; what they draft does not count. Where no row may draft, not even `first` runs.

    Args:
      stops: whether rows stop where they are unsure; otherwise confidence is not computed.
      adjusted: judges by the probabilities that tokens are drawn from, after temperature, top-k and top-p, in place of
        those at temperature 1 (arXiv 2404.18911 measures both). Greedy drafting is then never unsure.

    Returns:
      the proposal and the carry.
    """
    batch, most = context.lengths.shape[0], context.most
    ends = stops or most is not None
    own = lambda rows, carry: kv_cache.counting(carry, (rows & context.live).astype(jnp.int32))

    def turn(read, state):
        offset, token, counts, done, drafted, carry = state
        logits, carry = read(token, offset, own(~done, carry))
        token, probs = context.draw(logits, offset)
        put = lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, offset, 0)
        counts = counts + jnp.where(done, 0, 1)
        carry = behind(token, offset + 1, own(counts > offset, carry))
        if stops and not adjusted:
            done |= unsure(logits, context.sampling.threshold)
        elif stops and probs is not None:
            done |= jnp.max(probs, axis=-1) < context.sampling.threshold
        if most is not None:
            done |= counts >= most
        return offset + 1, token, counts, done, jax.tree.map(put, drafted, (token, probs)), carry

    begin = lambda token, offset, carry: first(carry)
    logits = jax.eval_shape(lambda carry: first(carry)[0], carry)
    # Spread as the draft's probabilities are: a loop would otherwise gather each before it keeps it.
    probs = None if context.noise.greedy else pin_last(jnp.zeros((gamma, *logits.shape), jnp.float32), "vocab")
    done = ~context.live if ends else jnp.zeros((batch,), bool)
    none = jnp.zeros((batch,), jnp.int32)
    state = jnp.int32(0), none, none, done, (jnp.zeros((gamma, batch), jnp.int32), probs), carry
    if most is None:
        state = turn(begin, state)
    else:
        state = (*state[:3], done | (most <= 0), *state[4:])
        # A loop of one turn at most: it hands the caches on in place, where a conditional would copy them.
        state = jax.lax.while_loop(lambda s: (s[0] == 0) & ~jnp.all(s[3]), functools.partial(turn, begin), state)
    within = lambda s: (s[0] > 0) & (s[0] < gamma)
    more = (lambda s: within(s) & ~jnp.all(s[3])) if ends else within
    _, _, counts, _, drafted, carry = jax.lax.while_loop(more, functools.partial(turn, step), state)
    tokens, probs = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drafted)
    return Proposal(tokens, probs, counts), carry


def catch_up(context: Context, width: int, feed: Callable[[Array, Array, Any], Any], carry: Any) -> Any:
    """Feeds the committed tokens from `context.fed` on, but for the last two, which the first step of a block feeds.

    A draft with a cache of its own has holes there after blocks in which no row drafted. Rows without any feed their
    last tokens once more, and what is fed beyond a row's end is rewritten before it is seen.

    Args:
      width: tokens fed at a time, at most gamma + 1, for which the caches have room.
      feed: (tokens [B, width], positions [B, width], carry) -> carry.
    """
    if context.fed is None:
        return carry
    end = context.lengths - 2

    def body(state):
        at, carry = state
        start = jnp.maximum(jnp.minimum(at, end), 0)
        missed = jnp.where(context.live, jnp.clip(end - start, 0, width), 0)
        positions = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(context.tokens, positions, axis=1)
        return start + width, feed(tokens, positions, kv_cache.counting(carry, missed))

    return jax.lax.while_loop(lambda state: jnp.any(context.live & (state[0] < end)), body, (context.fed, carry))[1]
