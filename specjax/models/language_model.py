"""The interface of every language model: init, start, extend, head.

Models are implemented as Flax NNX modules. Callers see parameters as a nested dict of arrays, so that `jax.jit`,
`jax.grad` and shardings apply to them directly.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import QUANTISED
from specjax.runtime.errors import UserError

Params = dict


class Prediction(NamedTuple):
    """One of the tokens that a head predicts at each position.

    Attributes:
      offset: position of the predicted token relative to the next token; 0 is the next token.
      weight: weight of this prediction in the loss.
    """

    offset: int
    weight: float


# The prediction of an ordinary language model: the next token.
NEXT = (Prediction(0, 1.0),)


@functools.cache
def _abstract(module: type, config: Any):
    def shaped():
        rngs = nnx.Rngs(params=0)
        key = rngs.params()
        rngs.params = lambda: key  # shapes do not depend on the key, and splitting it takes most of the tracing time
        return module(config, rngs)

    return nnx.split(nnx.eval_shape(shaped))


def count(shapes: Params) -> int:
    """Number of values in a tree of arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without parameters, hashable and static. Initial values, shapes and axes come from its NNX module.

    Attributes:
      config: sizes and options, hashable.
      module: NNX class, constructed as `module(config, rngs)`.
    """

    config: Any
    module: ClassVar[type]

    @property
    def num_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        return count(self.abstract_params())

    def init(self, key: jax.Array) -> Params:
        """Random parameters as a nested dict, drawn one by one: to compile a program for all takes seconds."""
        return nnx.to_pure_dict(nnx.split(self.module(self.config, nnx.Rngs(params=key)))[1])

    def abstract_params(self) -> Params:
        """The tree of `init` as shapes and dtypes; nothing is allocated."""
        return nnx.to_pure_dict(_abstract(self.module, self.config)[1])

    def axes(self, *, replicate: bool = False) -> Params:
        """The tree of `init` with a tuple of logical axis names in place of each array.

        Args:
          replicate: every device of a mesh's tensor axis holds all parameters.
        """
        named = jax.tree.map(
            lambda variable: variable.get_metadata()["axes"],
            _abstract(self.module, self.config)[1],
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        axes = nnx.to_pure_dict(named)
        return meshes.replicated_over_tensor(axes) if replicate else axes

    def shardings(self, mesh: meshes.AnyMesh, *, replicate: bool = False) -> Params:
        """The tree of `axes` with shardings in place of names; logs what the mesh's tensor axis does not divide.

        Raises:
          UserError: if the mesh's axis `fsdp` does not divide the width.
        """
        shapes, axes = self.abstract_params(), self.axes(replicate=replicate)
        meshes.report_replicated(axes, shapes, mesh)
        return meshes.shardings(axes, mesh, shapes=shapes)

    def bind(self, params: Params) -> Any:
        """The NNX module with these parameters."""
        return nnx.merge(_abstract(self.module, self.config)[0], params)


@dataclasses.dataclass(frozen=True)
class LanguageModel(Network):
    """A language model, hashable and static; parameters are passed to its methods.

    Positions are absolute and consecutive within a call: `positions[b] = positions[b, 0] + arange(T)`.

    A *text* is what the model continues. The text of a decoder-only model starts with the prompt. An encoder-decoder
    encodes the prompt separately, and its text starts with a start token.

    Attributes:
      config: sizes and options.
      logits_size: V of the logits; None for the config's vocabulary size. See `with_vocab_size`.
      is_encoder_decoder: whether prompts are encoded separately.
      drafter: the drafter that uses it as a draft model, a key of `decoding.drafters.table.DRAFTERS`.
      predicts: the predictions of `column_logits` at each position, in order.
      confident: whether `confidence` is defined.
    """

    logits_size: int | None = dataclasses.field(default=None, kw_only=True)
    is_encoder_decoder: ClassVar[bool] = False
    drafter: ClassVar[str] = "model"
    predicts: ClassVar[tuple[Prediction, ...]] = NEXT
    confident: ClassVar[bool] = False

    @property
    def layers(self) -> int:
        return self.config.layers

    @property
    def unquantised(self) -> "LanguageModel":
        """This model with all parameters in float."""
        if self.config.param_dtype not in QUANTISED:
            return self
        return dataclasses.replace(self, config=self.config.unquantised)

    @property
    def num_params(self) -> int:
        """Number of parameters, whatever their dtype; a tied head counts once."""
        return count(self.unquantised.abstract_params())

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        """The ids of a reduced head, to which the columns of `column_logits` belong; None if it has all ids."""
        return None

    @property
    def vocab_size(self) -> int:
        """V of the logits."""
        return self.logits_size or self.config.vocab_size

    def with_vocab_size(self, vocab_size: int) -> "LanguageModel":
        """This model, with the same parameters, with logits for `vocab_size` ids.

        Models with the same tokenizer may pad their embeddings to different sizes, and a draft's logits need the
        target's size: further ids are dropped, and ids that the draft lacks get probability 0.
        """
        return dataclasses.replace(self, logits_size=None if vocab_size == self.config.vocab_size else vocab_size)

    def with_remat(self, remat: bool) -> "LanguageModel":
        """This model, whose backward pass computes each layer again if `remat` is true, see `DecoderConfig`."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, remat=remat))

    def reduced(self, vocabulary: DraftVocabulary | None) -> "LanguageModel":
        """This model with a head over the ids of `vocabulary` alone, see `reduced_params`; unchanged for None.

        Raises:
          UserError: for an encoder-decoder.
        """
        if vocabulary is not None:
            raise UserError("only a decoder-only model can draft from a reduced vocabulary; leave vocabulary out")
        return self

    def head_kernel(self, params: Params, vocabulary: DraftVocabulary | None) -> Float[Array, "W D"] | None:
        """The columns of the head for the ids of `vocabulary`; None for None."""
        self.reduced(vocabulary)

    def reduced_params(self, params: Params, kernel: Float[Array, "W D"] | None) -> Params:
        """The parameters of the `reduced` model, whose head is `kernel`; unchanged for None."""
        return params if kernel is None else {**params, "unembedding": {"kernel": kernel}}

    @property
    def num_step_params(self) -> int:
        """Parameters read to decode one token: all but the embedding tables, of which only one row is read."""
        params = self.unquantised.abstract_params()
        tables = [params["positions"]] if self.config.learned_positions else []
        tables += [] if self.config.tied_head else [params["embedding"]]
        return self.num_params - sum(math.prod(table.shape) for table in tables)

    def start_text(self, prompt: Sequence[int]) -> list[int]:
        """The tokens with which the text of this prompt starts: the prompt itself, or a start token."""
        return list(prompt)

    def text_slots(self, prompt_slots: int) -> int:
        """Number of columns of `start_texts` for prompts of `prompt_slots` columns."""
        return prompt_slots

    def start_texts(
        self, prompts: Int[Array, "B P"], lengths: Int[Array, "B"]
    ) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """`start_text` for a batch: right-padded tokens, and their lengths."""
        return prompts, lengths

    def start(self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int) -> Any:
        """The empty cache that the first `extend` takes. An encoder-decoder encodes the prompts here.

        Args:
          capacity: number of cache slots per row; 0 if whole texts are computed without a cache, as in training. A
            decoder-only model then returns None.

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
        """Runs layers `lo..hi-1` on tokens, or on the hidden states after layer `lo - 1`.

        Args:
          cache: as `start` or `extend` returns it; keys and values of this call are written at `positions`. Without a
            cache, the T tokens attend causally to each other only.
          inputs: token ids, which are embedded first, or hidden states to resume from.
          positions: absolute, consecutive in each row.
          mask: False where a query must not attend to a slot, in addition to causality.
          layers: the range (lo, hi); None for all layers.

        Returns:
          hidden states after layer `hi - 1`, before the final norm; the cache with the slots of this call written.
        """
        lo, hi = layers if layers is not None else (0, self.config.layers)
        return self.bind(params).extend(cache, inputs, positions, mask, lo, hi)

    @property
    def is_sparse(self) -> bool:
        """Whether this model has routers of its own, whose use of experts training should balance."""
        return False

    def training_states(
        self, params: Params, start: Any, tokens: Int[Array, "B T"], anchors: Int[Array, "B K"] | None = None
    ) -> Float[Array, "B K E"]:
        """The input of `column_logits` in training, at these positions of whole texts; None for all.

        Args:
          start: as `start` returns it for capacity 0.
        """
        return at_positions(self.extend(params, start, tokens, consecutive(tokens))[0], anchors)

    def column_logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """Final norm and output projection: float32 logits, of a reduced head only those of the ids in `vocabulary`."""
        return self._fitted(self.bind(params).head(hidden))

    def head(self, params: Params, hidden: Float[Array, "B T E"]) -> Float[Array, "B T_times_predictions V"]:
        """`column_logits`, with -inf for ids that a reduced head lacks."""
        logits = self.column_logits(params, hidden)
        return logits if self.vocabulary is None else self.vocabulary.spread(logits, self.vocab_size, -jnp.inf)

    def confidence(self, params: Params, hidden: Float[Array, "B T E"]) -> Float[Array, "B T_times_predictions"]:
        """Of each prediction, the logit of the probability that the target accepts it, as a draft's own head estimates
        it from what `column_logits` takes. Gradients reach that head alone."""
        raise NotImplementedError

    def normed(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The final norm alone; `unembed` takes its output."""
        return self.bind(params).normed(hidden)

    def unembed(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The output projection alone, on normalised hidden states: float32 logits, of a reduced head W columns."""
        return self._fitted(self.bind(params).unembed(hidden))

    def _fitted(self, logits):
        return logits if self.vocabulary is not None else fit_logits(logits, self.vocab_size)


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The embeddings of these ids; an id past the table (another model's padding) gets the last row.

    XLA's CPU compiler looks rows of bfloat16 up in float32. In a loop it would convert the whole table before the first
    step, which takes longer than a step of decoding: SmolLM2 took 50 ms. A barrier with the tokens, which change from
    step to step, keeps the conversion in the loop, of the rows alone.
    """
    if meshes.platform() == "cpu":
        table, tokens = jax.lax.optimization_barrier((table, tokens))
    return table.at[tokens].get(mode="clip")


def fit_logits(logits: Float[Array, "... V"], vocab_size: int) -> Float[Array, "... W"]:
    """Logits over the first `vocab_size` ids: further ids are dropped, missing ones get probability 0."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab_size]
    return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)


def at_positions(array: Array, positions: Int[Array, "B K"] | None) -> Array:
    """[B, T, ...] -> [B, K, ...]: the entries at these positions of each row; all for None."""
    return array if positions is None else jax.vmap(lambda row, places: row[places])(array, positions)


def states_after(
    model: "LanguageModel", params: Params, tokens: Int[Array, "B T"], layers: Sequence[int]
) -> list[Float[Array, "B T D"]]:
    """The hidden states of whole texts after each of these numbers of layers, in ascending order."""
    return extend_through(model, params, None, tokens, consecutive(tokens), layers)[0]


def extend_through(
    model: "LanguageModel", params: Params, cache: Any, inputs, positions, layers: Sequence[int], mask=None, *, first=0
) -> tuple[list[Float[Array, "B T D"]], Any]:
    """`LanguageModel.extend` from layer `first` on, stopped after each of these numbers of layers, in ascending order.

    Returns:
      the hidden states there, and the cache.
    """
    states = []
    for layer in layers:
        inputs, cache = model.extend(params, cache, inputs, positions, mask, layers=(first, layer))
        states.append(inputs)
        first = layer
    return states, cache


def consecutive(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions 0 .. T - 1 in every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
