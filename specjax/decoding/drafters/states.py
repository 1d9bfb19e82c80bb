"""Keeps the target's hidden states of a text while it is decoded, so that they need not be computed again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.decoding.drafters.base import Chunk, Context, Drafter, Outcome, Prompts
from specjax.decoding.drafters.wrapping import Wrapping
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel
from specjax.runtime.mesh import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextStates:
    """The state of a `StatesDrafter`.

    Attributes:
      after: the target's hidden states after each tapped layer, of all committed tokens but the pending one; other
        positions are undefined.
      inner: state of the drafter itself.
    """

    after: tuple[Float[Array, "B S D"], ...] = axes("batch", None, None)
    inner: Any

    def write(self, states: tuple[Float[Array, "B T D"], ...], start: jax.Array, inner: Any) -> "TextStates":
        """The state with T columns written into each row, from position `start` `[B]` on."""
        pairs = zip(self.after, states, strict=True)
        return TextStates(tuple(kv_cache.write_rows(old, new, start, axis=1) for old, new in pairs), inner)


@dataclasses.dataclass(frozen=True)
class NoDrafter(Drafter):
    """Drafts nothing, in plain decoding."""

    gamma: int = 0


@dataclasses.dataclass(frozen=True)
class StatesDrafter(Wrapping):
    """Wraps a drafter that reads no states of the target, and does not change its proposals.

    Attributes:
      target: the target, whose states it keeps.
      layers: the numbers of layers after which it keeps them, in ascending order, as `recorded` returns them.
    """

    target: LanguageModel
    layers: tuple[int, ...]

    def __post_init__(self):
        if self.inner.taps or self.inner.resumes:
            raise ValueError(f"states are not kept around {self.inner}, which reads the target's states itself")

    @property
    def taps(self):
        return self.layers

    @property
    def stops(self):
        return self.inner.stops

    def start(self, params, target_params, prompts: Prompts) -> TextStates:
        config = self.target.config
        shape = prompts.lengths.shape[0], prompts.capacity, config.width
        zeros = tuple(jnp.zeros(shape, kv_cache.stored_dtype(config)) for _ in self.layers)
        return TextStates(zeros, self.inner.start(params, target_params, prompts))

    def prefill(self, params, target_params, state: TextStates, chunk: Chunk) -> TextStates:
        own = dataclasses.replace(chunk, tap_states=())
        inner = self.inner.prefill(params, target_params, state.inner, own)
        return state.write(chunk.tap_states, chunk.positions[:, 0], inner)

    def propose(self, params, target_params, state: TextStates, target_cache, context: Context):
        proposal, inner, target_cache = self.inner.propose(params, target_params, state.inner, target_cache, context)
        return proposal, dataclasses.replace(state, inner=inner), target_cache

    def commit(self, params, state: TextStates, outcome: Outcome) -> TextStates:
        inner = self.inner.commit(params, state.inner, dataclasses.replace(outcome, tap_states=()))
        return state.write(outcome.tap_states, outcome.lengths - 1, inner)

    def recorded(self, state: TextStates) -> tuple[Float[Array, "B S D"], ...]:
        return state.after
