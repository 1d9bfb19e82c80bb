"""The target with some of its layers left out as the draft: nothing to train, nothing to keep (arXiv 2309.08168)."""

import dataclasses
import itertools
from collections.abc import Sequence

from specjax.decoding.drafters.base import Context, Drafter, StoppingOptions
from specjax.decoding.drafters.drafting import draft
from specjax.models.language_model import LanguageModel
from specjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipLayers(StoppingOptions):
    """The target without some of its layers as the draft.

    Attributes:
      skipped: numbers of the layers left out, 0 being the first.
    """

    skipped: Sequence[int]

    def build(self, target: LanguageModel, gamma: int, loaded: None) -> "SkipLayersDrafter":
        skipped, last = tuple(sorted(set(self.skipped))), target.layers - 1
        if not skipped or skipped[0] < 0 or skipped[-1] > last:
            raise UserError(f"skipped must name one or more layers of the target, 0 .. {last}, not {skipped}")
        if len(skipped) == target.layers:
            raise UserError(f"skipped names all {target.layers} layers of the target; leave at least one to draft with")
        return SkipLayersDrafter(target, skipped, gamma, self.stops)


@dataclasses.dataclass(frozen=True)
class SkipLayersDrafter(Drafter):
    """Drafts with the target's layers except `skipped`, followed by the target's own norm and head.

    The draft reads the target's cache, where every committed token has the keys and values of a whole forward, and
    writes those of the pending and the drafted tokens there. Verification runs all layers on the same tokens and
    rewrites the same slots, so a second cache with its own prefill is not needed.

    Attributes:
      skipped: numbers of the layers left out, ascending.
      stops: whether a row stops drafting where it is unsure.
    """

    target: LanguageModel
    skipped: tuple[int, ...]
    gamma: int
    stops: bool = False

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The layers that run, as ranges (lo, hi)."""
        edges = (-1, *self.skipped, self.target.layers)
        return tuple((lo + 1, hi) for lo, hi in itertools.pairwise(edges) if lo + 1 < hi)

    def propose(self, params, target_params, state, target_cache, context: Context):
        def step(tokens, offset, cache):
            positions, hidden = context.lengths[:, None] - 1 + offset, tokens[:, None]
            for span in self.spans:
                hidden, cache = self.target.extend(target_params, cache, hidden, positions, layers=span)
            return self.target.head(target_params, hidden)[:, 0], cache

        first = lambda cache: step(context.last_two_tokens[:, 1], 0, cache)
        proposal, cache = draft(context, self.gamma, target_cache, first, step, stops=self.stops)
        return proposal, state, cache
