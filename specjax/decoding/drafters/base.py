"""The contract between the decoding loop and whatever proposes tokens.

A drafter is a hashable static object; its parameters and state are pytrees. It may read and advance the target's cache,
which is how self-drafts share the target's first layers. Its state is best a dataclass whose fields declare the logical
axes of their arrays (`runtime.mesh.axes`); arrays without declared axes are whole on every device of a mesh.

A drafter may stop early (`num_drafted < gamma`), judging by distributions and earlier tokens, never by the value of the
token that it drops: that would change the output law.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.sampling import Noise, Sampling, Stream, probabilities
from specjax.models.language_model import LanguageModel
from specjax.runtime import checks
from specjax.runtime.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """The prompts, and what the target computed from them.

    Attributes:
      prompts: right-padded token ids.
      lengths: tokens of each prompt.
      texts: the tokens to continue: the prompts themselves, or start tokens if the target is an encoder-decoder.
      text_lengths: tokens of each text, the last of which is pending (in no cache yet).
      tap_states: hidden states `[B, T, D]` of the texts after each of the drafter's `taps`.
      capacity: cache slots a row may need.
    """

    prompts: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    texts: Int[Array, "B T"]
    text_lengths: Int[Array, "B"]
    tap_states: tuple[Float[Array, "B T D"], ...]
    capacity: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The state of the rows at the start of a block.

    Attributes:
      last_two_tokens: the last two committed tokens; a row with one token has it twice.
      lengths: committed tokens a row, the pending one included.
      live: rows that have not ended; drafts of the others are dropped.
      noise: the block's random numbers.
      sampling: how logits become probabilities, and the confidence below which drafting stops.
      max_drafted: most tokens that each row may draft, with an adaptive draft length; None means gamma.
      first_missing: with `max_drafted`, the position of each row's first token that may be missing in a cache of the
        drafter's own, because no row drafted at that time.
      tokens: the committed text, `tokens[b, :lengths[b]]`.
    """

    last_two_tokens: Int[Array, "B 2"]
    lengths: Int[Array, "B"]
    live: Bool[Array, "B"]
    noise: Noise
    sampling: Sampling
    max_drafted: Int[Array, "B"] | None = None
    first_missing: Int[Array, "B"] | None = None
    tokens: Int[Array, "B S"] | None = None

    def draw(
        self, logits: Float[Array, "B V"], offset: Int[Array, ""] | int
    ) -> tuple[Int[Array, "B"], Float[Array, "B V"] | None]:
        """Draws the token at `lengths + offset` from the draft's logits; probs are None if that is the argmax."""
        probs = probabilities(logits[:, None], self.sampling, greedy=self.noise.greedy)[:, 0]
        offsets = jax.numpy.full_like(self.lengths, offset)
        tokens = self.noise.choose(probs, offsets, Stream.DRAFT)
        return tokens, None if self.noise.greedy else probs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
    """Drafted tokens of one block.

    Attributes:
      tokens: the draft; entries from `num_drafted[b]` on are ignored.
      probs: the distribution each was drawn from, or None where the draft is deterministic (one-hot).
      num_drafted: how many tokens of each row count.
      resume_hidden: hidden states of the pending and every drafted token after layer `resume_layer - 1` of the
        target, or None to verify from the tokens.
      resume_layer: the target layer at which verification resumes.
    """

    tokens: Int[Array, "B gamma"]
    probs: Float[Array, "B gamma V"] | None
    num_drafted: Int[Array, "B"]
    resume_hidden: Float[Array, "B gamma_plus_1 D"] | None = None
    resume_layer: int = dataclasses.field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a block.

    Attributes:
      tokens: emitted tokens; entries from `num_emitted[b]` on are ignored.
      num_emitted: 1 .. gamma + 1 for a live row, 0 for a finished one.
      num_accepted: drafted tokens among them.
      lengths: committed length before the block.
      tap_states: hidden states `[B, gamma + 1, D]` of the verified tokens after each tapped layer.
    """

    tokens: Int[Array, "B gamma_plus_1"]
    num_emitted: Int[Array, "B"]
    num_accepted: Int[Array, "B"]
    lengths: Int[Array, "B"]
    tap_states: tuple[Any, ...]


class Drafter:
    """What the decoding loop asks of a drafter. Subclasses are frozen dataclasses, so that they can be compile keys.

    Attributes:
      gamma: most tokens drafted a block.
      taps: target layers whose hidden states the drafter wants to see.
      stops: whether a row may draft fewer than gamma tokens often. Verification then runs about as many columns as were
        drafted; each of these widths is compiled.
      idles: whether no row of a batch may draft at all in a block: verification then also has the width of one column.
      scores: whether `score` is defined.
    """

    gamma: int
    taps: tuple[int, ...] = ()
    stops: bool = False
    idles: bool = False
    scores: bool = False

    def init(self, params: Any, target_params: Any, prefill: Prefill, row_keys: Any) -> Any:
        """The state after prefill; a drafter without any keeps `()`."""
        return ()

    def propose(
        self, params: Any, target_params: Any, state: Any, target_cache: Any, context: Context
    ) -> tuple[Proposal, Any, Any]:
        """Drafts the tokens of one block. Returns the proposal, the state and the target's cache."""
        raise NotImplementedError

    def commit(self, params: Any, state: Any, outcome: Outcome) -> Any:
        """The state after a block was verified; rolling a cache back needs nothing (see `kv_cache`)."""
        return state

    def score(self, params: Any, target_params: Any, texts: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """The draft's logits after every token of whole texts, computed without a cache."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterOptions:
    """What a user chooses about a drafter; each drafter has a subclass, whose fields are the keys of a config.

    Attributes:
      adaptive: each row drafts as many tokens, up to gamma, as have paid so far (see `AdaptiveDrafter`).
      costs: for `adaptive`, the costs of a drafted token and of verifying it, relative to a plain step; an evaluation
        measures them where there are none.
      loads: what the drafter's `path` names: "model", "attachment" (an adapter or heads), or "" for nothing.
      threshold: confidence below which a row stops drafting; 0 never stops.
    """

    adaptive: bool = False
    costs: Sequence[float] = ()
    loads: ClassVar[str] = ""
    threshold: ClassVar[float] = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = vars(self)[field.name]
            if isinstance(value, list | range):
                object.__setattr__(self, field.name, tuple(value))
            elif field.type in (bool, int, float):
                checks.instance(field.name, value, field.type)
        if len(self.costs) not in (0, 2):
            raise UserError(
                f"costs has {len(self.costs)} numbers; give the costs of a drafted token and of verifying it, relative "
                "to a plain step, or none to have them measured"
            )

    def build(self, target: LanguageModel, gamma: int, loaded: Any) -> Drafter:
        """The drafter for this target and gamma >= 1.

        Args:
          loaded: the model (a LanguageModel) or attachment that `loads` announces, without its parameters.

        Raises:
          UserError: for values that do not fit the target, gamma or what is loaded.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoppingOptions(DrafterOptions):
    """Options of a drafter with probabilities, which may stop where it is unsure.

    Attributes:
      threshold: a row's block ends after the first token from whose distribution the draft was less sure than this (its
        largest probability at temperature 1); 0 always drafts gamma.
    """

    threshold: float = 0.0

    @property
    def stops(self) -> bool:
        """Whether confidence is computed at all; the threshold itself is traced, see `Sampling`."""
        return self.threshold > 0
