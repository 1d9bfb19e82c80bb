"""The decoder-only language model; one implementation serves all families, which differ in their config."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.models import kv_cache, layers
from specjax.models.block import Block
from specjax.models.config import DecoderConfig
from specjax.models.language_model import LanguageModel, Params, consecutive, look_up
from specjax.models.rotary import angles, text_lengths
from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError


class DecoderModule(nnx.Module):
    """Parameters and forward pass of a decoder."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        dtype = dtype_named(config.float_dtype)
        inner = config.embedding_width or config.width
        embedding = jax.random.normal(rngs.params(), (config.vocab_size, inner), jnp.float32)
        self.embedding = nnx.Param((embedding * inner**-0.5).astype(dtype), axes=("vocab", "embed"))
        make = functools.partial(layers.Linear, dtype=config.float_dtype, rngs=rngs)
        if config.embedding_width:
            self.project_in = make(inner, config.width, ("embed", None), inner**-0.5)
            self.project_out = make(config.width, inner, (None, "embed"), config.width**-0.5)
        if config.learned_positions:
            table = jax.random.normal(rngs.params(), (config.learned_positions, config.width), jnp.float32)
            self.positions = nnx.Param((table * config.width**-0.5).astype(dtype), axes=(None, "embed"))
        self.blocks = nnx.List([Block(config, layer, rngs) for layer in range(config.layers)])
        self.norm = layers.Norm(config, config.width) if config.final_norm else None
        if not config.tied_head:
            columns = len(config.draft_vocabulary) if config.draft_vocabulary else config.vocab_size
            self.unembedding = make(inner, columns, ("embed", "vocab"), inner**-0.5)
        self.config = config

    def embed(self, tokens, positions):
        config, dtype = self.config, dtype_named(self.config.compute_dtype)
        hidden = look_up(self.embedding[...], tokens).astype(dtype)
        if config.embedding_scale != 1:
            hidden = hidden * jnp.asarray(config.embedding_scale, dtype)
        if config.embedding_width:
            hidden = self.project_in(hidden)
        if config.learned_positions:
            hidden = hidden + self.positions[...][positions + config.position_offset].astype(dtype)
        return hidden

    def extend(self, cache, inputs, positions, mask, lo, hi, routed=None, prepare=None):
        """See `LanguageModel.extend`; `prepare` makes a function of a layer, by default `traced_once`."""
        config, prepare = self.config, prepare or layers.traced_once
        hidden = self.embed(inputs, positions) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        if cache is None:
            lengths = jnp.broadcast_to(jnp.max(positions, axis=1, keepdims=True) + 1, positions.shape)
        else:
            lengths = text_lengths(positions, cache.prompt_lengths)
        cosine_sine = lambda rotary: None if rotary is None else angles(rotary, positions, lengths)
        everywhere, local = cosine_sine(config.rotary), cosine_sine(config.local_rotary)
        # For whole texts, each device keeps its rows and gathers weights; in decoding, the few tokens are sent instead.
        pin = meshes.pin_rows if cache is None else lambda x: x
        hidden = pin(hidden)
        for layer in range(lo, hi):
            keys, values = (None, None) if cache is None else (cache.keys[layer], cache.values[layer])
            rotation = local if local is not None and config.window(layer) else everywhere
            rotation = rotation if config.uses_rotary(layer) else None
            with jax.named_scope(f"layer_{layer}"):
                block = layers.recomputed(prepare(self.blocks[layer]), config.remat and cache is None)
                hidden, keys, values, logits = block(hidden, rotation, positions, mask, keys, values)
                hidden = pin(hidden)
            if routed is not None:
                routed += logits
            if cache is not None:
                cache = cache.with_layer(layer, keys, values).metered(1, hidden.shape[1])
        return hidden, cache

    def head(self, hidden):
        return self.unembed(self.normed(hidden))

    def normed(self, hidden):
        return hidden if self.norm is None else self.norm(hidden)

    def unembed(self, hidden):
        config = self.config
        if config.embedding_width:
            hidden = self.project_out(hidden)
        if config.tied_head:
            logits = layers.product(hidden, self.embedding[...], jnp.float32)
        else:
            logits = self.unembedding.logits(hidden)
        if config.logit_divisor != 1:
            logits = logits / config.logit_divisor
        if config.final_softcap:
            logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
        return logits


@dataclasses.dataclass(frozen=True)
class Decoder(LanguageModel):
    """A decoder-only language model."""

    config: DecoderConfig
    module = DecoderModule

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        return self.config.draft_vocabulary

    @property
    def drafter(self) -> str:
        return "model" if self.config.mask_id is None else "pard"

    @property
    def is_sparse(self) -> bool:
        return any(map(self.config.is_sparse, range(self.config.layers)))

    def routed(
        self, params: Params, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], list[Float[Array, "B T E"]]]:
        """`extend` of whole texts without a cache: hidden states, and each router's logits."""
        logits = []
        positions = consecutive(tokens)
        hidden, _ = self.bind(params).extend(None, tokens, positions, None, 0, self.config.layers, logits)
        return hidden, logits

    def reduced(self, vocabulary):
        if vocabulary is None:
            return self
        if self.vocabulary is not None and (absent := np.setdiff1d(vocabulary.ids, self.vocabulary.ids)).size:
            raise UserError(
                f"the head has only {len(self.vocabulary)} ids, and id {absent[0]} of the draft vocabulary is not one "
                "of them; leave vocabulary out"
            )
        config = dataclasses.replace(self.config, draft_vocabulary=vocabulary, tied_head=False)
        return dataclasses.replace(self, config=config)

    def head_kernel(self, params, vocabulary):
        if vocabulary is None:
            return None
        if self.config.tied_head:
            return params["embedding"][vocabulary.ids]
        ids = vocabulary.ids
        rows = ids if self.vocabulary is None else np.searchsorted(self.vocabulary.ids, ids)
        return params["unembedding"]["kernel"][rows]

    def start(
        self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int
    ) -> kv_cache.Cache | None:
        del params
        if capacity == 0:
            return None
        if prompts.shape[1] > capacity:
            raise ValueError(f"prompts of {prompts.shape[1]} tokens do not fit a cache of {capacity} slots")
        by_length = any(rotary and rotary.by_length for rotary in (self.config.rotary, self.config.local_rotary))
        return kv_cache.zeros(self.config, prompts.shape[0], capacity, lengths if by_length else None)
