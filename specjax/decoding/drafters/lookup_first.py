"""Prompt lookup where the text has a match, and a drafter with a head in the other blocks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.decoding.drafters.base import Chunk, Context, Drafter, Outcome, Prompts, Proposal
from specjax.decoding.drafters.ngram import NGramDrafter
from specjax.decoding.drafters.wrapping import Missing, Wrapping
from specjax.runtime.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupState:
    """The states of both drafters, and the tokens on which the inner one has not run."""

    inner: Any
    lookup: Any
    missing: Missing


@dataclasses.dataclass(frozen=True)
class LookupFirstDrafter(Wrapping):
    """Drafts what `lookup` finds, up to gamma tokens, and in rows without a match what the inner drafter drafts.

    Which of them drafts depends on committed tokens alone, so the output distribution is the target's. The inner
    drafter does not run in a block in which every row has a match; it catches up in a later one.

    Attributes:
      inner: the drafter with a head; its gamma may be smaller.
      threshold: that of `lookup`.
    """

    lookup: NGramDrafter
    threshold: float
    stops = True

    @classmethod
    def around(cls, inner: Drafter, gamma: int, threshold: float, encodes: bool) -> "LookupFirstDrafter":
        """The drafter, with the defaults of `NGram`.

        Args:
          encodes: whether the target is an encoder-decoder.

        Raises:
          UserError: if the target's verification resumes from the inner drafter's states, which are those of its own
            tokens.
        """
        if inner.resumes:
            raise UserError(
                "lookup needs a draft with states of its own, and this one shares the target's first layers; "
                "leave lookup out, or take another drafter"
            )
        return cls.of(inner, gamma, NGramDrafter.usual(gamma, encodes=encodes, stops=True), threshold)

    def start(self, params, target_params, prompts: Prompts) -> LookupState:
        inner = self.inner.start(params, target_params, prompts)
        lookup = self.lookup.start(params, target_params, prompts)
        return LookupState(inner, lookup, Missing.nothing(prompts.lengths.shape[0]))

    def prefill(self, params, target_params, state: LookupState, chunk: Chunk) -> LookupState:
        inner = self.inner.prefill(params, target_params, state.inner, chunk)
        return dataclasses.replace(state, inner=inner, missing=state.missing.after_chunk(chunk))

    def propose(self, params, target_params, state: LookupState, target_cache, context: Context):
        sampling = dataclasses.replace(context.sampling, threshold=jnp.float32(self.threshold))
        looking = dataclasses.replace(context, sampling=sampling)
        found, _, _ = self.lookup.propose(params, target_params, state.lookup, target_cache, looking)
        limit = jnp.full_like(context.lengths, self.gamma) if context.max_drafted is None else context.max_drafted
        matched = found.num_drafted > 0
        others = jnp.where(matched, 0, jnp.minimum(limit, self.inner.gamma))
        missing = state.missing.at(context.lengths)
        context = dataclasses.replace(context, max_drafted=others, first_missing=missing)
        drafted, inner, cache = self.inner.propose(params, target_params, state.inner, target_cache, context)
        missing = state.missing.after_block(others > 0, context.lengths)
        proposal = self._joined(found, drafted, matched, limit)
        return proposal, LookupState(inner, state.lookup, missing), cache

    def _joined(self, found: Proposal, drafted: Proposal, matched, limit) -> Proposal:
        """`found` in the rows that match, and `drafted` in the others."""
        pad = lambda rows: jnp.pad(rows, ((0, 0), (0, self.gamma - self.inner.gamma), *[(0, 0)] * (rows.ndim - 2)))
        return dataclasses.replace(
            drafted,
            tokens=jnp.where(matched[:, None], found.tokens, pad(drafted.tokens)),
            probs=None if drafted.probs is None else pad(drafted.probs),
            one_hot=None if drafted.probs is None else matched,
            num_drafted=jnp.where(matched, jnp.minimum(found.num_drafted, limit), drafted.num_drafted),
            failed=None if drafted.failed is None else drafted.failed & ~matched,
        )

    def commit(self, params, state: LookupState, outcome: Outcome) -> LookupState:
        return dataclasses.replace(state, inner=self.inner.commit(params, state.inner, outcome))
