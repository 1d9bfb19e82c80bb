"""The encoder-decoder language model of T5 (arXiv 1910.10683): relative position biases and cross-attention."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.models import attention, kv_cache, layers
from specjax.models.block import Block
from specjax.models.config import DecoderConfig
from specjax.models.language_model import LanguageModel, Params, consecutive, look_up
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import dtype_named

# `max_positions` of a model with relative positions, whose text length is not limited.
UNLIMITED = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(DecoderConfig):
    """A decoder with cross-attention, and an encoder with the same width, heads and MLP.

    Attributes:
      encoder_layers: number of blocks of the encoder (`layers` are the decoder's).
      relative_buckets: number of relative-position biases per head, each for a range of distances between tokens.
      relative_distance: all distances of at least this many tokens share the last bucket.
      head_scale: factor on the normalised last hidden states before the head.
      start_token: the id that every text starts with.
    """

    encoder_layers: int
    relative_buckets: int
    relative_distance: int
    head_scale: float
    start_token: int

    def __post_init__(self):
        super().__post_init__()
        if self.encoder_layers < 1 or self.relative_buckets < 4 or self.relative_buckets % 4:
            raise ValueError("an encoder-decoder needs encoder layers, and relative buckets in multiples of 4")
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_distance ({self.relative_distance}) must be above half the {self.relative_buckets} buckets"
            )

    @classmethod
    def t5(cls, **fields) -> "EncoderDecoderConfig":
        """A T5 v1.1 of these sizes, with the settings that all of them share.

        Raises:
          ValueError: if there are fewer key/value heads than heads, which a T5's `config.json` cannot express.
        """
        if fields["kv_heads"] != fields["heads"]:
            raise ValueError(f"a T5 has as many kv_heads ({fields['kv_heads']}) as heads ({fields['heads']})")
        return cls(
            max_positions=UNLIMITED,
            rotary=None,
            family="t5",
            activation="gelu_tanh",
            query_scale=1.0,
            relative_buckets=32,
            relative_distance=128,
            head_scale=fields["width"] ** -0.5 if fields["tied_head"] else 1.0,
            **fields,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossCache:
    """The decoder's keys and values, for self-attention to the text and cross-attention to the encoded prompt.

    Attributes:
      own: self-attention cache of the text; None on whole texts without a cache.
      cross_keys: cross-attention keys of the prompt, one array per layer, computed once.
      cross_values: the values, likewise.
      lengths: number of tokens of each prompt.
    """

    own: kv_cache.Cache | None
    cross_keys: tuple[Float[Array, "B N P H"], ...] = meshes.axes(*kv_cache.AXES)
    cross_values: tuple[Float[Array, "B N P H"], ...] = meshes.axes(*kv_cache.AXES)
    lengths: Int[Array, "B"] = meshes.axes("batch")


def bucket_table(buckets: int, distance: int, *, both_ways: bool) -> np.ndarray:
    """Buckets of the distances 0 .. `distance` to earlier tokens, then with `both_ways` 1 .. `distance` to later ones.

    Half of the buckets hold one distance each, the others ranges that grow geometrically.
    """
    one_way = buckets // 2 if both_ways else buckets
    exact = one_way // 2
    steps = np.arange(distance + 1)
    ranges = np.log(np.maximum(steps, 1).astype(np.float32) / exact) / math.log(distance / exact) * (one_way - exact)
    backwards = np.where(steps < exact, steps, np.minimum(exact + ranges.astype(np.int32), one_way - 1))
    return np.concatenate([backwards, one_way + backwards[1:]]) if both_ways else backwards


class RelativeBias(nnx.Module):
    """Learned attention biases by head and distance bucket, shared by all layers of the encoder or of the decoder."""

    def __init__(self, config: EncoderDecoderConfig, both_ways: bool, rngs: nnx.Rngs):
        shape = (config.relative_buckets, config.heads)
        table = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.table = nnx.Param(table.astype(dtype_named(config.float_dtype)), axes=(None, "heads"))
        self.buckets = (config.relative_buckets, config.relative_distance)
        self.both_ways = both_ways

    def __call__(self, positions: Int[Array, "B T"], slots: Int[Array, "_ S"]) -> Float[Array, "B N T S"]:
        farthest = self.buckets[1]
        by_distance = self.table[...].astype(jnp.float32)[bucket_table(*self.buckets, both_ways=self.both_ways)]
        back = positions[:, :, None] - slots[:, None]
        index = jnp.clip(back, 0, farthest)
        if self.both_ways:
            index = jnp.where(back < 0, farthest + jnp.minimum(-back, farthest), index)
        return jnp.moveaxis(by_distance[index], -1, 1)


class CrossAttention(layers.Attention):
    """Cross-attention of the text to the encoded prompt, with the prompt's `keys_values`."""

    def __call__(self, inputs, keys, values, visible):
        keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)  # see `by_queries`
        attend = lambda queries: attention.attend(queries, keys, values, visible, **self.how)
        mixed = attention.by_queries(attend, keys.shape[2], self.queries(inputs, None))
        return self.output(layers.join_heads(mixed))


class DecoderBlock(nnx.Module):
    """One decoder layer: self-attention, cross-attention and MLP, each with a norm and a residual connection."""

    def __init__(self, config: EncoderDecoderConfig, layer: int, rngs: nnx.Rngs):
        self.attention_norm = layers.Norm(config, config.width)
        self.attention = layers.Attention(config, layer, rngs)
        self.cross_norm = layers.Norm(config, config.width)
        self.cross = CrossAttention(config, layer, rngs)
        self.mlp_norm = layers.Norm(config, config.width)
        self.mlp = layers.MLP(config, rngs)

    def __call__(self, hidden, positions, mask, keys, values, bias, cross_keys, cross_values, visible):
        inputs = self.attention_norm(hidden)
        mixed, keys, values = self.attention(inputs, None, positions, mask, keys, values, bias=bias)
        hidden = hidden + mixed
        hidden = hidden + self.cross(self.cross_norm(hidden), cross_keys, cross_values, visible)
        return hidden + self.mlp(self.mlp_norm(hidden)), keys, values


class EncoderDecoderModule(nnx.Module):
    """Parameters and forward pass of an encoder-decoder."""

    def __init__(self, config: EncoderDecoderConfig, rngs: nnx.Rngs):
        dtype = dtype_named(config.float_dtype)
        embedding = jax.random.normal(rngs.params(), (config.vocab_size, config.width), jnp.float32)
        self.embedding = nnx.Param(embedding.astype(dtype), axes=("vocab", "embed"))
        self.encoder_bias = RelativeBias(config, True, rngs)
        self.encoder_blocks = nnx.List([Block(config, i, rngs) for i in range(config.encoder_layers)])
        self.encoder_norm = layers.Norm(config, config.width)
        self.bias = RelativeBias(config, False, rngs)
        self.blocks = nnx.List([DecoderBlock(config, i, rngs) for i in range(config.layers)])
        self.norm = layers.Norm(config, config.width)
        if not config.tied_head:
            make = functools.partial(layers.Linear, dtype=config.float_dtype, rngs=rngs)
            self.unembedding = make(config.width, config.vocab_size, ("embed", "vocab"), config.width**-0.5)
        self.config = config

    def embed(self, tokens):
        return look_up(self.embedding[...], tokens).astype(dtype_named(self.config.compute_dtype))

    def encode(self, prompts, lengths):
        """Hidden states of the prompts; those of the padding are never attended to."""
        hidden, positions = self.embed(prompts), consecutive(prompts)
        is_prompt = (positions < lengths[:, None])[:, None, :]
        bias = self.encoder_bias(positions[:1], positions[:1])
        for layer, block in enumerate(self.encoder_blocks):
            with jax.named_scope(f"encoder_layer_{layer}"):
                run = layers.recomputed(layers.traced_once(block, causal=False), self.config.remat)
                hidden, *_ = run(meshes.pin_rows(hidden), None, positions, is_prompt, None, None, bias)
        return self.encoder_norm(meshes.pin_rows(hidden))

    def remember(self, prompts, lengths):
        memory = self.encode(prompts, lengths)
        return tuple(zip(*[block.cross.keys_values(memory, None) for block in self.blocks], strict=True))

    def extend(self, cache, inputs, positions, mask, lo, hi):
        hidden = self.embed(inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        own = cache.own
        slots = jnp.arange(cache.cross_keys[0].shape[2], dtype=jnp.int32)[None, None]
        visible = slots < cache.lengths[:, None, None]
        if own is None:  # positions are consecutive, so the distances are the same in every row
            bias = self.bias(positions[:1], positions[:1])
        else:
            bias = self.bias(positions, jnp.arange(own.keys[0].shape[2], dtype=jnp.int32)[None])
        for layer in range(lo, hi):
            keys, values = (None, None) if own is None else (own.keys[layer], own.values[layer])
            cross = cache.cross_keys[layer], cache.cross_values[layer]
            with jax.named_scope(f"layer_{layer}"):
                run = layers.recomputed(layers.traced_once(self.blocks[layer]), self.config.remat and own is None)
                hidden, keys, values = run(hidden, positions, mask, keys, values, bias, *cross, visible)
                hidden = meshes.pin_rows(hidden) if own is None else hidden
            if own is not None:
                own = own.with_layer(layer, keys, values).metered(1, hidden.shape[1])
        return hidden, dataclasses.replace(cache, own=own)

    def head(self, hidden):
        config = self.config
        hidden = self.norm(hidden)
        if config.head_scale != 1:
            hidden = hidden * jnp.asarray(config.head_scale, hidden.dtype)
        if config.tied_head:
            return layers.product(hidden, self.embedding[...], jnp.float32)
        return self.unembedding.logits(hidden)


@dataclasses.dataclass(frozen=True)
class EncoderDecoder(LanguageModel):
    """An encoder-decoder: it encodes the prompt once, and its text starts with a start token."""

    config: EncoderDecoderConfig
    module = EncoderDecoderModule
    is_encoder_decoder = True

    def start_text(self, prompt: Sequence[int]) -> list[int]:
        return [self.config.start_token]

    def text_slots(self, prompt_slots: int) -> int:
        return 1

    def start_texts(self, prompts, lengths):
        first = jnp.full((prompts.shape[0], 1), self.config.start_token, prompts.dtype)
        return first, jnp.ones_like(lengths)

    def start(self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int) -> CrossCache:
        with jax.named_scope("encode"):
            cross_keys, cross_values = self.bind(params).remember(prompts, lengths)
        own = kv_cache.zeros(self.config, prompts.shape[0], capacity) if capacity else None
        return CrossCache(own, cross_keys, cross_values, lengths)
