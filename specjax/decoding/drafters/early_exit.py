"""The target's own first layers with its own head as the draft: no parameters, no second cache."""

import dataclasses

import jax
import jax.numpy as jnp

from specjax.decoding.drafters.base import Context, Outcome, Prefill, Proposal
from specjax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class EarlyExitDrafter:
    """Drafts from the hidden state after layer `exit_layer`, through the target's final norm and head.

    The shallow layers' keys and values go straight into the target's cache, and verification resumes from the
    hidden states at the exit, so no layer runs twice for a token. The last drafted token passes the shallow layers
    too, which is why nothing is missing after full acceptance.
    """

    target: LanguageModel
    exit_layer: int
    gamma: int
    taps = ()

    def init(self, params, target_params, prefill: Prefill, row_keys):
        return ()

    def propose(self, params, target_params, state, target_cache, context: Context):
        shallow = (0, self.exit_layer)

        def feed(token, cache, offset):
            positions = context.lengths[:, None] + offset - 1
            return self.target.extend(target_params, cache, token[:, None], positions, layers=shallow)

        def step(carry, offset):
            token, cache = carry
            hidden, cache = feed(token, cache, offset)
            token, probs = context.draw(self.target.head(target_params, hidden)[:, 0], offset)
            return (token, cache), (hidden[:, 0], token, probs)

        carry = (context.last_two_tokens[:, 1], target_cache)
        carry, (hidden, tokens, probs) = jax.lax.scan(step, carry, jnp.arange(self.gamma))
        last_hidden, target_cache = feed(*carry, self.gamma)
        rows = lambda stacked: jnp.moveaxis(stacked, 0, 1)
        proposal = Proposal(
            tokens=rows(tokens),
            probs=None if probs is None else rows(probs),
            num_drafted=jnp.full_like(context.lengths, self.gamma),
            resume_hidden=jnp.concatenate([rows(hidden), last_hidden], axis=1),
            resume_layer=self.exit_layer,
        )
        return proposal, state, target_cache

    def commit(self, params, state, outcome: Outcome):
        return state
