"""An independent draft model with its own cache."""

import dataclasses

import jax.numpy as jnp

from specjax.decoding.drafters.base import Chunk, Context, Drafter, HeadOptions, Prompts
from specjax.decoding.drafters.drafting import catch_up, draft
from specjax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDraft(HeadOptions):
    """Options of a separate draft model, which has the target's tokenizer."""

    loads = "model"

    def build(self, target: LanguageModel, gamma: int, loaded: LanguageModel) -> "ModelDrafter":
        return ModelDrafter(fitted(loaded, target), gamma, self.stops)


def fitted(draft: LanguageModel, target: LanguageModel) -> LanguageModel:
    """The draft with logits of the target's size; both may pad their tokenizer's vocabulary to different sizes.

    Raises:
      UserError: for a draft vocabulary with ids that the target does not have.
    """
    if draft.vocabulary is not None:
        draft.vocabulary.check(target.vocab_size)
    return draft.with_vocab_size(target.vocab_size)


@dataclasses.dataclass(frozen=True)
class ModelDrafter(Drafter):
    """Drafts at most gamma tokens with a separate language model (arXiv 2211.17192).

    In the first step of a block the draft runs on the last two committed tokens. The older one is usually in its cache
    already; but if all drafted tokens were accepted, the last of them is not, and this step adds it.
    """

    model: LanguageModel
    gamma: int
    stops: bool = False

    def start(self, params, target_params, prompts: Prompts):
        return self.model.start(params, prompts.tokens, prompts.lengths, prompts.capacity)

    def prefill(self, params, target_params, state, chunk: Chunk):
        return self.model.extend(params, state, chunk.tokens, chunk.positions)[1]

    def propose(self, params, target_params, state, target_cache, context: Context):
        model = self.model

        def feed(tokens, positions, cache):
            return model.extend(params, cache, tokens, positions)[1]

        def first(cache):
            cache = catch_up(context, self.gamma + 1, feed, cache)
            positions, pending = context.last(2)
            hidden, cache = model.extend(params, cache, context.last_two_tokens, positions)
            return model.column_logits(params, jnp.take_along_axis(hidden, pending, axis=1))[:, 0], cache

        def step(tokens, offset, cache):
            positions = context.lengths[:, None] + offset - 1
            hidden, cache = model.extend(params, cache, tokens[:, None], positions)
            return model.column_logits(params, hidden)[:, 0], cache

        how = {**self.ends, "vocabulary": model.vocabulary}
        proposal, cache = draft(context, self.gamma, state, first, step, **how)
        return proposal, cache, target_cache
