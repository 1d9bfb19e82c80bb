"""Attachments: networks trained on the hidden states of a frozen target, such as Kangaroo's adapter and Medusa's heads.

To add one, write a subclass of `Attachment` with its config class in `models`, a drafter in `decoding/drafters`, and a
line in `models.table.ATTACHMENTS`. A user's own class needs no line: `model.init` is then "path/to/file.py:Name".
"""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float, Int, Key

from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import Cache
from specjax.models.language_model import NEXT, LanguageModel, Network, Params, Prediction, consecutive
from specjax.runtime.errors import UserError

States = tuple[Float[Array, "B T D"], ...]


@dataclasses.dataclass(frozen=True)
class AttachmentConfig:
    """Base of the config of an attachment: the fields of a subclass are the keys of its section in a run's config.

    Attributes:
      target: the decoder to which it is attached; sizes and dtypes follow from it.

    Raises:
      UserError: for an encoder-decoder.
    """

    target: DecoderConfig

    def __post_init__(self):
        if type(self.target) is not DecoderConfig:  # an encoder-decoder's config is a subclass
            raise UserError(
                "an adapter attaches to a decoder-only model, not to an encoder-decoder; take another target"
            )

    @classmethod
    def options(cls) -> list[str]:
        """Names of the fields besides the target."""
        return [field.name for field in dataclasses.fields(cls) if field.name != "target"]


@dataclasses.dataclass(frozen=True)
class Attachment(Network):
    """A network that reads hidden states of a frozen target and predicts tokens; it alone is trained.

    Subclasses set `module` (see `Network`), and the attributes below.

    Attributes:
      config: an instance of `config_class`.
      config_class: subclass of AttachmentConfig.
      drafter: what drafts with it: a name of `decoding.drafters.table.DRAFTERS`, or a user's own options class.
      taps: after which of the target's layers it reads states (1 is after the first), in rising order.
      predicts: what `head` predicts at each position, in order. Only an attachment that predicts the next token alone
        can write text in training.
    """

    config: AttachmentConfig
    config_class: ClassVar[type[AttachmentConfig]]
    drafter: ClassVar[str | type]
    predicts: ClassVar[tuple[Prediction, ...]] = NEXT

    @property
    def taps(self) -> tuple[int, ...]:
        raise NotImplementedError

    def init_on(self, key: Key[Array, ""], target: Decoder, target_params: Params) -> Params:
        """Parameters at step 0 of training; here random ones, without regard to the target's."""
        del target, target_params
        return self.init(key)

    def start(self, batch: int, capacity: int) -> Any:
        """An empty cache of this many slots; None if the attachment has no memory."""
        del batch, capacity
        return None

    def extend(
        self, params: Params, cache: Any, states: States, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T E"], Any]:
        """Runs the attachment in decoding; positions are consecutive in each row.

        Args:
          cache: of `start`; None for whole texts, without a cache.
          states: the target's hidden states after each of `taps`.

        Returns:
          what `head` takes; the cache with the slots of this call written.
        """
        raise NotImplementedError

    def training_states(
        self, params: Params, target: Decoder, target_params: Params, states: States, tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        """What `head` takes in training, on whole texts: here `extend` once, without a cache.

        An attachment that drafts from its own outputs overrides this to unroll its steps, each with its own mask, and
        returns the states of all steps joined along the last axis; `predicts` then has one entry for each step.
        """
        del target, target_params
        return self.extend(params, None, states, consecutive(tokens))[0]

    def head(
        self, params: Params, target: Decoder, target_params: Params, hidden: Float[Array, "B T E"]
    ) -> Float[Array, "B T_times_predictions V"]:
        """Float32 logits; those of one position's predictions are adjacent. Here: the target's norm and head."""
        del params
        return target.head(target_params, hidden)


@dataclasses.dataclass(frozen=True)
class AttachedDraft(LanguageModel):
    """The target's layers up to the last tap with an attachment, as one language model: what training needs.

    `init`, `abstract_params`, `axes` and `num_params` are the attachment's. Methods that take parameters take those of
    `runtime_params`, which include the target's.
    """

    attachment: Attachment = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, attachment: Attachment) -> "AttachedDraft":
        """The draft that an attachment makes with its target."""
        return cls(attachment.config.target, attachment=attachment)

    @property
    def target(self) -> Decoder:
        return Decoder(self.config, logits_size=self.logits_size)

    @property
    def predicts(self) -> tuple[Prediction, ...]:
        return self.attachment.predicts

    @property
    def layers(self) -> int:
        return self.attachment.taps[-1]

    @property
    def num_params(self) -> int:
        return self.attachment.num_params

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
        first_layers = Cache(cache.keys[: self.layers], cache.values[: self.layers], cache.meter)
        return first_layers, self.attachment.start(prompts.shape[0], capacity)

    def extend(self, params, cache, inputs, positions, mask=None, *, layers: tuple[int, int] | None = None):
        if layers not in (None, (0, self.layers)):
            raise ValueError(f"an AttachedDraft runs all of its layers, not {layers[0]} to {layers[1]}")
        target_cache, attachment_cache = (None, None) if cache is None else cache
        states, hidden, first = [], inputs, 0
        for tap in self.attachment.taps:
            hidden, target_cache = self.target.extend(
                params["target"], target_cache, hidden, positions, mask, layers=(first, tap)
            )
            states.append(hidden)
            first = tap
        if cache is None:
            networks = params["attachment"], self.target, params["target"]
            return self.attachment.training_states(*networks, tuple(states), inputs), None
        hidden, attachment_cache = self.attachment.extend(
            params["attachment"], attachment_cache, tuple(states), positions
        )
        return hidden, (target_cache, attachment_cache)

    def head(self, params, hidden):
        return self.attachment.head(params["attachment"], self.target, params["target"], hidden)


def runtime_params(model: LanguageModel, params: Params, target_params: Params | None) -> Params:
    """The parameters that a model's `start`, `extend` and `head` take: its own, with the target's for an attachment."""
    return {"attachment": params, "target": target_params} if isinstance(model, AttachedDraft) else params
