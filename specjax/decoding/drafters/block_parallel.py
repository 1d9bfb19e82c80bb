"""A block-parallel draft (DFlash): one forward drafts all tokens of a block, independent of each other."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.decoding.drafters.base import Chunk, Context, Drafter, HeadOptions, Outcome, Prompts
from specjax.decoding.drafters.drafting import draft_at_once
from specjax.models import kv_cache
from specjax.models.block_parallel import BlockParallel
from specjax.models.language_model import LanguageModel
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockParallelDraft(HeadOptions):
    """Options of a block-parallel draft."""

    loads = "attachment"

    def build(self, target: LanguageModel, gamma: int, loaded: BlockParallel) -> "BlockParallelDrafter":
        most = loaded.config.drafted
        if gamma > most:
            raise UserError(
                f"gamma {gamma} is more than the {most} tokens that a block of {loaded.config.block_size} drafts; "
                f"take gamma {most} or less, or train larger blocks"
            )
        return BlockParallelDrafter(target, loaded, gamma, self.stops)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockParallelState:
    """The drafter's state between blocks.

    Attributes:
      cache: keys and values made from the target's states, of all committed tokens but the pending one.
      kernel: see `HeadState`.
    """

    cache: kv_cache.Cache
    kernel: Float[Array, "W D"] | None = axes("vocab", "embed")


@dataclasses.dataclass(frozen=True)
class BlockParallelDrafter(Drafter):
    """Drafts the first gamma tokens of a block that has the size of training, whatever gamma is.

    The block's own keys and values are not cached: nothing reads them after the block. If drafting stops, the forward
    has computed the later tokens too, but verification has fewer columns.
    """

    target: LanguageModel
    network: BlockParallel
    gamma: int
    stops: bool = False

    @property
    def taps(self):
        return self.network.taps

    def start(self, params, target_params, prompts: Prompts) -> BlockParallelState:
        cache = self.network.start(prompts.lengths.shape[0], prompts.capacity)
        return BlockParallelState(cache, self.target.head_kernel(target_params, self.network.vocabulary))

    def prefill(self, params, target_params, state: BlockParallelState, chunk: Chunk) -> BlockParallelState:
        cache = self.network.read(params, state.cache, chunk.tap_states, chunk.positions)
        return dataclasses.replace(state, cache=cache)

    def propose(self, params, target_params, state: BlockParallelState, target_cache, context: Context):
        network, live = self.network, context.live.astype(jnp.int32)
        model = self.target.reduced(network.vocabulary)
        model_params = self.target.reduced_params(target_params, state.kernel)

        def run(cache):
            cache = kv_cache.counting(cache, live * network.config.block_size)
            pending = context.last_two_tokens[:, 1]
            hidden, cache = network.draft(params, self.target, target_params, cache, pending, context.lengths - 1)
            hidden = hidden[:, : self.gamma]
            sure = jax.nn.sigmoid(network.confidence(params, hidden)) if network.confident else None
            return network.head(params, model, model_params, hidden), sure, cache

        how = {**self.ends, "vocabulary": network.vocabulary}
        proposal, cache = draft_at_once(context, self.gamma, state.cache, run, **how)
        return proposal, dataclasses.replace(state, cache=cache), target_cache

    def commit(self, params, state: BlockParallelState, outcome: Outcome) -> BlockParallelState:
        columns = jnp.arange(outcome.tap_states[0].shape[1], dtype=jnp.int32)
        positions = outcome.lengths[:, None] - 1 + columns[None]
        cache = self.network.read(params, state.cache, outcome.tap_states, positions)
        return dataclasses.replace(state, cache=cache)
