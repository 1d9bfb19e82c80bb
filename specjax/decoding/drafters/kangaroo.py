"""The target's first layers and a light adapter as the draft (Kangaroo, arXiv 2404.18911)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.decoding.drafters.base import Context, Outcome, Prefill, StoppingOptions
from specjax.decoding.drafters.drafting import catch_up
from specjax.decoding.drafters.early_exit import EarlyExitDrafter
from specjax.models import kv_cache
from specjax.models.adapters import Adapter
from specjax.models.language_model import LanguageModel, consecutive
from specjax.runtime.mesh import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kangaroo(StoppingOptions):
    """The target's first layers and a trained adapter as the draft.

    Attributes:
      adjusted: compare the threshold with the probabilities after temperature, top-k and top-p, not at temperature 1.
    """

    adjusted: bool = False
    loads = "attachment"

    def build(self, target: LanguageModel, gamma: int, loaded: Adapter) -> "KangarooDrafter":
        layer = loaded.config.exit_layer
        return KangarooDrafter(target, layer, gamma, self.stops, self.adjusted, adapter=loaded)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KangarooState:
    """What the drafter carries from block to block.

    Attributes:
      cache: the adapter's keys and values; None for an adapter without attention.
      exits: the target's states at the exit for the tokens of the last block, the pending one first. Their rows are not
        split over devices: the compiler would gather whole weights for them.
      second_last: index into `exits` of the second-last committed token.
    """

    cache: Any
    exits: Float[Array, "B gamma_plus_1 D"] = axes(None, None, "embed")
    second_last: Int[Array, "B"] = axes("batch")


@dataclasses.dataclass(frozen=True)
class KangarooDrafter(EarlyExitDrafter):
    """Early exit with an adapter between the exit and the head.

    The first step of a block feeds the adapter the states of the last two committed tokens. Rewriting the older one's
    keys and values changes nothing, except after full acceptance: the adapter has not seen the last drafted token yet,
    and this fills its slot. Its state is stored from the block before, so the target's layers run once for each token.
    """

    adapter: Adapter = dataclasses.field(kw_only=True)

    @property
    def taps(self):
        return (self.exit_layer,)

    def init(self, params, target_params, prefill: Prefill, row_keys):
        (states,) = prefill.tap_states
        cache = self.adapter.start(states.shape[0], prefill.capacity)
        _, cache = self.adapter.extend(params, cache, prefill.tap_states, consecutive(prefill.texts))
        before = jnp.maximum(prefill.text_lengths - 2, 0)
        exits = jnp.take_along_axis(states, before[:, None, None], axis=1)
        return KangarooState(cache, jnp.pad(exits, ((0, 0), (0, self.gamma), (0, 0))), jnp.zeros_like(before))

    def catch_up(self, params, target_params, state: KangarooState, target_cache, context: Context):
        if state.cache is None or not state.cache.keys:
            return state, target_cache

        # States at the exit of earlier tokens are not stored: the target's first layers run on them once more, and
        # write the same keys and values again.
        def feed(tokens, positions, caches):
            adapter_cache, cache = caches
            span = (0, self.exit_layer)
            hidden, cache = self.target.extend(target_params, cache, tokens, positions, layers=span)
            return self.adapter.extend(params, adapter_cache, (hidden,), positions)[1], cache

        adapter_cache, target_cache = catch_up(context, self.gamma + 1, feed, (state.cache, target_cache))
        adapter_cache = kv_cache.counting(adapter_cache, context.live.astype(jnp.int32))
        return dataclasses.replace(state, cache=adapter_cache), target_cache

    def first_logits(self, params, target_params, state: KangarooState, hidden, context: Context):
        # A text of one token has no second-last one: feed slots 0 and 1, use slot 0; slot 1 is rewritten later.
        lengths = context.lengths
        before = jnp.take_along_axis(state.exits, state.second_last[:, None, None], axis=1)
        before = jnp.where((lengths > 1)[:, None, None], before, hidden)
        start = jnp.maximum(lengths - 2, 0)
        positions = start[:, None] + jnp.arange(2, dtype=jnp.int32)[None]
        both = jnp.concatenate([before, hidden], axis=1)
        mixed, cache = self.adapter.extend(params, state.cache, (both,), positions)
        last = jnp.take_along_axis(mixed, (lengths - 1 - start)[:, None, None], axis=1)
        logits = self.adapter.head(params, self.target, target_params, last)[:, 0]
        return logits, dataclasses.replace(state, cache=cache)

    def logits(self, params, target_params, state: KangarooState, hidden, positions):
        mixed, cache = self.adapter.extend(params, state.cache, (hidden,), positions)
        logits = self.adapter.head(params, self.target, target_params, mixed)[:, 0]
        return logits, dataclasses.replace(state, cache=cache)

    def score(self, params, target_params, texts):
        mixed, _ = self.adapter.extend(params, None, (self.exits_of(target_params, texts),), consecutive(texts))
        return self.adapter.head(params, self.target, target_params, mixed)

    def with_exits(self, state: KangarooState, exits):
        return dataclasses.replace(state, exits=exits)

    def commit(self, params, state: KangarooState, outcome: Outcome):
        # `exits` begins with the old pending token, and the emitted tokens follow it; the last of these is pending now.
        return dataclasses.replace(state, second_last=jnp.maximum(outcome.num_emitted - 1, 0))
