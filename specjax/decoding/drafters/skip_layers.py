"""The target without some of its layers as the draft (arXiv 2309.08168); no training and no second cache."""

import dataclasses
import itertools
from collections.abc import Sequence

from specjax.decoding.drafters.base import Context, Drafter, HeadOptions, Prompts
from specjax.decoding.drafters.drafting import HeadState, draft
from specjax.models.language_model import LanguageModel
from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipLayers(HeadOptions):
    """Options of drafting with skipped layers.

    Attributes:
      skipped: indices of the skipped layers, from 0.
    """

    skipped: Sequence[int]

    def build(self, target: LanguageModel, gamma: int, loaded: None) -> "SkipLayersDrafter":
        skipped, last = tuple(sorted(set(self.skipped))), target.layers - 1
        if not skipped or skipped[0] < 0 or skipped[-1] > last:
            raise UserError(f"skipped must name one or more layers of the target, 0 .. {last}, not {skipped}")
        if len(skipped) == target.layers:
            raise UserError(f"skipped names all {target.layers} layers of the target; leave at least one to draft with")
        return SkipLayersDrafter(target, skipped, gamma, self.stops, self.vocabulary)


@dataclasses.dataclass(frozen=True)
class SkipLayersDrafter(Drafter):
    """Drafts with the target's layers except `skipped`, followed by the target's own norm and head.

    The draft reads the target's cache, in which committed tokens have the keys and values of the complete target, and
    writes keys and values of the pending and drafted tokens there. Verification runs all layers on these tokens and
    overwrites the same slots, so no second cache is needed.

    Attributes:
      skipped: indices of the skipped layers, ascending.
      stops: whether drafting stops at a low probability, see `draft`.
      vocabulary: the ids to which the head is restricted; None for all.
    """

    target: LanguageModel
    skipped: tuple[int, ...]
    gamma: int
    stops: bool = False
    vocabulary: DraftVocabulary | None = None

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The layers that run, as ranges (lo, hi) of layers lo .. hi - 1."""
        edges = (-1, *self.skipped, self.target.layers)
        return tuple((lo + 1, hi) for lo, hi in itertools.pairwise(edges) if lo + 1 < hi)

    def start(self, params, target_params, prompts: Prompts) -> HeadState:
        return HeadState(self.target.head_kernel(target_params, self.vocabulary))

    def propose(self, params, target_params, state: HeadState, target_cache, context: Context):
        model = self.target.reduced(self.vocabulary)
        head_params = self.target.reduced_params(target_params, state.kernel)

        def step(tokens, offset, cache):
            positions, hidden = context.lengths[:, None] - 1 + offset, tokens[:, None]
            for span in self.spans:
                hidden, cache = self.target.extend(target_params, cache, hidden, positions, layers=span)
            return model.column_logits(head_params, hidden)[:, 0], cache

        first = lambda cache: step(context.last_two_tokens[:, 1], 0, cache)
        how = {**self.ends, "vocabulary": self.vocabulary}
        proposal, cache = draft(context, self.gamma, target_cache, first, step, **how)
        return proposal, state, cache
