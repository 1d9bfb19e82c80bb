"""The decoder-only language model behind one small interface: init, start, extend, head.

Inside are Flax NNX modules; outside, parameters are a plain nested dict of arrays, so that `jax.jit`, `jax.grad`
and shardings apply to them directly.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.models import kv_cache, layers
from specjax.models.config import DecoderConfig
from specjax.models.rotary import angles
from specjax.runtime.dtypes import dtype_named

Params = dict


class DecoderModule(nnx.Module):
    """The parameters of a decoder and what is computed with them."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        dtype = dtype_named(config.param_dtype)
        inner = config.embedding_width or config.width
        embedding = jax.random.normal(rngs.params(), (config.vocab_size, inner), jnp.float32)
        self.embedding = nnx.Param((embedding * inner**-0.5).astype(dtype), axes=("vocab", "embed"))
        make = functools.partial(layers.Linear, dtype=config.param_dtype, rngs=rngs)
        if config.embedding_width:
            self.project_in = make(inner, config.width, ("embed", None), inner**-0.5)
            self.project_out = make(config.width, inner, (None, "embed"), config.width**-0.5)
        if config.learned_positions:
            table = jax.random.normal(rngs.params(), (config.learned_positions, config.width), jnp.float32)
            self.positions = nnx.Param((table * config.width**-0.5).astype(dtype), axes=(None, "embed"))
        self.blocks = nnx.List([layers.Block(config, layer, rngs) for layer in range(config.layers)])
        self.norm = layers.make_norm(config, config.width) if config.final_norm else None
        if not config.tied_head:
            self.unembedding = make(inner, config.vocab_size, ("embed", "vocab"), inner**-0.5)
        self.config = config

    def embed(self, tokens, positions):
        config, dtype = self.config, dtype_named(self.config.compute_dtype)
        hidden = self.embedding[...][tokens].astype(dtype)
        if config.embedding_scale != 1:
            hidden = hidden * jnp.asarray(config.embedding_scale, dtype)
        if config.embedding_width:
            hidden = self.project_in(hidden)
        if config.learned_positions:
            hidden = hidden + self.positions[...][positions + config.position_offset].astype(dtype)
        return hidden

    def extend(self, cache, inputs, positions, mask, lo, hi):
        config = self.config
        hidden = self.embed(inputs, positions) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        capacity = inputs.shape[1] if cache is None else cache.capacity
        turn = lambda rotary: None if rotary is None else angles(rotary, positions, capacity)
        everywhere, local = turn(config.rotary), turn(config.local_rotary)
        for layer in range(lo, hi):
            keys, values = (None, None) if cache is None else (cache.keys[layer], cache.values[layer])
            turned = local if local is not None and config.window(layer) else everywhere
            with jax.named_scope(f"layer_{layer}"):
                hidden, keys, values = self.blocks[layer](hidden, turned, positions, mask, keys, values)
            if cache is not None:
                cache = cache.with_layer(layer, keys, values)
        return hidden, cache

    def head(self, hidden):
        config = self.config
        hidden = hidden if self.norm is None else self.norm(hidden)
        if config.embedding_width:
            hidden = self.project_out(hidden)
        if config.tied_head:
            kernel = self.embedding[...].astype(hidden.dtype)
            logits = jnp.einsum("BTD,VD->BTV", hidden, kernel, preferred_element_type=jnp.float32)
        else:
            logits = self.unembedding(hidden).astype(jnp.float32)
        if config.final_softcap:
            logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
        return logits


@functools.cache
def _abstract(config: DecoderConfig):
    return nnx.split(nnx.eval_shape(lambda: DecoderModule(config, nnx.Rngs(params=0))))


@functools.partial(jax.jit, static_argnums=0)
def _init(config: DecoderConfig, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.split(DecoderModule(config, nnx.Rngs(params=key)))[1])


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder-only language model: hashable and static; parameters are passed in.

    Positions are absolute and consecutive within a call: `positions[b] = positions[b, 0] + arange(T)`.
    """

    config: DecoderConfig

    @property
    def layers(self) -> int:
        return self.config.layers

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_params(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract_params()))

    @property
    def num_step_params(self) -> int:
        """Parameters read to decode one token: of a table only a row, and the head whole."""
        params = self.abstract_params()
        tables = [params["positions"]] if self.config.learned_positions else []
        tables += [] if self.config.tied_head else [params["embedding"]]
        return self.num_params - sum(math.prod(table.shape) for table in tables)

    def init(self, key: jax.Array) -> Params:
        """Random parameters as a nested dict."""
        return _init(self.config, key)

    def abstract_params(self) -> Params:
        """The tree of `init` as shapes and dtypes, nothing allocated."""
        return nnx.to_pure_dict(_abstract(self.config)[1])

    def axes(self) -> Params:
        """The tree of `init` with a tuple of logical axis names in place of each array."""
        named = jax.tree.map(
            lambda variable: variable.get_metadata()["axes"],
            _abstract(self.config)[1],
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        return nnx.to_pure_dict(named)

    def start(
        self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int
    ) -> kv_cache.Cache:
        """An empty cache for these prompts (an encoder-decoder would encode them here).

        Raises:
          ValueError: if the prompts do not fit the capacity.
        """
        del params, lengths
        if prompts.shape[1] > capacity:
            raise ValueError(f"Prompts of {prompts.shape[1]} tokens do not fit a cache of {capacity} slots.")
        return kv_cache.zeros(self.config, prompts.shape[0], capacity, dtype_named(self.config.compute_dtype))

    def extend(
        self,
        params: Params,
        cache: kv_cache.Cache | None,
        inputs: Int[Array, "B T"] | Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"] | None = None,
        *,
        layers: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "B T D"], kv_cache.Cache | None]:
        """Runs layers `lo..hi-1` on tokens, or on the hidden states that layer `lo - 1` left.

        Args:
          cache: keys and values of earlier tokens; those of this call are written at `positions`. None is the
            plain causal forward over the T tokens alone.
          inputs: token ids (embedded first), or hidden states to resume from.
          positions: absolute, consecutive in each row.
          mask: further restriction of what is visible (True: may be seen), beside causality.
          layers: the range (lo, hi); all of them when None.

        Returns:
          hidden states after layer `hi - 1`, before the final norm; the cache with this call's slots written.
        """
        lo, hi = layers if layers is not None else (0, self.config.layers)
        module = nnx.merge(_abstract(self.config)[0], params)
        return module.extend(cache, inputs, positions, mask, lo, hi)

    def head(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and output projection: float32 logits."""
        return nnx.merge(_abstract(self.config)[0], params).head(hidden)
