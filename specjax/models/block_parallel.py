"""A draft that writes a whole block in one forward (DFlash): layers in which an anchor token and mask tokens attend to
each other and to keys and values made from hidden states of several of the target's layers."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.models import attention, kv_cache, layers
from specjax.models.attachment import States
from specjax.models.block import Block
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.fusing import FusingConfig, FusingDraft, unsharded_rows
from specjax.models.language_model import Params, Prediction, consecutive
from specjax.models.rotary import angles, text_lengths
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# A larger number in a damaged file would be a hang: each layer is built before its tensors are looked for.
_MOST_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class BlockParallelConfig(FusingConfig):
    """Options of a block-parallel draft. By default it reads the states after five (at most) layers that are evenly
    spaced from layer 2 to L - 2 of L layers, as in published drafts.

    Attributes:
      layers: number of the draft's own layers.
      block_size: tokens of a block: the anchor, which is the last committed token, and the drafted ones.
      mask_id: the id whose embedding stands for a token that is drafted; -1 is the last id of the target.
      confidence: whether it has a head that estimates for each drafted token how probably it is accepted, with which
        the drafter's `threshold` is then compared.
    """

    layers: int = 2
    block_size: int = 8
    mask_id: int = -1
    confidence: bool = False
    section = "block_parallel"

    def __post_init__(self):
        super().__post_init__()
        vocab_size = self.target.vocab_size
        if not 1 <= self.layers <= _MOST_LAYERS:
            raise UserError(
                f"block_parallel.layers is {self.layers}; the draft needs 1 layer or more, and at most {_MOST_LAYERS}"
            )
        if self.block_size < 2:
            raise UserError(
                f"block_parallel.block_size is {self.block_size}; it counts the last committed token, so give 2 or more"
            )
        if not -1 <= self.mask_id < vocab_size:
            raise UserError(
                f"block_parallel.mask_id is {self.mask_id}; give an id below {vocab_size}, or -1 for the target's last"
            )

    def default_states(self) -> tuple[int, ...]:
        first, last = min(2, self.target.layers), max(self.target.layers - 2, 1)
        return tuple(sorted({1 + round(first - 1 + (last - first) * i / 4) for i in range(5)}))

    def default_layer(self) -> DecoderConfig:
        return self.one_layer(layers=self.layers, qk_norm=True)

    @property
    def max_positions(self) -> int:
        return self.inner.max_positions

    @property
    def drafted(self) -> int:
        """Number of tokens that a block drafts."""
        return self.block_size - 1


class BlockParallelModule(nnx.Module):
    """Parameters and forward pass."""

    def __init__(self, config: BlockParallelConfig, rngs: nnx.Rngs):
        inner, width, count = config.inner, config.target.width, len(config.states_after)
        make = functools.partial(layers.Linear, dtype=inner.param_dtype, rngs=rngs)
        self.project = make(count * width, width, ("embed", None), (count * width) ** -0.5)
        self.hidden_norm, self.norm = layers.Norm(inner, width), layers.Norm(inner, width)
        self.blocks = nnx.List([Block(inner, layer, rngs) for layer in range(config.layers)])
        self.confidence = make(width, 1, ("embed", None), 0.0, bias=True) if config.confidence else None
        self.config = config

    def fuse(self, states):
        return self.hidden_norm(self.project(jnp.concatenate(states, axis=-1)))

    def read(self, fused, positions):
        """Keys and values of the target's tokens, (keys, values) of each layer."""
        rotation = angles(self.config.inner.rotary, positions, text_lengths(positions))
        return [block.attention.keys_values(fused, rotation) for block in self.blocks]

    def draft(self, context, embedded, positions, visible):
        """The draft's output at every token of each block.

        Args:
          context: (keys, values) `[B, K, S, H]` of the target's tokens, for each layer.
          embedded: `[B, T, N, D]`, T blocks of N tokens.
          positions: `[B, T, N]`, their positions in the text.
          visible: `[B, T, S]`, which of the target's tokens each block reads.
        """
        shape, inner = embedded.shape, self.config.inner
        flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
        pin = meshes.pin_rows if shape[1] > 1 else unsharded_rows
        rotation = angles(inner.rotary, flat(positions), text_lengths(flat(positions)))
        hidden = pin(flat(embedded))

        def run(block, hidden, keys, values):
            inputs = block.attention_norm(hidden)
            in_blocks = lambda x: x.reshape(*x.shape[:2], *shape[1:3], x.shape[3])
            queries = in_blocks(block.attention.queries(inputs, rotation))
            own = map(in_blocks, block.attention.keys_values(inputs, rotation))
            mixed = _attend(queries, keys, values, visible, *own, layers.query_scale(inner))
            hidden = hidden + pin(block.attention.output(layers.join_heads(mixed)))
            return hidden + pin(block.mlp(block.mlp_norm(hidden)))

        for block, (keys, values) in zip(self.blocks, context, strict=True):
            hidden = layers.recomputed(functools.partial(run, block), inner.remat)(hidden, keys, values)
        return hidden.reshape(shape)


def _attend(queries, keys, values, visible, own_keys, own_values, scale):
    """Grouped-query attention of the tokens of each block to the context where visible, and to all of their block.

    Args:
      queries: `[B, N, T, M, H]`, M tokens of T blocks.
      keys, values: `[B, K, S, H]`.
      visible: `[B, T, S]`.
      own_keys, own_values: `[B, K, T, M, H]`.

    Returns:
      `[B, N, T * M, H]`.
    """
    batch, heads, blocks, tokens, size = queries.shape
    dtype, slots = queries.dtype, keys.shape[2]
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)  # see `attention.by_queries`
    dots = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend_some(queries, visible, own_keys, own_values):
        grouped = queries.reshape(batch, keys.shape[1], -1, *queries.shape[2:])
        scores = dots("BKGMTH,BKSH->BKGMTS", grouped, keys.astype(dtype)) * scale
        scores = jnp.where(visible[:, None, None, None], scores, jnp.finfo(jnp.float32).min)
        own = dots("BKGMTH,BKNTH->BKGMTN", grouped, own_keys) * scale
        weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1).astype(dtype)
        mixed = dots("BKGMTS,BKSH->BKGMTH", weights[..., :slots], values.astype(dtype))
        mixed = mixed + dots("BKGMTN,BKNTH->BKGMTH", weights[..., slots:], own_values)
        return mixed.astype(dtype).reshape(queries.shape)

    blocks_last = lambda x: x.swapaxes(2, 3)
    arguments = blocks_last(queries), visible, blocks_last(own_keys), blocks_last(own_values)
    mixed = attention.by_queries(attend_some, tokens * slots, *arguments)
    return blocks_last(mixed).reshape(batch, heads, blocks * tokens, size)


@dataclasses.dataclass(frozen=True)
class BlockParallel(FusingDraft):
    """The draft of DFlash. With g_s the projected and normed states of the target at token s, every layer has the keys
    and values of g_s, for all tokens s before the anchor, besides those of the block's own tokens, which all see each
    other. The output at the k-th mask token predicts the k-th token after the anchor, independent of the tokens
    between. Embedding and head are the target's.

    Training drafts from every token of a text, or from some that are drawn (`objective.Loss.anchors`), with the weight
    exp(-(k - 1) / (block_size - 1)) for the k-th token.

    With `confidence`, a linear function of the output at each mask token learns the logit of 1 - total variation
    between draft and target, as in DSpark. It does not see the token that is drawn.
    """

    config: BlockParallelConfig
    config_class = BlockParallelConfig
    module = BlockParallelModule
    drafter = "block_parallel"
    anchored = True

    @property
    def confident(self) -> bool:
        return self.config.confidence

    @property
    def predicts(self) -> tuple[Prediction, ...]:
        count = self.config.drafted
        return tuple(Prediction(k, math.exp(-k / count)) for k in range(count))

    def read(
        self, params: Params, cache: kv_cache.Cache, states: States, positions: Int[Array, "B T"]
    ) -> kv_cache.Cache:
        """The cache with keys and values of the target's states at these consecutive positions."""
        module = self.bind(params)
        fused = unsharded_rows(module.fuse([unsharded_rows(state) for state in states]))
        for layer, new in enumerate(module.read(fused, positions)):
            written = kv_cache.write(cache.keys[layer], cache.values[layer], *new, positions[:, 0])
            cache = cache.with_layer(layer, *written)
        return cache

    def draft(
        self,
        params: Params,
        target: Decoder,
        target_params: Params,
        cache: kv_cache.Cache,
        tokens: Int[Array, "B"],
        positions: Int[Array, "B"],
    ) -> tuple[Float[Array, "B drafted D"], kv_cache.Cache]:
        """The input of `head` for every drafted token, after these tokens; the cache holds what comes before them."""
        slots = jnp.arange(cache.keys[0].shape[2], dtype=jnp.int32)
        embedded, places = self._block(target, target_params, tokens[:, None], positions[:, None])
        visible = slots[None, None] < positions[:, None, None]
        context = list(zip(cache.keys, cache.values, strict=True))
        hidden = self.bind(params).draft(context, embedded, places, visible)
        return hidden[:, 0, 1:], cache.metered(self.config.layers, self.config.block_size)

    def _block(self, target, target_params, tokens, positions):
        """Embeddings `[B, T, N, D]` and positions `[B, T, N]` of the blocks that start with these tokens `[B, T]`."""
        config = self.config
        mask = config.mask_id % config.target.vocab_size
        masks = jnp.full((*tokens.shape, config.drafted), mask, tokens.dtype)
        blocks = jnp.concatenate([tokens[..., None], masks], axis=-1)
        places = positions[..., None] + jnp.arange(config.block_size, dtype=jnp.int32)[None, None]
        flat = lambda x: x.reshape(x.shape[0], -1)
        embedded = target.bind(target_params).embed(flat(blocks), flat(places))
        return embedded.reshape(*blocks.shape, -1), places

    def training_states(
        self,
        params: Params,
        target: Decoder,
        target_params: Params,
        states: States,
        tokens: Int[Array, "B T"],
        anchors: Int[Array, "B K"] | None = None,
    ) -> Float[Array, "B K E"]:
        module, positions = self.bind(params), consecutive(tokens)
        context = module.read(meshes.pin_rows(module.fuse(states)), positions)
        anchors = positions if anchors is None else anchors
        starts = jnp.take_along_axis(tokens, anchors, axis=1)
        embedded, places = self._block(target, target_params, starts, anchors)
        hidden = module.draft(context, embedded, places, positions[:, None, :] < anchors[..., None])
        return hidden[:, :, 1:].reshape(*anchors.shape, -1)

    def confidence(self, params: Params, hidden: Float[Array, "B T E"]) -> Float[Array, "B T_times_predictions"]:
        module = self.bind(params)
        outputs = module.norm(hidden.reshape(hidden.shape[0], -1, self.config.target.width))
        return module.confidence.logits(jax.lax.stop_gradient(outputs))[..., 0]

    def head(
        self, params: Params, target: Decoder, target_params: Params, hidden: Float[Array, "B T E"]
    ) -> Float[Array, "B T_times_predictions W"]:
        """Float32 logits of every drafted token; those of one anchor are adjacent."""
        hidden = hidden.reshape(hidden.shape[0], -1, self.config.target.width)
        return target.unembed(target_params, self.bind(params).norm(hidden))
