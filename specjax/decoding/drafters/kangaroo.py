"""Kangaroo (arXiv 2404.18911): the target's first layers followed by a small trained adapter as the draft."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.decoding.drafters.base import Chunk, Context, HeadOptions, Outcome, Prompts
from specjax.decoding.drafters.drafting import catch_up
from specjax.decoding.drafters.early_exit import EarlyExitDrafter
from specjax.models.adapters import Adapter
from specjax.models.language_model import LanguageModel, consecutive
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.mesh import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kangaroo(HeadOptions):
    """Options of Kangaroo.

    Attributes:
      adjusted: compare the threshold with the probabilities after temperature, top-k and top-p, not at temperature 1.
    """

    adjusted: bool = False
    loads = "attachment"

    def build(self, target: LanguageModel, gamma: int, loaded: Adapter) -> "KangarooDrafter":
        layer = loaded.config.exit_layer
        how = {"stops": self.stops, "adjusted": self.adjusted, "vocabulary": loaded.vocabulary}
        return KangarooDrafter(target, layer, gamma, **how, adapter=loaded)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KangarooState:
    """The drafter's state between blocks.

    Attributes:
      cache: the adapter's cache; it holds no keys and values if the adapter has no attention.
      hidden: the target's states after `exit_layer` layers, of the last block's pending token and drafted tokens. Rows
        are not sharded, because the compiler would gather complete weights to compute them.
      kernel: see `HeadState`; None also if the adapter has its own head.
      second_last: index along the second axis of `hidden` of the second-last committed token.
    """

    cache: Any
    hidden: Float[Array, "B gamma_plus_1 D"] = axes(None, None, "embed")
    kernel: Float[Array, "W D"] | None = axes("vocab", "embed")
    second_last: Int[Array, "B"] = axes("batch")


@dataclasses.dataclass(frozen=True)
class KangarooDrafter(EarlyExitDrafter):
    """Early exit with an adapter between the target's first layers and the head.

    In the first step of a block the adapter runs on the last two committed tokens. The older one is usually in the
    adapter's cache already; but if all drafted tokens were accepted, the last of them is not, and this step adds it.
    Its hidden state is stored from the last block, so the target's layers run once on each token.
    """

    adapter: Adapter = dataclasses.field(kw_only=True)

    @property
    def taps(self):
        return (self.exit_layer,)

    def start(self, params, target_params, prompts: Prompts):
        config, batch = self.target.config, prompts.lengths.shape[0]
        hidden = jnp.zeros((batch, self.gamma + 1, config.width), dtype_named(config.compute_dtype))
        cache = self.adapter.start(batch, prompts.capacity)
        return KangarooState(cache, hidden, self.kernel(target_params), jnp.zeros((batch,), jnp.int32))

    def prefill(self, params, target_params, state: KangarooState, chunk: Chunk):
        _, cache = self.adapter.extend(params, state.cache, chunk.tap_states, chunk.positions)
        second_last = chunk.at_second_last(chunk.tap_states[0], state.hidden[:, :1])
        hidden = jnp.concatenate([second_last, state.hidden[:, 1:]], axis=1)
        return KangarooState(cache, hidden, state.kernel, jnp.zeros_like(state.second_last))

    def propose(self, params, target_params, state: KangarooState, target_cache, context: Context):
        proposal, state, target_cache = super().propose(params, target_params, state, target_cache, context)
        return proposal, dataclasses.replace(state, hidden=proposal.resume_hidden), target_cache

    def kernel(self, target_params):
        """The columns of the target's head that the adapter uses; None for all, or if it has its own head."""
        return None if self.adapter.config.own_head else self.target.head_kernel(target_params, self.vocabulary)

    def head(self, params, target_params, kernel, hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """The adapter's logits."""
        model_and_params = (self.target, target_params) if kernel is None else self.with_head(target_params, kernel)
        return self.adapter.head(params, *model_and_params, hidden)

    def with_missing(self, params, target_params, state: KangarooState, target_cache, context: Context):
        if state.cache is None or not state.cache.keys:
            return state, target_cache

        # Hidden states of earlier tokens are not stored, so the target's first layers run on them again and write the
        # same keys and values.
        def feed(tokens, positions, caches):
            adapter_cache, cache = caches
            span = (0, self.exit_layer)
            hidden, cache = self.target.extend(target_params, cache, tokens, positions, layers=span)
            return self.adapter.extend(params, adapter_cache, (hidden,), positions)[1], cache

        adapter_cache, target_cache = catch_up(context, self.gamma + 1, feed, (state.cache, target_cache))
        return dataclasses.replace(state, cache=adapter_cache), target_cache

    def first_logits(self, params, target_params, state: KangarooState, hidden, context: Context):
        before = jnp.take_along_axis(state.hidden, state.second_last[:, None, None], axis=1)
        before = jnp.where((context.lengths > 1)[:, None, None], before, hidden)
        positions, pending = context.last(2)
        both = jnp.concatenate([before, hidden], axis=1)
        mixed, cache = self.adapter.extend(params, state.cache, (both,), positions)
        logits = self.head(params, target_params, state.kernel, jnp.take_along_axis(mixed, pending, axis=1))[:, 0]
        return logits, dataclasses.replace(state, cache=cache)

    def logits(self, params, target_params, state: KangarooState, hidden, positions):
        mixed, cache = self.adapter.extend(params, state.cache, (hidden,), positions)
        logits = self.head(params, target_params, state.kernel, mixed)[:, 0]
        return logits, dataclasses.replace(state, cache=cache)

    def score(self, params, target_params, texts, prompt_lengths):
        hidden = self.hidden_of(target_params, texts, prompt_lengths)
        mixed, _ = self.adapter.extend(params, None, (hidden,), consecutive(texts))
        logits = self.head(params, target_params, self.kernel(target_params), mixed)
        return logits if self.vocabulary is None else self.vocabulary.spread(logits, self.target.vocab_size, -jnp.inf)

    def commit(self, params, state: KangarooState, outcome: Outcome):
        # `hidden` holds the old pending token and the tokens after it. The last emitted token is pending now.
        return dataclasses.replace(state, second_last=jnp.maximum(outcome.num_emitted - 1, 0))
