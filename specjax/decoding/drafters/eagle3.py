"""EAGLE-3 (arXiv 2503.01840) as a chain: one layer on the target's hidden states drafts from its own states."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.decoding.drafters.base import Chunk, Context, Drafter, HeadOptions, Outcome, Prompts
from specjax.decoding.drafters.drafting import catch_up, draft
from specjax.models import kv_cache
from specjax.models.eagle3 import Eagle3Layer
from specjax.models.language_model import LanguageModel
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3(HeadOptions):
    """Options of an EAGLE-3 draft.

    Attributes:
      states_after: the numbers of layers after which it reads the target's states; () for what its files say. Those of
        other tools do not always say it, see `hub.eagle3_config`.
    """

    states_after: Sequence[int] = ()
    loads = "attachment"

    def build(self, target: LanguageModel, gamma: int, loaded: Eagle3Layer) -> "Eagle3Drafter":
        if self.states_after and self.states_after != loaded.taps:
            raise UserError(
                f"states_after is {self.states_after}, and the draft was loaded with {loaded.taps}; give it to "
                "api.load_adapter too"
            )
        return Eagle3Drafter(target, loaded, gamma, self.stops)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eagle3State:
    """The drafter's state between blocks.

    Attributes:
      cache: keys and values of the draft's layer.
      features: the target's projected hidden states of all committed tokens but the pending one, in
        `kv_cache.stored_dtype`. Rows are not sharded, because the compiler would gather complete weights to compute
        them.
    """

    cache: kv_cache.Cache
    features: Float[Array, "B S D"] = axes(None, None, "embed")

    def before(self, positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The features of the token before each position; zeros before the first one."""
        index = jnp.clip(positions - 1, 0, self.features.shape[1] - 1)
        features = jnp.take_along_axis(self.features, index[..., None], axis=1)
        return jnp.where((positions > 0)[..., None], features, 0)


@dataclasses.dataclass(frozen=True)
class Eagle3Drafter(Drafter):
    """Drafts at most gamma tokens. The first step of a block runs on the last gamma + 1 committed tokens: in the last
    block the draft computed some of their keys from its own states, and the target's states are known now.
    """

    target: LanguageModel
    network: Eagle3Layer
    gamma: int
    stops: bool = False

    @property
    def taps(self):
        return self.network.taps

    @property
    def lag(self):
        return self.gamma + 1

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(dtype_named(self.network.config.inner.compute_dtype))

    def start(self, params, target_params, prompts: Prompts) -> Eagle3State:
        config, batch = self.network.config.inner, prompts.lengths.shape[0]
        features = jnp.zeros((batch, prompts.capacity, config.width), kv_cache.stored_dtype(config))
        return Eagle3State(self.network.start(batch, prompts.capacity), features)

    def prefill(self, params, target_params, state: Eagle3State, chunk: Chunk) -> Eagle3State:
        fused = self.network.fuse(params, chunk.tap_states)
        features = kv_cache.write_rows(state.features, fused, chunk.positions[:, 0], axis=1)
        state = dataclasses.replace(state, features=features)
        return self._read(params, target_params, state, chunk.tokens, chunk.positions)[1]

    def _read(self, params, target_params, state: Eagle3State, tokens, positions) -> tuple[Any, Eagle3State]:
        """The draft's output at committed tokens, and the state with their keys and values."""
        hidden = state.before(positions).astype(self._dtype)
        outputs, cache = self.network.draft_step(params, target_params, state.cache, tokens, hidden, positions)
        return outputs, dataclasses.replace(state, cache=cache)

    def propose(self, params, target_params, state: Eagle3State, target_cache, context: Context):
        network = self.network

        def feed(tokens, positions, state):
            return self._read(params, target_params, state, tokens, positions)[1]

        def drafted(state, output):
            """The logits, and the carry of `draft`: the state, and what the next step reads."""
            logits = network.head(params, self.target, target_params, output)[:, 0]
            return logits, (state, network.fed_back(params, output))

        def first(carry):
            # Before the tokens that it lacks, keys may still be those of drafted tokens.
            state = catch_up(context, self.lag, feed, carry[0], again=self.lag)
            positions, pending = context.last(self.lag)
            tokens = jnp.take_along_axis(context.tokens, positions, axis=1)
            outputs, state = self._read(params, target_params, state, tokens, positions)
            return drafted(state, jnp.take_along_axis(outputs, pending, axis=1))

        def step(tokens, offset, carry):
            state, hidden = carry
            positions = context.lengths[:, None] + offset - 1
            output, cache = network.draft_step(params, target_params, state.cache, tokens[:, None], hidden, positions)
            return drafted(dataclasses.replace(state, cache=cache), output)

        carry = state, jnp.zeros_like(state.features[:, :1], self._dtype)
        how = {**self.ends, "vocabulary": network.vocabulary}
        proposal, (state, _) = draft(context, self.gamma, carry, first, step, **how)
        return proposal, state, target_cache

    def commit(self, params, state: Eagle3State, outcome: Outcome) -> Eagle3State:
        fused = self.network.fuse(params, outcome.tap_states)
        features = kv_cache.write_rows(state.features, fused, outcome.lengths - 1, axis=1)
        return dataclasses.replace(state, features=features)
