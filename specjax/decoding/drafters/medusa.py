"""Medusa-1 without a tree (arXiv 2401.10774): heads on the target's last hidden state as the draft."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.decoding.drafters.base import Chunk, Context, Drafter, HeadOptions, Outcome, Prompts
from specjax.decoding.drafters.drafting import draft_at_once
from specjax.models.language_model import LanguageModel
from specjax.models.medusa import MedusaHeads
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medusa(HeadOptions):
    """Options of Medusa."""

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
      hidden: the state. Its rows are not sharded, because the compiler would gather complete weights to compute it.
      kernel: see `HeadState`; None also if the heads have their own projections.
    """

    hidden: Float[Array, "B 1 D"] = axes(None, None, "embed")
    kernel: Float[Array, "W D"] | None = axes("vocab", "embed")


@dataclasses.dataclass(frozen=True)
class MedusaDrafter(Drafter):
    """Drafts the k-th token of a block with head k; all heads read one hidden state.

    The target has not run on the pending token yet, so the state is that of the token before it, from the last
    verification. The target's own head predicts the pending token from this state, and head k the k-th token after it.
    Given the state the drafted tokens are independent. If the text has one token, there is no such state, and the first
    block drafts from zeros.
    """

    target: LanguageModel
    heads: MedusaHeads
    gamma: int
    stops: bool = False

    @property
    def taps(self):
        return (self.target.layers,)

    def start(self, params, target_params, prompts: Prompts) -> LastHidden:
        config = self.target.config
        hidden = jnp.zeros((prompts.lengths.shape[0], 1, config.width), dtype_named(config.compute_dtype))
        vocabulary = None if self.heads.config.own_head else self.heads.vocabulary
        return LastHidden(hidden, self.target.head_kernel(target_params, vocabulary))

    def prefill(self, params, target_params, state: LastHidden, chunk: Chunk) -> LastHidden:
        return LastHidden(chunk.at_second_last(chunk.tap_states[0], state.hidden), state.kernel)

    def propose(self, params, target_params, state: LastHidden, target_cache, context: Context):
        heads, params = self.heads.first(params, self.gamma)
        model = self.target if state.kernel is None else self.target.reduced(heads.vocabulary)

        def run(_):
            model_params = self.target.reduced_params(target_params, state.kernel)
            return heads.head(params, model, model_params, state.hidden), None, ()

        how = {**self.ends, "vocabulary": heads.vocabulary}
        proposal, _ = draft_at_once(context, self.gamma, (), run, **how)
        return proposal, state, target_cache

    def commit(self, params, state, outcome: Outcome):
        # The state of the token before the one that is pending now.
        index = jnp.maximum(outcome.num_emitted - 1, 0)
        return LastHidden(jnp.take_along_axis(outcome.tap_states[0], index[:, None, None], axis=1), state.kernel)
