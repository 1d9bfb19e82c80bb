"""PARD (arXiv 2504.18583): an independent draft model that drafts a block in one forward, with mask tokens."""

import dataclasses

import jax.numpy as jnp

from specjax.decoding.drafters.base import Context, HeadOptions
from specjax.decoding.drafters.drafting import catch_up, draft_at_once
from specjax.decoding.drafters.model import ModelDrafter, fitted
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel
from specjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pard(HeadOptions):
    """Options of a draft model that was trained with mask tokens; it has the target's tokenizer."""

    loads = "model"

    def build(self, target: LanguageModel, gamma: int, loaded: LanguageModel) -> "PardDrafter":
        if loaded.config.mask_id is None:
            raise UserError(
                'drafter "pard" needs a draft with a mask token ("pard_token" in its config.json), and this one has '
                'none; set kind to "model", or train it by configs/distill.py:pard'
            )
        return PardDrafter(fitted(loaded, target), gamma, self.stops)


@dataclasses.dataclass(frozen=True)
class PardDrafter(ModelDrafter):
    """Drafts gamma tokens from the pending token and gamma - 1 masks after it, independent of each other.

    The draft never runs on drafted tokens, so its cache lacks all tokens of the last block. The forward starts from the
    last gamma + 1 committed tokens, which overwrite the keys of that block's masks.
    """

    @property
    def lag(self):
        return self.gamma + 1

    def propose(self, params, target_params, state, target_cache, context: Context):
        model = self.model

        def feed(tokens, positions, cache):
            return model.extend(params, cache, tokens, positions)[1]

        def run(cache):
            # Before the tokens that it lacks, keys may still be those of masks.
            cache = catch_up(context, self.lag, feed, cache, again=self.lag)
            tokens, positions = self.window(context)
            cache = kv_cache.counting(cache, context.live.astype(jnp.int32) * tokens.shape[1])
            hidden, cache = model.extend(params, cache, tokens, positions)
            drafting = context.lengths - 1 - positions[:, 0]  # the pending token's place in the window
            drafting = drafting[:, None] + jnp.arange(self.gamma, dtype=jnp.int32)[None]
            hidden = jnp.take_along_axis(hidden, drafting[..., None], axis=1)
            return model.column_logits(params, hidden), None, cache

        how = {**self.ends, "vocabulary": model.vocabulary}
        proposal, cache = draft_at_once(context, self.gamma, state, run, **how)
        return proposal, cache, target_cache

    def window(self, context: Context):
        """The tokens `[B, 2 * gamma]` that the draft runs on, and their positions: committed ones, then masks.

        A text that is shorter than gamma + 1 tokens has more masks, which no drafted token reads.
        """
        width = min(2 * self.gamma, context.tokens.shape[1])
        start = jnp.maximum(context.lengths - self.lag, 0)
        start = jnp.minimum(start, context.tokens.shape[1] - width)
        positions = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(context.tokens, positions, axis=1)
        return jnp.where(positions < context.lengths[:, None], tokens, self.model.config.mask_id), positions
