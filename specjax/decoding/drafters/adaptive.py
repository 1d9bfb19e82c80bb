"""A draft length that each row picks block by block, from what was accepted so far and from what blocks cost."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.drafters.base import Context, Drafter, Outcome, Prefill
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import axes

# How much weight earlier blocks retain after each block: about the last twenty decide.
_MEMORY = 0.95
# Tokens that count as drafted and accepted before any were: lengths without evidence look good, and so are tried.
_HOPE = 2.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
    """What each row has observed.

    Attributes:
      inner: the state of the drafter whose length is picked.
      reached: how often position i of a block was drafted and all before it were accepted, fading.
      accepted: how often it was then accepted, fading.
      drafted: tokens of the block that is being verified.
      first_missing: position of the row's first token that the inner drafter may not have been run on.
      ran: whether it ran in the last block: for some row of the batch.
    """

    inner: Any
    reached: Float[Array, "B gamma"] = axes("batch", None)
    accepted: Float[Array, "B gamma"] = axes("batch", None)
    drafted: Int[Array, "B"] = axes("batch")
    first_missing: Int[Array, "B"] = axes("batch")
    ran: Bool[Array, ""] = axes()


def best_lengths(
    reached: Float[Array, "B gamma"], accepted: Float[Array, "B gamma"], costs: Float[Array, "gamma_plus_1"]
) -> Int[Array, "B"]:
    """For each row the number of drafted tokens, 0 .. gamma, with the most expected tokens for the cost of the block.

    The acceptance rate of position i is estimated from its own counts and, as far as these are few, from the row's rate
    over all positions; a row without any counts is taken to accept everything:

        row = (sum accepted + h) / (sum reached + h),   share_i = (accepted_i + h * row) / (reached_i + h)

    A block of g tokens emits 1 + share_1 + share_1 share_2 + .. tokens (positions are taken to be independent).
    """
    row = (jnp.sum(accepted, axis=1, keepdims=True) + _HOPE) / (jnp.sum(reached, axis=1, keepdims=True) + _HOPE)
    shares = (accepted + _HOPE * row) / (reached + _HOPE)
    further = jnp.cumsum(jnp.cumprod(shares, axis=1), axis=1)
    emitted = 1 + jnp.pad(further, ((0, 0), (1, 0)))
    return jnp.argmax(emitted / costs[None], axis=1).astype(jnp.int32)


def block_costs(draft: float, column: float, gamma: int) -> tuple[float, ...]:
    """Costs of blocks that draft 0 .. gamma tokens, relative to a plain step, where each token costs the same.

    Args:
      draft: a drafted token.
      column: one more column of verification.

    Raises:
      UserError: for costs that are not positive.
    """
    if not (draft > 0 and column > 0):
        raise UserError(
            f"costs are those of a drafted token and of verifying it, relative to a plain step, and positive; "
            f"not {draft} and {column}."
        )
    return tuple(1 + drafted * (draft + column) for drafted in range(gamma + 1))


@dataclasses.dataclass(frozen=True)
class AdaptiveDrafter(Drafter):
    """Lets another drafter draft as many tokens as have paid off so far, or none.

    Evidence fades, so a row that has stopped drafting tries again after a while, rarely enough to cost little.
    Where drafting does not pay even if everything is accepted, it never does. Where no row of the batch drafts, the
    inner drafter does not run; `Context.first_missing` then says from which token on its cache has to be filled.

    Law: the number is fixed before the block, by what the row emitted and how much of it was accepted, so a block is an
    exact one of that length. Positions after a rejection never count as evidence: their noise is drawn again in the
    next block, whose tokens must not depend on it. Each row picks by itself, and its text depends on no other row; a
    batch pays for its longest block. Sampled text depends on the costs (its law does not), and measured costs differ
    from run to run.

    Attributes:
      inner: the drafter whose length is picked.
    """

    inner: Drafter
    gamma: int
    stops = True
    idles = True

    @property
    def taps(self):
        return self.inner.taps

    def init(self, params, target_params, prefill: Prefill, row_keys):
        batch = prefill.lengths.shape[0]
        nothing, none = jnp.zeros((batch, self.gamma), jnp.float32), jnp.zeros((batch,), jnp.int32)
        inner = self.inner.init(params, target_params, prefill, row_keys)
        return Evidence(inner, nothing, nothing, none, none, jnp.ones((), bool))

    def propose(self, params, target_params, state: Evidence, target_cache, context: Context):
        if context.sampling.costs is None:
            raise ValueError("An adaptive draft length needs the costs of blocks: Sampling.of(..., costs=...).")
        lengths = best_lengths(state.reached, state.accepted, context.sampling.costs)
        # After a block in which it ran, its cache lacks only the tokens that the first step of the next block feeds.
        first_missing = jnp.where(state.ran, context.lengths - 2, state.first_missing)
        context = dataclasses.replace(context, max_drafted=lengths, first_missing=first_missing)
        proposal, inner, target_cache = self.inner.propose(params, target_params, state.inner, target_cache, context)
        drafted = jnp.where(context.live, jnp.minimum(proposal.num_drafted, lengths), 0)
        proposal = dataclasses.replace(proposal, num_drafted=drafted)
        ran = jnp.any(context.live & (lengths > 0))
        state = Evidence(inner, state.reached, state.accepted, drafted, first_missing, ran)
        return proposal, state, target_cache

    def commit(self, params, state: Evidence, outcome: Outcome):
        index, accepted = jnp.arange(self.gamma, dtype=jnp.int32)[None], outcome.num_accepted[:, None]
        reached = (index < state.drafted[:, None]) & (index <= accepted)
        return dataclasses.replace(
            state,
            inner=self.inner.commit(params, state.inner, outcome),
            reached=_MEMORY * state.reached + reached.astype(jnp.float32),
            accepted=_MEMORY * state.accepted + (reached & (index < accepted)).astype(jnp.float32),
        )
