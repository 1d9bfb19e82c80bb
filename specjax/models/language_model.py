"""What every language model is to the rest of the program: init, start, extend, head.

Inside are Flax NNX modules; outside, parameters are a plain nested dict of arrays, so that `jax.jit`, `jax.grad`
and shardings apply to them directly.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.runtime import mesh as meshes

Params = dict

# What a head predicts: the next token, whose loss is the whole loss.
NEXT = ((0, 1.0),)


@functools.cache
def _abstract(module: type, config: Any):
    def shaped():
        rngs = nnx.Rngs(params=0)
        key = rngs.params()
        rngs.params = lambda: key  # shapes ask for no keys of their own, which are most of the time of tracing this
        return module(config, rngs)

    return nnx.split(nnx.eval_shape(shaped))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(module: type, config: Any, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.split(module(config, nnx.Rngs(params=key)))[1])


@dataclasses.dataclass(frozen=True)
class Network:
    """Parameters described once, by an NNX module: their values, shapes and axes follow. Hashable and static.

    Attributes:
      config: what the network is.
    """

    config: Any
    module: ClassVar[type]

    @property
    def num_params(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract_params()))

    def init(self, key: jax.Array) -> Params:
        """Random parameters as a nested dict."""
        return _init(self.module, self.config, key)

    def abstract_params(self) -> Params:
        """The tree of `init` as shapes and dtypes, nothing allocated."""
        return nnx.to_pure_dict(_abstract(self.module, self.config)[1])

    def axes(self, *, replicate: bool = False) -> Params:
        """The tree of `init` with a tuple of logical axis names in place of each array.

        Args:
          replicate: do not split over the tensor axis of a mesh: each of its devices holds all of it.
        """
        named = jax.tree.map(
            lambda variable: variable.get_metadata()["axes"],
            _abstract(self.module, self.config)[1],
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        axes = nnx.to_pure_dict(named)
        return meshes.replicated_over_tensor(axes) if replicate else axes

    def bind(self, params: Params) -> Any:
        """The NNX module with these parameters."""
        return nnx.merge(_abstract(self.module, self.config)[0], params)


@dataclasses.dataclass(frozen=True)
class LanguageModel(Network):
    """A language model: hashable and static; parameters are passed in.

    Positions are absolute and consecutive within a call: `positions[b] = positions[b, 0] + arange(T)`.

    A *text* is what the model continues. Of a decoder-only model it begins with the prompt; an encoder-decoder reads
    the prompt apart, and its text begins with a start token.

    Attributes:
      config: what the model is.
      logits_size: V of the logits where it is not the model's own, see `fitted`.
      is_encoder_decoder: of an encoder-decoder.
      needs_target: whether it runs on another model's parameters beside its own, see `joined`.
      predicts: what `head` gives of each hidden state, one after another: of the token so many places behind the next
        one, with the weight of its loss. Anything but the next token alone is learned, not written with.
    """

    logits_size: int | None = dataclasses.field(default=None, kw_only=True)
    is_encoder_decoder: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    predicts: ClassVar[tuple[tuple[int, float], ...]] = NEXT

    @property
    def layers(self) -> int:
        return self.config.layers

    @property
    def vocab_size(self) -> int:
        """V of the logits."""
        return self.logits_size or self.config.vocab_size

    def with_vocab_size(self, vocab_size: int) -> "LanguageModel":
        """This model, with the same parameters, as a law over the first `vocab_size` ids.

        Models with one tokenizer may pad their embeddings to different sizes. To draft for a model, another has to
        speak of that model's ids: it loses ids beyond them, and gives probability 0 to those that it lacks.
        """
        return dataclasses.replace(self, logits_size=None if vocab_size == self.config.vocab_size else vocab_size)

    @property
    def num_step_params(self) -> int:
        """Parameters read to decode one token: of a table only a row, and the head whole."""
        params = self.abstract_params()
        tables = [params["positions"]] if self.config.learned_positions else []
        tables += [] if self.config.tied_head else [params["embedding"]]
        return self.num_params - sum(math.prod(table.shape) for table in tables)

    def joined(self, params: Params, target_params: Params | None) -> Params:
        """What the model runs with: its own parameters, or those and its target's where it is a part of that."""
        del target_params
        return params

    def check_split(self, mesh: jax.sharding.Mesh) -> None:
        """Raises UserError where heads or vocabulary do not divide evenly over the mesh's tensor axis."""
        config = self.config
        sizes = {"heads": config.heads, "key/value heads": config.kv_heads, "vocabulary": config.vocab_size}
        meshes.check_split({**sizes, "MLP width": config.mlp_width}, mesh)

    def opening(self, prompt: Sequence[int]) -> list[int]:
        """The tokens with which the text of this prompt begins."""
        return list(prompt)

    def text_slots(self, prompt_slots: int) -> int:
        """Columns of `start_texts` for so many columns of prompts."""
        return prompt_slots

    def start_texts(
        self, prompts: Int[Array, "B P"], lengths: Int[Array, "B"]
    ) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """`opening` of a batch: right-padded tokens and their lengths."""
        return prompts, lengths

    def start(self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int) -> Any:
        """What `extend` needs of the prompts: an empty cache (an encoder-decoder encodes them here).

        Args:
          capacity: slots of the cache; with 0 nothing is cached, and `extend` is the plain forward of training (a
            decoder-only model then needs nothing and returns None).

        Raises:
          ValueError: if the texts do not fit the capacity.
        """
        raise NotImplementedError

    def extend(
        self,
        params: Params,
        cache: Any,
        inputs: Int[Array, "B T"] | Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"] | None = None,
        *,
        layers: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs layers `lo..hi-1` on tokens, or on the hidden states that layer `lo - 1` left.

        Args:
          cache: of `start`; keys and values of this call are written at `positions`. Where nothing is cached it is
            the plain causal forward over the T tokens alone.
          inputs: token ids (embedded first), or hidden states to resume from.
          positions: absolute, consecutive in each row.
          mask: further restriction of what is visible (True: may be seen), beside causality.
          layers: the range (lo, hi); all of them when None.

        Returns:
          hidden states after layer `hi - 1`, before the final norm; the cache with this call's slots written.
        """
        lo, hi = layers if layers is not None else (0, self.config.layers)
        return self.bind(params).extend(cache, inputs, positions, mask, lo, hi)

    def head(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and output projection: float32 logits."""
        return fit_logits(self.bind(params).head(hidden), self.vocab_size)

    def normed(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The final norm alone: what `unembed` makes logits of."""
        return self.bind(params).normed(hidden)

    def unembed(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The output projection alone, for hidden states that a norm of the caller's has passed: float32 logits."""
        return fit_logits(self.bind(params).unembed(hidden), self.vocab_size)


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of these ids; an id without a row, of another model's padding, has the last one on every backend."""
    return table.at[tokens].get(mode="clip")


def fit_logits(logits: Float[Array, "... V"], vocab_size: int) -> Float[Array, "... W"]:
    """Logits over the first `vocab_size` ids: what is beyond them goes, what is missing gets probability 0."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab_size]
    return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)


def consecutive(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions 0 .. T - 1 in every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
