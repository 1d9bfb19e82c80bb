"""Heads on the target's last hidden state as the draft (Medusa-1 without a tree, arXiv 2401.10774)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.decoding.drafters.base import Context, Drafter, Outcome, Prefill, StoppingOptions
from specjax.decoding.drafters.drafting import draft
from specjax.models.language_model import LanguageModel
from specjax.models.medusa import MedusaHeads
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medusa(StoppingOptions):
    """Trained heads on the target's last hidden state as the draft."""

    loads = "attachment"

    def build(self, target: LanguageModel, gamma: int, loaded: MedusaHeads) -> "MedusaDrafter":
        if gamma > loaded.config.heads:
            raise UserError(
                f"gamma {gamma} is more than the {loaded.config.heads} Medusa heads draft; "
                f"take gamma {loaded.config.heads} or less, or train more heads"
            )
        return MedusaDrafter(target, loaded, gamma, self.stops)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LastHidden:
    """The target's last hidden state of the token before the pending one.

    Attributes:
      hidden: with its rows split, the compiler would gather whole weights for it.
    """

    hidden: Float[Array, "B 1 D"] = axes(None, None, "embed")


@dataclasses.dataclass(frozen=True)
class MedusaDrafter(Drafter):
    """Drafts the k-th token of a block from head k, all heads on one hidden state.

    The pending token is in no cache yet, so the state is that of the committed token before it, which verification has
    just computed: from it the target's own head made the pending token, and head k guesses the k-th token after that.
    The guesses are independent given the state, so each is drawn from the distribution that the rule sees. A text of
    one token has no token before the pending one: its first block reads the pending token's own state, from prefill,
    and guesses poorly.

    Attributes:
      stops: whether a row stops drafting where it is unsure.
    """

    target: LanguageModel
    heads: MedusaHeads
    gamma: int
    stops: bool = False

    @property
    def taps(self):
        return (self.target.layers,)

    def init(self, params, target_params, prefill: Prefill, row_keys) -> LastHidden:
        return _at(prefill.tap_states[0], prefill.text_lengths - 2)

    def propose(self, params, target_params, state: LastHidden, target_cache, context: Context):
        heads, params = self.heads.first(params, self.gamma)

        def first(_):
            logits = heads.head(params, self.target, target_params, state.hidden)
            return logits[:, 0], logits

        def step(tokens, offset, logits):
            return jax.lax.dynamic_index_in_dim(logits, offset, 1, keepdims=False), logits

        none = jnp.zeros((state.hidden.shape[0], self.gamma, self.target.vocab_size), jnp.float32)
        proposal, _ = draft(context, self.gamma, none, first, step, stops=self.stops)
        return proposal, state, target_cache

    def commit(self, params, state, outcome: Outcome):
        # Of the token before the one that is pending now.
        return _at(outcome.tap_states[0], outcome.num_emitted - 1)


def _at(states: Float[Array, "B T D"], index: Int[Array, "B"]) -> LastHidden:
    return LastHidden(jnp.take_along_axis(states, jnp.maximum(index, 0)[:, None, None], axis=1))
