"""Early exit: the target's first layers, followed by its own head, as the draft; no parameters and no second cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.decoding.drafters.base import Context, Drafter, HeadOptions, Prompts
from specjax.decoding.drafters.drafting import HeadState, draft
from specjax.models.language_model import LanguageModel, consecutive
from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExit(HeadOptions):
    """Options of early exit.

    Attributes:
      exit_layer: number of the target's layers that the draft consists of.
      adjusted: compare the threshold with the probabilities after temperature, top-k and top-p, not at temperature 1.
    """

    exit_layer: int = 1
    adjusted: bool = False

    def build(self, target: LanguageModel, gamma: int, loaded: None) -> "EarlyExitDrafter":
        if not 1 <= self.exit_layer < target.layers:
            raise UserError(f"exit_layer must lie in 1 .. {target.layers - 1} for this target, not {self.exit_layer}")
        how = {"stops": self.stops, "adjusted": self.adjusted, "vocabulary": self.vocabulary}
        return EarlyExitDrafter(target, self.exit_layer, gamma, **how)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """The state of drafting within one block.

    Attributes:
      state: the drafter's state.
      cache: the target's cache, of which drafting writes the first layers.
      hidden: the states after layer `exit_layer`, of the pending token and of every token drafted so far.
    """

    state: Any
    cache: Any
    hidden: Float[Array, "B gamma_plus_1 D"]


@dataclasses.dataclass(frozen=True)
class EarlyExitDrafter(Drafter):
    """Drafts from the hidden state after layer `exit_layer`, through the target's final norm and head.

    The first layers write their keys and values into the target's own cache, and verification resumes from their hidden
    states, so no layer runs twice on a token. The first layers also run on the last drafted token, so the cache is
    complete even if all tokens are accepted.

    A subclass can put a network between the first layers and the head by overriding the methods below `propose`.

    Attributes:
      adjusted: whether the threshold is compared with the probability after temperature, top-k and top-p, see `draft`.
      vocabulary: the ids to which the head is restricted; None for all.
    """

    target: LanguageModel
    exit_layer: int
    gamma: int
    stops: bool = False
    adjusted: bool = False
    vocabulary: DraftVocabulary | None = None
    scores = True
    resumes = True

    def with_head(self, target_params, kernel: Float[Array, "W D"] | None) -> tuple[LanguageModel, Any]:
        """The target with the draft's head, and its parameters."""
        return self.target.reduced(self.vocabulary), self.target.reduced_params(target_params, kernel)

    def start(self, params, target_params, prompts: Prompts) -> Any:
        return HeadState(self.target.head_kernel(target_params, self.vocabulary))

    def propose(self, params, target_params, state, target_cache, context: Context):
        pending_position = context.lengths[:, None] - 1

        def first_layers(tokens, offset, cache):
            """Runs the target's first layers on one token per row; returns hidden states `[B, 1, D]` and the cache."""
            positions = pending_position + offset
            return self.target.extend(target_params, cache, tokens[:, None], positions, layers=(0, self.exit_layer))

        def first(carry: _Carry):
            state, cache = self.with_missing(params, target_params, carry.state, carry.cache, context)
            logits, state = self.first_logits(params, target_params, state, carry.hidden[:, :1], context)
            return logits, dataclasses.replace(carry, state=state, cache=cache)

        def step(_, offset, carry: _Carry):  # `after_draw` has run the first layers on the last token
            hidden = jax.lax.dynamic_slice_in_dim(carry.hidden, offset, 1, 1)
            logits, state = self.logits(params, target_params, carry.state, hidden, pending_position + offset)
            return logits, dataclasses.replace(carry, state=state)

        def after_draw(tokens, offset, carry: _Carry):
            new, cache = first_layers(tokens, offset, carry.cache)
            hidden = jax.lax.dynamic_update_slice_in_dim(carry.hidden, new, offset, 1)
            return dataclasses.replace(carry, cache=cache, hidden=hidden)

        hidden, target_cache = first_layers(context.last_two_tokens[:, 1], 0, target_cache)
        carry = _Carry(state, target_cache, jnp.pad(hidden, ((0, 0), (0, self.gamma), (0, 0))))
        how = {**self.ends, "adjusted": self.adjusted, "vocabulary": self.vocabulary}
        proposal, carry = draft(context, self.gamma, carry, first, step, after_draw, **how)
        proposal = dataclasses.replace(proposal, resume_hidden=carry.hidden, resume_layer=self.exit_layer)
        return proposal, carry.state, carry.cache

    def with_missing(self, params, target_params, state, target_cache, context: Context):
        """Adds tokens committed while no row drafted to the draft's own cache; here there is none to update."""
        return state, target_cache

    def first_logits(self, params, target_params, state, hidden: Float[Array, "B 1 D"], context: Context):
        """Logits `[B, W]` after the pending token, from its state after the first layers, and the drafter's state."""
        return self.logits(params, target_params, state, hidden, context.lengths[:, None] - 1)

    def logits(self, params, target_params, state: Any, hidden: Float[Array, "B 1 D"], positions):
        """Logits `[B, W]` after the tokens at `positions` [B, 1], from their states, and the drafter's state."""
        model, params = self.with_head(target_params, state.kernel)
        return model.column_logits(params, hidden)[:, 0], state

    def score(self, params, target_params, texts, prompt_lengths):
        kernel = self.target.head_kernel(target_params, self.vocabulary)
        model, params = self.with_head(target_params, kernel)
        return model.head(params, self.hidden_of(target_params, texts, prompt_lengths))

    def hidden_of(
        self, target_params, texts: Int[Array, "B T"], prompt_lengths: Int[Array, "B"]
    ) -> Float[Array, "B T D"]:
        """The target's hidden states after layer `exit_layer`, of whole texts."""
        cache = self.target.start(target_params, texts, prompt_lengths, texts.shape[1])
        return self.target.extend(target_params, cache, texts, consecutive(texts), layers=(0, self.exit_layer))[0]
