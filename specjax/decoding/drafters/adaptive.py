"""An adaptive draft length: each block of a batch has the width that pays, by past acceptance and costs of blocks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.drafters.base import Chunk, Context, Outcome, Prompts
from specjax.decoding.drafters.wrapping import Missing, Wrapping
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import axes

# Factor on the counts after each block, so that about the last 20 blocks matter.
_MEMORY = 0.95
# Pseudo-count: as many accepted tokens are assumed before any were drafted, so that untried lengths are tried.
_HOPE = 2.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
    """State of an adaptive drafter: exponentially weighted counts of each row, and the inner drafter's state.

    Attributes:
      inner: state of the inner drafter.
      reached: weighted number of blocks that drafted position i and accepted all positions before it.
      accepted: weighted number of these blocks that also accepted position i.
      drafted: number of drafted tokens in the block that is being verified.
      missing: the tokens on which the inner drafter, which does not run if no row of the batch drafts, has not run.
    """

    inner: Any
    reached: Float[Array, "B gamma"] = axes("batch", None)
    accepted: Float[Array, "B gamma"] = axes("batch", None)
    drafted: Int[Array, "B"] = axes("batch")
    missing: Missing


def best_width(
    reached: Float[Array, "B gamma"],
    accepted: Float[Array, "B gamma"],
    live: Bool[Array, "B"],
    available: Int[Array, "B"],
    costs: Float[Array, "gamma_plus_1"],
) -> Int[Array, ""]:
    """The number of drafted tokens g in 0 .. gamma of the next block of a batch; 0 is a plain decoding step.

    It maximises the expected emitted tokens of all live rows / cost of the block of the batch. Row b drafts
    min(g, available_b) tokens, because more columns in a row cost nothing once another row needs them.

    The acceptance rate share_bi of position i is its observed rate in the row, shrunk towards the row's rate over all
    positions, which is shrunk towards the rate of all other rows, and that towards 1 (h is the pseudo-count `_HOPE`):

        others_b = (sum of the other rows' accepted + h) / (sum of the other rows' reached + h)
        row_b = (sum_i accepted_bi + h * others_b) / (sum_i reached_bi + h)
        share_bi = (accepted_bi + h * row_b) / (reached_bi + h)

    With independent positions, row b emits 1 + share_b1 + .. + share_b1 * .. * share_bg tokens on average.
    """
    by_row = lambda counts: jnp.sum(counts, axis=1, keepdims=True)
    others = lambda counts: jnp.sum(counts) - by_row(counts) + _HOPE
    row = (by_row(accepted) + _HOPE * others(accepted) / others(reached)) / (by_row(reached) + _HOPE)
    can_draft = jnp.arange(reached.shape[1])[None] < available[:, None]
    shares = jnp.where(can_draft, (accepted + _HOPE * row) / (reached + _HOPE), 0)
    further = jnp.cumsum(jnp.cumprod(shares, axis=1), axis=1)
    emitted = jnp.where(live[:, None], 1 + jnp.pad(further, ((0, 0), (1, 0))), 0)
    return jnp.argmax(jnp.sum(emitted, axis=0) / costs).astype(jnp.int32)


def block_costs(draft: float, column: float, gamma: int) -> tuple[float, ...]:
    """Costs of blocks that draft 0 .. gamma tokens, relative to a plain decoding step; linear in the draft length.

    Args:
      draft: cost of drafting one token.
      column: cost of verifying one more token.

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
class AdaptiveDrafter(Wrapping):
    """Wraps another drafter and lets it draft as many tokens in each block, 0 .. gamma, as `best_width` computes.

    Counts decay, so a batch that has stopped drafting occasionally tries again; it never drafts if that would be slower
    even with all tokens accepted. If no row of the batch drafts, the inner drafter does not run, and in a later block
    `Context.first_missing` tells it from which token on to fill its cache.

    The output distribution is unchanged, because the width is fixed before the block by emitted tokens and acceptance
    of all rows. Positions after a rejection are not counted: the next block draws new tokens there with the same
    random numbers, so they must not influence its width. At a fixed seed and a temperature above 0, text under
    `lossless` depends on the costs, which differ between runs if they are measured, and on the other rows of the batch.
    """

    stops = True
    idles = True

    def start(self, params, target_params, prompts: Prompts):
        batch = prompts.lengths.shape[0]
        nothing, none = jnp.zeros((batch, self.gamma), jnp.float32), jnp.zeros((batch,), jnp.int32)
        inner = self.inner.start(params, target_params, prompts)
        return Evidence(inner, nothing, nothing, none, Missing.nothing(batch))

    def prefill(self, params, target_params, state: Evidence, chunk: Chunk):
        inner = self.inner.prefill(params, target_params, state.inner, chunk)
        # A text that continues another one starts without its evidence, as a call without the earlier caches does.
        nothing = jnp.zeros_like(state.reached)
        missing = state.missing.after_chunk(chunk)
        return dataclasses.replace(state, inner=inner, reached=nothing, accepted=nothing, missing=missing)

    def propose(self, params, target_params, state: Evidence, target_cache, context: Context):
        if context.sampling.block_costs is None:
            raise ValueError("An adaptive draft length needs the costs of blocks: Sampling.of(..., block_costs=...).")
        draft = functools.partial(self.inner.propose, params, target_params, state.inner, target_cache)
        looked_up = draft(context) if self.inner.looks_up else None
        available = looked_up[0].num_drafted if looked_up else jnp.full_like(context.lengths, self.gamma)
        width = best_width(state.reached, state.accepted, context.live, available, context.sampling.block_costs)
        lengths = jnp.minimum(width, available)
        first_missing = state.missing.at(context.lengths)
        context = dataclasses.replace(context, max_drafted=lengths, first_missing=first_missing)
        proposal, inner, target_cache = looked_up or draft(context)
        drafted = jnp.where(context.live, jnp.minimum(proposal.num_drafted, lengths), 0)
        proposal = dataclasses.replace(proposal, num_drafted=drafted)
        missing = state.missing.after_block(lengths > 0, context.lengths)
        state = Evidence(inner, state.reached, state.accepted, drafted, missing)
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
