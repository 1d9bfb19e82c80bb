"""The target's own first layers with its own head as the draft: no parameters, no second cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.decoding.drafters.base import Context, Drafter, StoppingOptions
from specjax.decoding.drafters.drafting import draft
from specjax.models.language_model import LanguageModel, consecutive
from specjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExit(StoppingOptions):
    """The target's first layers as the draft.

    Attributes:
      exit_layer: how many of them.
      adjusted: compare the threshold with the probabilities after temperature, top-k and top-p, not at temperature 1.
    """

    exit_layer: int = 1
    adjusted: bool = False

    def build(self, target: LanguageModel, gamma: int, loaded: None) -> "EarlyExitDrafter":
        if not 1 <= self.exit_layer < target.layers:
            raise UserError(f"exit_layer must lie in 1 .. {target.layers - 1} for this target, not {self.exit_layer}")
        return EarlyExitDrafter(target, self.exit_layer, gamma, self.stops, self.adjusted)


@dataclasses.dataclass(frozen=True)
class EarlyExitDrafter(Drafter):
    """Drafts from the hidden state after layer `exit_layer`, through the target's final norm and head.

    The shallow layers' keys and values go straight into the target's cache, and verification resumes from the
    hidden states at the exit, so no layer runs twice for a token. The last drafted token passes the shallow layers
    too, which is why nothing is missing after full acceptance.

    Attributes:
      stops: whether a row stops drafting where it is unsure.
      adjusted: whether confidence is that after temperature, see `draft`.
    """

    target: LanguageModel
    exit_layer: int
    gamma: int
    stops: bool = False
    adjusted: bool = False
    scores = True

    def caught_up(self, params, target_params, state, target_cache, context: Context):
        """State and cache with what the drafter missed while no row drafted: here it keeps nothing of its own."""
        return state, target_cache

    def read_first(self, params, target_params, state, hidden: Float[Array, "B 1 D"], context: Context):
        """Logits `[B, V]` that follow the pending token, and the state."""
        return self.read(params, target_params, state, hidden, context.lengths[:, None] - 1)

    def read(self, params, target_params, state: Any, hidden: Float[Array, "B 1 D"], positions):
        """Logits `[B, V]` that follow the tokens at `positions` [B, 1], and the state."""
        return self.target.head(target_params, hidden)[:, 0], state

    def advanced(self, state: Any, hidden: Float[Array, "B gamma_plus_1 D"]) -> Any:
        """The state behind a proposal, of which these are the states at the exit."""
        return state

    def propose(self, params, target_params, state, target_cache, context: Context):
        first_position = context.lengths[:, None] - 1

        def feed(tokens, offset, cache):
            positions = first_position + offset
            return self.target.extend(target_params, cache, tokens[:, None], positions, layers=(0, self.exit_layer))

        def put(exits, hidden, offset):
            return jax.lax.dynamic_update_slice_in_dim(exits, hidden, offset, 1)

        def first(carry):
            state, cache, exits = carry
            state, cache = self.caught_up(params, target_params, state, cache, context)
            logits, state = self.read_first(params, target_params, state, exits[:, :1], context)
            return logits, (state, cache, exits)

        def step(tokens, offset, carry):
            state, cache, exits = carry
            hidden = jax.lax.dynamic_slice_in_dim(exits, offset, 1, 1)
            logits, state = self.read(params, target_params, state, hidden, first_position + offset)
            return logits, (state, cache, exits)

        def behind(tokens, offset, carry):
            state, cache, exits = carry
            hidden, cache = feed(tokens, offset, cache)
            return state, cache, put(exits, hidden, offset)

        hidden, target_cache = feed(context.last_two_tokens[:, 1], 0, target_cache)
        carry = state, target_cache, jnp.pad(hidden, ((0, 0), (0, self.gamma), (0, 0)))
        how = {"stops": self.stops, "adjusted": self.adjusted}
        proposal, (state, target_cache, exits) = draft(context, self.gamma, carry, first, step, behind, **how)
        proposal = dataclasses.replace(proposal, resume_hidden=exits, resume_layer=self.exit_layer)
        return proposal, self.advanced(state, exits), target_cache

    def score(self, params, target_params, texts: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits that follow every token of whole texts, without any cache: what drafting would have said there."""
        return self.target.head(target_params, self.exits_of(target_params, texts))

    def exits_of(self, target_params, texts: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The target's states at the exit."""
        span = (0, self.exit_layer)
        return self.target.extend(target_params, None, texts, consecutive(texts), layers=span)[0]
