"""Drafting token by token until a row is unsure: what drafters with probabilities have in common."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.drafters.base import Context, Proposal
from specjax.models import kv_cache
from specjax.runtime.mesh import pin_last

# first(carry) -> (logits [B, V], carry): the draft's logits after the pending token.
First = Callable[[Any], tuple[Float[Array, "B V"], Any]]

# step(tokens [B], offset, carry) -> (logits [B, V], carry): the draft's logits after these tokens, whose positions are
# `lengths + offset - 1`.
Step = Callable[[Int[Array, "B"], Any, Any], tuple[Float[Array, "B V"], Any]]

# after_draw(tokens [B], offset, carry) -> carry: called with the tokens just drawn, at `lengths + offset - 1`.
AfterDraw = Callable[[Int[Array, "B"], Any, Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Draft:
    """A draft in progress.

    Attributes:
      offset: tokens drawn so far in every row, those that do not count included.
      token: the last one drawn.
      counts: tokens of each row that count.
      done: rows whose draft is complete.
      tokens: all drawn tokens.
      probs: the distributions they were drawn from; None where drafting is greedy.
      carry: the drafter's caches.
    """

    offset: Int[Array, ""]
    token: Int[Array, "B"]
    counts: Int[Array, "B"]
    done: Bool[Array, "B"]
    tokens: Int[Array, "gamma B"]
    probs: Float[Array, "gamma B V"] | None
    carry: Any


def draft(
    context: Context,
    gamma: int,
    carry: Any,
    first: First,
    step: Step,
    after_draw: AfterDraw = lambda tokens, offset, carry: carry,
    *,
    stops: bool,
    adjusted: bool = False,
) -> tuple[Proposal, Any]:
    """Draws a first token from the logits of `first`, and each later one from those of `step`, until all rows are done.

    A row is done when it has gamma tokens, or `context.max_drafted`, or after a token from whose distribution it was
    unsure. That token is still proposed and verified, and the stop does not depend on its value, so the output law is
    the target's whatever the threshold (`Sampling.threshold`, traced). Rows that are done or have ended run along, and
    their further tokens do not count. If no row may draft, not even `first` runs.

    Args:
      stops: whether rows stop where they are unsure; if not, confidence is not computed.
      adjusted: judge by the probabilities that tokens are drawn from, after temperature, top-k and top-p, in place of
        those at temperature 1 (arXiv 2404.18911 measures both). Greedy drafting is then never unsure.

    Returns:
      the proposal and the carry.
    """
    limit = context.max_drafted

    def draw_next(read, draft: _Draft) -> _Draft:
        """Draws one token of every row from the logits of `read`."""
        logits, carry = read(draft.token, draft.offset, _counting(context, ~draft.done, draft.carry))
        token, probs = context.draw(logits, draft.offset)
        counts = draft.counts + jnp.where(draft.done, 0, 1)
        carry = after_draw(token, draft.offset + 1, _counting(context, counts > draft.offset, carry))
        done = draft.done
        if stops and not adjusted:
            done |= unsure(logits, context.sampling.threshold)
        elif stops and probs is not None:
            done |= jnp.max(probs, axis=-1) < context.sampling.threshold
        if limit is not None:
            done |= counts >= limit
        append = lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, draft.offset, 0)
        probs = jax.tree.map(append, draft.probs, probs)
        return _Draft(draft.offset + 1, token, counts, done, append(draft.tokens, token), probs, carry)

    def unfinished(draft: _Draft) -> Bool[Array, ""]:
        inside = (draft.offset > 0) & (draft.offset < gamma)
        return inside & ~jnp.all(draft.done) if stops or limit is not None else inside

    draw_first = functools.partial(draw_next, lambda token, offset, carry: first(carry))
    progress = _empty(context, gamma, first, carry, may_end_early=stops or limit is not None)
    if limit is None:
        progress = draw_first(progress)
    else:
        # Where no row may draft, nothing runs. A loop of at most one turn updates the caches in place; `lax.cond` would
        # copy them.
        progress = dataclasses.replace(progress, done=progress.done | (limit <= 0))
        may_draft = lambda draft: (draft.offset == 0) & ~jnp.all(draft.done)
        progress = jax.lax.while_loop(may_draft, draw_first, progress)
    progress = jax.lax.while_loop(unfinished, functools.partial(draw_next, step), progress)
    tokens, probs = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), (progress.tokens, progress.probs))
    return Proposal(tokens, probs, progress.counts), progress.carry


def _empty(context: Context, gamma: int, first: First, carry: Any, *, may_end_early: bool) -> _Draft:
    """A draft without tokens. Rows that have ended are done, unless the draft has gamma tokens in any case."""
    batch, none = context.lengths.shape[0], jnp.zeros_like(context.lengths)
    probs = None
    if not context.noise.greedy:
        vocab = jax.eval_shape(lambda carry: first(carry)[0], carry).shape[-1]
        # Split as the draft's probabilities are; the loop would otherwise gather each before it stores it.
        probs = pin_last(jnp.zeros((gamma, batch, vocab), jnp.float32), "vocab")
    done = ~context.live if may_end_early else jnp.zeros((batch,), bool)
    return _Draft(jnp.int32(0), none, none, done, jnp.zeros((gamma, batch), jnp.int32), probs, carry)


def _counting(context: Context, rows: Bool[Array, "B"], carry: Any) -> Any:
    """The carry with meters that count one token of each of these rows that is live."""
    return kv_cache.counting(carry, (rows & context.live).astype(jnp.int32))


def unsure(logits: Float[Array, "B V"], threshold: Float[Array, ""]) -> Bool[Array, "B"]:
    """Whether the largest probability at temperature 1 is below the threshold (arXiv 2404.18911, section 3.2).

    The temperature of sampling does not enter: a distribution that is cut to its best tokens would always look sure.
    """
    logits = logits.astype(jnp.float32)
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)) < threshold


def catch_up(context: Context, width: int, feed: Callable[[Array, Array, Any], Any], carry: Any) -> Any:
    """Feeds the committed tokens from `context.first_missing` on, except the last two: the next step feeds those.

    A draft with a cache of its own lacks tokens after blocks in which no row drafted. Rows that lack none feed their
    last tokens again, and what is fed beyond a row's end is rewritten before a query sees it.

    Args:
      width: tokens fed at a time, at most gamma + 1, for which the caches have room.
      feed: (tokens [B, width], positions [B, width], carry) -> carry.
    """
    if context.first_missing is None:
        return carry
    end = context.lengths - 2

    def feed_next(state):
        start, carry = state
        start = jnp.maximum(jnp.minimum(start, end), 0)
        missing = jnp.where(context.live, jnp.clip(end - start, 0, width), 0)
        positions = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(context.tokens, positions, axis=1)
        return start + width, feed(tokens, positions, kv_cache.counting(carry, missing))

    missing = lambda state: jnp.any(context.live & (state[0] < end))
    return jax.lax.while_loop(missing, feed_next, (context.first_missing, carry))[1]
