"""Attachments: networks trained on a frozen target's hidden states, such as Kangaroo's adapter and Medusa's heads.

To add one, write a subclass of `Attachment` with its config class in `models`, a drafter in `decoding/drafters`, and a
line in `models.table.ATTACHMENTS`. A user's own class needs no line: `model.init` is then "path/to/file.py:Name".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.language_model import (
    NEXT,
    LanguageModel,
    Network,
    Params,
    Prediction,
    at_positions,
    consecutive,
    extend_through,
)
from specjax.models.layers import Linear, recomputed
from specjax.models.least_squares import Moments
from specjax.models.rotary import Rotary
from specjax.models.vocabulary import DraftVocabulary, draft_vocabulary
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError

States = tuple[Float[Array, "B T D"], ...]

# Rotary base of a layer whose target has no rotary positions.
_THETA = 1e4


@dataclasses.dataclass(frozen=True)
class AttachmentConfig:
    """Base class of an attachment's config; the fields of a subclass are the keys of its section in a run's config.

    Attributes:
      target: config of the target; sizes and dtypes of the attachment follow from it.
      vocabulary: the only ids that it can draft; None or "" for all. See `models.vocabulary.draft_vocabulary`.
      without_key: names of the fields that a run's config does not set.

    Raises:
      UserError: for an encoder-decoder, and for a vocabulary that is not part of the target's.
    """

    target: DecoderConfig
    vocabulary: DraftVocabulary | Sequence[int] | str | None = dataclasses.field(default=None, kw_only=True)
    without_key: ClassVar[tuple[str, ...]] = ("target",)

    def __post_init__(self):
        object.__setattr__(self, "vocabulary", draft_vocabulary(self.vocabulary))
        if self.vocabulary is not None:
            self.vocabulary.check(self.target.vocab_size)
        if type(self.target) is not DecoderConfig:  # an encoder-decoder's config is a subclass
            raise UserError(
                "an adapter attaches to a decoder-only model, not to an encoder-decoder; take another target"
            )

    @property
    def max_positions(self) -> int:
        """The number of positions that it was made for."""
        return self.target.max_positions

    def one_layer(self, **changes: Any) -> DecoderConfig:
        """A decoder of one layer with the target's sizes and rotary positions, RMS norms and no biases."""
        names = ("vocab_size", "width", "heads", "kv_heads", "head_size", "mlp_width", "max_positions", "norm_epsilon")
        same = {name: getattr(self.target, name) for name in names}
        rotary = self.target.rotary or Rotary(_THETA, self.target.head_size)
        return DecoderConfig(**{"layers": 1, "rotary": rotary, "tied_head": False, **same, **self._computed, **changes})

    def computed_as_target(self, layer: DecoderConfig) -> DecoderConfig:
        """This layer in the target's dtypes, computed again in the backward pass if the target's layers are."""
        return dataclasses.replace(layer, **self._computed)

    @property
    def _computed(self) -> dict[str, Any]:
        target = self.target
        return {"param_dtype": target.float_dtype, "compute_dtype": target.compute_dtype, "remat": target.remat}

    @classmethod
    def options(cls) -> list[str]:
        """Names of the fields that a run's config sets."""
        return [field.name for field in dataclasses.fields(cls) if field.name not in cls.without_key]

    def own_head_layer(self, rngs: nnx.Rngs, width: int) -> Linear:
        """A projection from states of this width to the ids that it can draft, which a module trains."""
        columns = len(self.vocabulary or range(self.target.vocab_size))
        return Linear(width, columns, ("embed", "vocab"), width**-0.5, self.target.float_dtype, rngs)


@dataclasses.dataclass(frozen=True)
class Attachment(Network):
    """A trained network that predicts tokens from hidden states of a frozen target.

    Subclasses set `module` (see `Network`), and the attributes below.

    Attributes:
      config: an instance of `config_class`.
      config_class: subclass of AttachmentConfig.
      drafter: the drafter that uses it: a key of `decoding.drafters.table.DRAFTERS`, or a user's own options class.
      taps: it reads the target's hidden states after this many layers, for each entry; in ascending order.
      predicts: the predictions of `head` at each position, in order. Text for on-policy training can be generated only
        with an attachment whose single prediction is the next token.
      writes: whether `extend` is defined, which writing text needs too.
      anchored: whether `training_states` takes anchors, so that it computes nothing for other positions.
      confident: whether `confidence` is defined, see `LanguageModel`.
    """

    config: AttachmentConfig
    config_class: ClassVar[type[AttachmentConfig]]
    drafter: ClassVar[str | type]
    predicts: ClassVar[tuple[Prediction, ...]] = NEXT
    writes: ClassVar[bool] = True
    anchored: ClassVar[bool] = False
    confident: ClassVar[bool] = False

    @property
    def taps(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        """The ids of the columns of `head`; None for all."""
        return self.config.vocabulary

    def reduced(self, params: Params, vocabulary: DraftVocabulary) -> tuple["Attachment", Params]:
        """This attachment, which has all ids, with these alone: its own heads, named `unembedding`, are cut to them."""
        if self.vocabulary is not None:
            raise UserError("the adapter was trained with a draft vocabulary; leave vocabulary out")

        def cut(path, array):
            own_head = any(entry.key == "unembedding" for entry in path)
            return array[vocabulary.ids] if own_head else array

        config = dataclasses.replace(self.config, vocabulary=vocabulary)
        return dataclasses.replace(self, config=config), jax.tree_util.tree_map_with_path(cut, params)

    def unrolled(self, count: int) -> "Attachment":
        """This attachment, predicting at each position all of the next `count` tokens that it would draft from there.

        One whose single prediction depends on the text alone stays as it is.

        Raises:
          UserError: if it drafts fewer tokens.
        """
        if self.most_drafted is not None and self.most_drafted < count:
            raise UserError(f"the draft drafts at most {self.most_drafted} tokens, not {count}; take smaller gammas")
        return self

    @property
    def most_drafted(self) -> int | None:
        """The largest number of tokens that it can draft in a block; None if there is none, as for one whose prediction
        depends on the text alone."""
        return None if self.predicts == NEXT and self.writes else len(self.predicts)

    def init_on(self, key: Key[Array, ""], target: Decoder, target_params: Params) -> Params:
        """Parameters at step 0 of training; random by default, independent of the target's parameters."""
        del target, target_params
        return self.init(key)

    def head_of_target(self, target: Decoder, target_params: Params) -> dict[str, Array]:
        """The target's output projection, with the rows of the `vocabulary` alone, to start an own head from."""
        config = self.config.target
        unit = jnp.eye(config.width, dtype=jnp.float32)[None]
        kernel = target.with_vocab_size(config.vocab_size).unembed(target_params, unit)[0]
        if self.vocabulary is not None:
            kernel = kernel[:, self.vocabulary.ids]
        return {"kernel": kernel.T.astype(dtype_named(config.float_dtype))}

    @property
    def fitted_batches(self) -> int:
        """Number of batches that it is fitted to before step 0 of training; 0 if it starts as `init_on` says."""
        return 0

    def regression(
        self, params: Params, target: Decoder, target_params: Params, states: States, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T F"], Float[Array, "B T G"]]:
        """The inputs and the goals at each token of whole texts whose `Moments` are the argument of `fitted`.

        Args:
          states: the target's after each of `taps`, and after its last layer.
        """
        raise NotImplementedError

    def fitted(self, params: Params, moments: Moments) -> Params:
        """Parameters at step 0, from those of `init_on` and the moments over `fitted_batches` batches; all are numpy
        arrays."""
        raise NotImplementedError

    def start(self, batch: int, capacity: int) -> Any:
        """An empty cache with `capacity` slots for `batch` rows; None if the attachment needs no cache."""
        del batch, capacity
        return None

    def extend(
        self, params: Params, cache: Any, states: States, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T E"], Any]:
        """Runs the attachment in decoding; positions are consecutive in each row.

        Args:
          cache: as `start` returns it; None for whole texts without a cache.
          states: for each of `taps` the target's hidden states `[B, T, D]`.

        Returns:
          the input of `head`; the cache with the slots of this call written.
        """
        raise NotImplementedError

    def training_states(
        self, params: Params, target: Decoder, target_params: Params, states: States, tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        """The input of `head` in training, on whole texts; by default one `extend` without a cache.

        An attachment that drafts from its own outputs overrides this to unroll its steps, each with its own mask. It
        concatenates the states of all steps along the last axis, and `predicts` has one entry per step. One that is
        `anchored` takes as last argument the positions `[B, K]` to draft from, or None for all.
        """
        del target, target_params
        extend = lambda *states: self.extend(params, None, states, consecutive(tokens))[0]
        return recomputed(extend, self.config.target.remat)(*states)

    def head(
        self, params: Params, target: Decoder, target_params: Params, hidden: Float[Array, "B T E"]
    ) -> Float[Array, "B T_times_predictions W"]:
        """Float32 logits, with the predictions of a position adjacent; by default the target's final norm and head.

        If the config has a `vocabulary`, W is the number of its ids, and `target` is the target with its head reduced
        to them.
        """
        del params
        return target.column_logits(target_params, hidden)


@dataclasses.dataclass(frozen=True)
class AttachedDraft(LanguageModel):
    """The target's layers up to the last tap and an attachment, as one language model for training.

    `init`, `abstract_params`, `axes` and `num_params` are the attachment's. Methods with a `params` argument take the
    result of `runtime_params`, which includes the target's parameters.
    """

    attachment: Attachment = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, attachment: Attachment) -> "AttachedDraft":
        """The draft that consists of an attachment and its target's first layers."""
        return cls(attachment.config.target, attachment=attachment)

    @property
    def target(self) -> Decoder:
        """The target, whose head is reduced if the attachment's vocabulary is; `runtime_params` has its parameters."""
        return Decoder(self.config, logits_size=self.logits_size).reduced(self.vocabulary)

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        return self.attachment.vocabulary

    @property
    def predicts(self) -> tuple[Prediction, ...]:
        return self.attachment.predicts

    @property
    def confident(self) -> bool:
        return self.attachment.confident

    def with_remat(self, remat: bool) -> "AttachedDraft":
        config = dataclasses.replace(self.attachment.config, target=dataclasses.replace(self.config, remat=remat))
        return AttachedDraft.of(dataclasses.replace(self.attachment, config=config))

    @property
    def layers(self) -> int:
        return self.attachment.taps[-1]

    def init(self, key) -> Params:
        return self.attachment.init(key)

    def abstract_params(self) -> Params:
        return self.attachment.abstract_params()

    def axes(self, *, replicate: bool = False) -> Params:
        return self.attachment.axes(replicate=replicate)

    def start(self, params, prompts, lengths, capacity: int) -> Any:
        cache = self.target.start(params["target"], prompts, lengths, capacity)
        if cache is None:
            return None
        return cache.first(self.layers), self.attachment.start(prompts.shape[0], capacity)

    def extend(self, params, cache, inputs, positions, mask=None, *, layers: tuple[int, int] | None = None):
        assert layers in (None, (0, self.layers)), "an AttachedDraft runs all of its layers"
        target_cache, attachment_cache = (None, None) if cache is None else cache
        states, target_cache = self._states(params, target_cache, inputs, positions, mask)
        if cache is None:
            return self.from_states(params, states, inputs), None
        hidden, attachment_cache = self.attachment.extend(params["attachment"], attachment_cache, states, positions)
        return hidden, (target_cache, attachment_cache)

    def _states(self, params, target_cache, hidden, positions, mask=None):
        """The target's states at the attachment's taps, and the target's cache."""
        arguments = params["target"], target_cache, hidden, positions, self.attachment.taps, mask
        states, target_cache = extend_through(self.target, *arguments)
        return tuple(states), target_cache

    def training_states(self, params, start, tokens, anchors=None):
        return self.from_states(params, self._states(params, start, tokens, consecutive(tokens))[0], tokens, anchors)

    def from_states(
        self, params, states: States, tokens: Int[Array, "B T"], anchors: Int[Array, "B K"] | None = None
    ) -> Float[Array, "B K E"]:
        """`training_states` from the target's states at the attachment's taps."""
        arguments = params["attachment"], self.target, params["target"], states, tokens
        if self.attachment.anchored:
            return self.attachment.training_states(*arguments, anchors)
        return at_positions(self.attachment.training_states(*arguments), anchors)

    def confidence(self, params, hidden):
        return self.attachment.confidence(params["attachment"], hidden)

    def column_logits(self, params, hidden):
        return self.attachment.head(params["attachment"], self.target, params["target"], hidden)


def runtime_params(model: LanguageModel, params: Params, target_params: Params | None) -> Params:
    """The `params` of `start`, `extend` and `head`: the model's own, and for an AttachedDraft also the target's."""
    if not isinstance(model, AttachedDraft):
        return params
    full = Decoder(model.config)
    kernel = full.head_kernel(target_params, model.vocabulary)
    return {"attachment": params, "target": full.reduced_params(target_params, kernel)}
