"""Keeps the target's hidden states of a text while it is decoded, so that they need not be computed again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.decoding.drafters.base import Chunk, Context, Drafter, Outcome, Prompts
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel
from specjax.runtime.dtypes import dtype_named
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
class StatesDrafter(Drafter):
    """Wraps a drafter that reads no states of the target; without one it is used at gamma 0, and drafts nothing.

    `recorded` has the states after each layer in `taps`, which are in ascending order.
    """

    target: LanguageModel
    gamma: int
    taps: tuple[int, ...]
    inner: Drafter | None = None

    def __post_init__(self):
        if (self.inner is None) != (self.gamma == 0) or (self.inner and (self.inner.taps or self.inner.resumes)):
            raise ValueError(f"a StatesDrafter of gamma {self.gamma} cannot wrap {self.inner}")

    @property
    def stops(self):
        return self.inner is not None and self.inner.stops

    @property
    def idles(self):
        return self.inner is not None and self.inner.idles

    @property
    def lag(self):
        return Drafter.lag if self.inner is None else self.inner.lag

    def start(self, params, target_params, prompts: Prompts) -> TextStates:
        config = self.target.config
        shape = prompts.lengths.shape[0], prompts.capacity, config.width
        zeros = tuple(jnp.zeros(shape, dtype_named(config.compute_dtype)) for _ in self.taps)
        return TextStates(zeros, self.inner.start(params, target_params, prompts) if self.inner else ())

    def prefill(self, params, target_params, state: TextStates, chunk: Chunk) -> TextStates:
        own = dataclasses.replace(chunk, tap_states=())
        inner = self.inner.prefill(params, target_params, state.inner, own) if self.inner else ()
        return state.write(chunk.tap_states, chunk.positions[:, 0], inner)

    def propose(self, params, target_params, state: TextStates, target_cache, context: Context):
        proposal, inner, target_cache = self.inner.propose(params, target_params, state.inner, target_cache, context)
        return proposal, dataclasses.replace(state, inner=inner), target_cache

    def commit(self, params, state: TextStates, outcome: Outcome) -> TextStates:
        own = dataclasses.replace(outcome, tap_states=())
        inner = self.inner.commit(params, state.inner, own) if self.inner else ()
        return state.write(outcome.tap_states, outcome.lengths - 1, inner)

    def recorded(self, state: TextStates) -> tuple[Float[Array, "B S D"], ...]:
        return state.after
