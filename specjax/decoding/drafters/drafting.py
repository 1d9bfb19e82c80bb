"""The token-by-token drafting loop, shared by all drafters that have a distribution for each drafted token."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.drafters.base import Context, Proposal
from specjax.decoding.sampling import finite_rows
from specjax.models import kv_cache
from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime.mesh import axes, pin_last, platform

# first(carry) -> (logits [B, W], carry): the draft's logits after the pending (last committed) token.
First = Callable[[Any], tuple[Float[Array, "B W"], Any]]

# step(tokens [B], offset, carry) -> (logits [B, W], carry): the draft's logits after these tokens, the last ones drawn;
# their positions are `lengths + offset - 1`.
Step = Callable[[Int[Array, "B"], Any, Any], tuple[Float[Array, "B W"], Any]]

# after_draw(tokens [B], offset, carry) -> carry: called with the tokens just drawn, at position `lengths + offset - 1`.
AfterDraw = Callable[[Int[Array, "B"], Any, Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadState:
    """The state of a drafter that uses the target's head.

    Attributes:
      kernel: the head's rows for the ids of the drafter's `vocabulary`, gathered once per batch; None for all.
    """

    kernel: Float[Array, "W D"] | None = axes("vocab", "embed")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Draft:
    """A draft in progress.

    Attributes:
      offset: number of tokens drawn so far, the same for every row.
      token: the last token drawn in each row.
      counts: number of tokens in each row's proposal, which are the first ones drawn.
      done: whether the row's proposal is complete.
      failed: whether it ended because the draft's logits were not finite.
      tokens: all drawn tokens.
      probs: the distributions they were drawn from; None if drafting is greedy.
      carry: the drafter's own state, such as its caches.
    """

    offset: Int[Array, ""]
    token: Int[Array, "B"]
    counts: Int[Array, "B"]
    done: Bool[Array, "B"]
    failed: Bool[Array, "B"]
    tokens: Int[Array, "gamma B"]
    probs: Float[Array, "gamma B W"] | None
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
    leaves_unsure: bool = False,
    adjusted: bool = False,
    confidence: Callable[[Any, Any], Float[Array, "B"]] | None = None,
    vocabulary: DraftVocabulary | None = None,
) -> tuple[Proposal, Any]:
    """Draws each row's first token from the logits of `first`, the later ones from `step`, until all rows are done.
    Returns the proposal and the final carry.

    A row is done after gamma tokens, after `context.max_drafted` tokens, or after a token whose distribution has a
    largest probability below `Sampling.threshold`. Neither stopping nor whether that token is proposed depends on its
    value, so the output distribution is the target's at any threshold. The loop runs for the whole batch until all rows
    are done (on a GPU gamma times, unless rows have limits); tokens drawn in rows that are done are ignored. If no row
    may draft, not even `first` runs. A row whose logits are not finite is done without a further token.

    Args:
      stops: whether the threshold is used.
      leaves_unsure: whether the token below the threshold is left out of the proposal, which may then have no token.
      adjusted: compare the threshold with the probabilities after temperature, top-k and top-p instead of those at
        temperature 1 (arXiv 2404.18911 measures both). Greedy drafting then never stops early.
      confidence: (offset, carry) -> what to compare with the threshold in place of the largest probability; it must not
        depend on the token that is drawn at this offset.
      vocabulary: the ids of the columns of the logits; None if these are all ids.
    """
    limit = context.max_drafted
    # A GPU would wait for the host to read a predicate before every token, longer than a small draft takes for a token.
    may_end_early = limit is not None or (stops and platform() != "gpu")

    def draw_next(read, draft: _Draft) -> _Draft:
        """Draws one token in every row; `read(token, offset, carry)` computes the logits."""
        logits, carry = read(draft.token, draft.offset, _counting(context, ~draft.done, draft.carry))
        token, probs = context.draw(logits, draft.offset, vocabulary)
        failed = draft.failed | (~draft.done & ~finite_rows(logits))
        unsure = jnp.zeros_like(failed)
        if stops:
            sure = None if confidence is None else confidence(draft.offset, carry)
            unsure = _stopping(context, logits, probs, adjusted, sure)
        done = draft.done | failed | (unsure & leaves_unsure)
        joins = ~done  # whether the drawn token belongs to the row's proposal
        counts = draft.counts + joins.astype(jnp.int32)
        carry = after_draw(token, draft.offset + 1, _counting(context, joins, carry))
        done |= unsure
        if limit is not None:
            done |= counts >= limit
        append = lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, draft.offset, 0)
        probs = jax.tree.map(append, draft.probs, probs)
        return _Draft(draft.offset + 1, token, counts, done, failed, append(draft.tokens, token), probs, carry)

    draw_first = functools.partial(draw_next, lambda token, offset, carry: first(carry))
    progress = _empty(context, gamma, first, carry, may_end_early)
    progress = _first_drawn(draw_first, progress, limit)
    draw_next = functools.partial(draw_next, step)
    if may_end_early:
        unfinished = lambda draft: (draft.offset < gamma) & ~jnp.all(draft.done)
        progress = jax.lax.while_loop(unfinished, draw_next, progress)
    else:
        progress = jax.lax.fori_loop(1, gamma, lambda _, draft: draw_next(draft), progress)
    tokens, probs = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), (progress.tokens, progress.probs))
    failed = progress.failed & context.live
    return Proposal(tokens, probs, progress.counts, failed, vocabulary=vocabulary), progress.carry


def _first_drawn(draw: Callable[[_Draft], _Draft], progress: _Draft, limit: Int[Array, "B"] | None) -> _Draft:
    """The draft after its first token, unless no row may draft one."""
    if limit is None:
        return draw(progress)
    # A conditional: as a loop of at most one iteration it updates the caches in place; `lax.cond` copies them.
    progress = dataclasses.replace(progress, done=progress.done | (limit <= 0))
    return jax.lax.while_loop(lambda draft: (draft.offset == 0) & ~jnp.all(draft.done), draw, progress)


def draft_at_once(
    context: Context,
    gamma: int,
    carry: Any,
    run: Callable[[Any], tuple[Float[Array, "B gamma W"], Float[Array, "B gamma"] | None, Any]],
    *,
    stops: bool,
    leaves_unsure: bool = False,
    vocabulary: DraftVocabulary | None = None,
) -> tuple[Proposal, Any]:
    """`draft`, where one forward computes the logits of all tokens of the block.

    Args:
      run: carry -> (logits, confidence in each token, carry). The confidence is what the threshold is compared with;
        None compares it with the largest probability.
    """
    at = lambda rows, offset: jax.lax.dynamic_index_in_dim(rows, offset, 1, keepdims=False)
    # `first` replaces these; if no row may draft, it does not run.
    shapes = jax.eval_shape(lambda carry: run(carry)[:2], carry)
    logits, sure = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def first(carry):
        logits, sure, inner = run(carry[2])
        return logits[:, 0], (logits, sure, inner)

    def step(_, offset, carry):
        return at(carry[0], offset), carry

    confidence = None if sure is None else lambda offset, carry: at(carry[1], offset)
    how = {"stops": stops, "leaves_unsure": leaves_unsure, "confidence": confidence, "vocabulary": vocabulary}
    proposal, (*_, carry) = draft(context, gamma, (logits, sure, carry), first, step, **how)
    return proposal, carry


def _empty(context: Context, gamma: int, first: First, carry: Any, may_end_early: bool) -> _Draft:
    """A draft without tokens. Rows that have ended are done from the start if drafting can end before gamma tokens."""
    batch, none = context.lengths.shape[0], jnp.zeros_like(context.lengths)
    probs = None
    if not context.noise.greedy:
        columns = jax.eval_shape(lambda carry: first(carry)[0], carry).shape[-1]
        # Sharded like the draft's probabilities; otherwise the loop would gather each of them before storing it.
        probs = pin_last(jnp.zeros((gamma, batch, columns), jnp.float32), "vocab")
    no_row = jnp.zeros((batch,), bool)
    done = ~context.live if may_end_early else no_row
    return _Draft(jnp.int32(0), none, none, done, no_row, jnp.zeros((gamma, batch), jnp.int32), probs, carry)


def _stopping(context: Context, logits, probs, adjusted: bool, sure) -> Bool[Array, "B"]:
    """Which rows stop after a token, see `draft`. Without a head's confidence in it, the largest probability counts.

    By default that is the one at temperature 1; after top-k and top-p the largest probability is often near 1.
    """
    if sure is None and adjusted:
        return jnp.zeros_like(context.live) if probs is None else jnp.max(probs, axis=-1) < context.sampling.threshold
    if sure is None:
        logits = logits.astype(jnp.float32)
        sure = jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
    return sure < context.sampling.threshold


def _counting(context: Context, rows: Bool[Array, "B"], carry: Any) -> Any:
    """Sets the layer meters in the carry to count one token for each of these rows, except rows that have ended."""
    return kv_cache.counting(carry, (rows & context.live).astype(jnp.int32))


def catch_up(
    context: Context, width: int, feed: Callable[[Array, Array, Any], Any], carry: Any, *, again: int = 0
) -> Any:
    """Runs the draft on committed tokens that its cache lacks, from `context.first_missing` to the third-last one.

    It does so for rows that draft in this block; tokens are missing after blocks in which they did not. The last two
    are left to the next drafting step. Other rows recompute some of their last tokens; slots written past a row's end
    are rewritten before they are read.

    Args:
      width: tokens per call of `feed`; at most gamma + 1, because the caches have room for that many past the end.
      feed: (tokens [B, width], positions [B, width], carry) -> carry.
      again: number of tokens before the missing ones, if there are any, on which the draft runs again.
    """
    if context.first_missing is None:
        return carry
    end, rows = context.lengths - 2, context.live & (context.max_drafted > 0)
    lacks = rows & (context.first_missing < end)
    first = jnp.where(lacks, jnp.maximum(context.first_missing - again, 0), end)

    def feed_next(state):
        start, carry = state
        start = jnp.maximum(jnp.minimum(start, end), 0)
        missing = jnp.where(lacks, jnp.clip(end - start, 0, width), 0)
        positions = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(context.tokens, positions, axis=1)
        return start + width, feed(tokens, positions, kv_cache.counting(carry, missing))

    missing = lambda state: jnp.any(lacks & (state[0] < end))
    _, carry = jax.lax.while_loop(missing, feed_next, (first, carry))
    return _counting(context, rows, carry)
