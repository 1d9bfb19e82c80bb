"""Records what a drafter drafts in every block, so that refused drafts can be trained on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from specjax.decoding.drafters.base import Chunk, Context, Outcome, Prompts
from specjax.decoding.drafters.wrapping import Wrapping
from specjax.models import kv_cache
from specjax.runtime.mesh import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """The state of a recorded drafter.

    Attributes:
      drafted: the tokens of each block, at the position of its first token; other positions are undefined.
      inner: state of the drafter itself.
    """

    drafted: Int[Array, "B S gamma"] = axes("batch", None, None)
    inner: Any


@dataclasses.dataclass(frozen=True)
class RecordingDrafter(Wrapping):
    """Wraps another drafter, whose proposals it does not change."""

    @property
    def stops(self):
        return self.inner.stops

    def start(self, params, target_params, prompts: Prompts) -> Record:
        drafted = jnp.zeros((prompts.lengths.shape[0], prompts.capacity, self.gamma), jnp.int32)
        return Record(drafted, self.inner.start(params, target_params, prompts))

    def prefill(self, params, target_params, state: Record, chunk: Chunk) -> Record:
        return dataclasses.replace(state, inner=self.inner.prefill(params, target_params, state.inner, chunk))

    def propose(self, params, target_params, state: Record, target_cache, context: Context):
        proposal, inner, target_cache = self.inner.propose(params, target_params, state.inner, target_cache, context)
        drafted = kv_cache.write_rows(state.drafted, proposal.tokens[:, None], context.lengths, axis=1)
        return proposal, Record(drafted, inner), target_cache

    def commit(self, params, state: Record, outcome: Outcome) -> Record:
        return dataclasses.replace(state, inner=self.inner.commit(params, state.inner, outcome))
