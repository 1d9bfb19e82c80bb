"""The interface between the decoding loop and drafters, which propose tokens.

A drafter is a hashable static object; its parameters and state are pytrees. It may read and write the target's cache,
so that a self-draft shares the target's first layers. Its state should be a dataclass whose fields declare the logical
axes of their arrays (`runtime.mesh.axes`); arrays without declared axes are replicated on every device of a mesh.

A drafter may stop early (`num_drafted < gamma`). The decision may depend on distributions and on earlier tokens, but
not on the value of a token that is then dropped, because that would change the output distribution.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.sampling import Noise, Sampling, Stream, finite_rows, most_probable, probabilities
from specjax.models.language_model import LanguageModel
from specjax.models.vocabulary import DraftVocabulary, draft_vocabulary
from specjax.runtime import checks
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import pin_last


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """The input of `Drafter.start`.

    Attributes:
      tokens: right-padded token ids. A decoder-only draft needs only their number of rows here; an encoder-decoder
        encodes them.
      lengths: number of tokens of each prompt.
      capacity: number of slots per row that a cache of the drafter needs.
    """

    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    capacity: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The input of `Drafter.prefill`: consecutive tokens of each text, and what the target computed from them.

    Texts are prefilled chunk by chunk, up to the token before the last one, which is pending. Tokens from the end of a
    text on are padding: what a drafter's cache holds for them is rewritten before it is read.

    Attributes:
      tokens: token ids.
      positions: their positions, consecutive in each row; usually not all tokens of the text, and in a row that is
        complete from `lengths - 1` on.
      lengths: number of tokens of each text.
      tap_states: the target's hidden states of these tokens after each layer in the drafter's `taps`.
    """

    tokens: Int[Array, "B C"]
    positions: Int[Array, "B C"]
    lengths: Int[Array, "B"]
    tap_states: tuple[Float[Array, "B C D"], ...]

    def at_second_last(self, states: Float[Array, "B C D"], before: Float[Array, "B 1 D"]) -> Float[Array, "B 1 D"]:
        """Of each row, the state of the text's second-last token; `before` if it is not in this chunk."""
        index = self.lengths - 2 - self.positions[:, 0]
        inside = (index >= 0) & (index < self.tokens.shape[1])
        states = jax.numpy.take_along_axis(states, jax.numpy.where(inside, index, 0)[:, None, None], axis=1)
        return jax.numpy.where(inside[:, None, None], states, before)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The input of `Drafter.propose`: the rows at the start of a block.

    Attributes:
      last_two_tokens: the last two committed tokens; a row with one token has it twice.
      lengths: number of committed tokens, including the pending one (the last, which is in no cache yet).
      live: rows that have not ended; the proposals of other rows are ignored.
      noise: the block's random numbers.
      sampling: temperature, top-k, top-p, and the threshold below which drafting stops.
      max_drafted: with an adaptive draft length, the maximum number of tokens each row drafts; None means gamma.
      first_missing: with `max_drafted`, the position of each row's first token that may be missing in the drafter's own
        cache, because the drafter did not run in blocks in which no row drafted.
      tokens: the committed text, `tokens[b, :lengths[b]]`; for an encoder-decoder without the prompt.
      vocab_size: V, number of the target's ids.
    """

    last_two_tokens: Int[Array, "B 2"]
    lengths: Int[Array, "B"]
    live: Bool[Array, "B"]
    noise: Noise
    sampling: Sampling
    max_drafted: Int[Array, "B"] | None = None
    first_missing: Int[Array, "B"] | None = None
    tokens: Int[Array, "B S"] | None = None
    vocab_size: int = dataclasses.field(default=0, metadata={"static": True})

    def last(self, width: int) -> tuple[Int[Array, "B width"], Int[Array, "B 1 1"]]:
        """The positions of the last committed tokens, and the index of the pending one among them.

        A shorter text has the positions 0 .. width - 1; what a cache holds after its end is rewritten before it is
        read.
        """
        start = jax.numpy.maximum(self.lengths - width, 0)
        positions = start[:, None] + jax.numpy.arange(width, dtype=jax.numpy.int32)[None]
        return positions, (self.lengths - 1 - start)[:, None, None]

    def draw(
        self,
        logits: Float[Array, "B W"],
        offset: Int[Array, ""] | int,
        vocabulary: DraftVocabulary | None = None,
    ) -> tuple[Int[Array, "B"], Float[Array, "B W"] | None]:
        """Draws the tokens at position `lengths + offset`. Returns them and their distributions (None if greedy).

        Logits that are not finite give a distribution of zeros, and the rule refuses the token.

        Args:
          logits: over all ids, or over those of `vocabulary`.
        """
        if self.noise.greedy:
            columns = most_probable(pin_last(logits, "vocab"))
            return columns if vocabulary is None else jax.numpy.asarray(vocabulary.ids)[columns], None
        probs = probabilities(logits[:, None], self.sampling, greedy=False)[:, 0]
        probs = jax.numpy.where(finite_rows(logits)[:, None], probs, 0)
        offsets = jax.numpy.full_like(self.lengths, offset)
        if vocabulary is None:
            tokens = self.noise.choose(probs, offsets, Stream.DRAFT)
        elif self.noise.shared:  # the noise is that of the same ids in the target's draw
            spread = vocabulary.spread(probs, self.vocab_size, 0.0)
            tokens = self.noise.choose(spread, offsets, Stream.DRAFT)
        else:
            tokens = jax.numpy.asarray(vocabulary.ids)[self.noise.choose(probs, offsets, Stream.DRAFT)]
        return tokens, probs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
    """The drafted tokens of one block.

    Attributes:
      tokens: drafted tokens; `tokens[b, num_drafted[b]:]` are ignored.
      probs: the distribution that each was drawn from; None if the draft is deterministic (one-hot). W is V, or the
        number of ids in `vocabulary`.
      num_drafted: number of drafted tokens of each row, 0 .. gamma.
      failed: rows whose proposal ended because the draft's logits were not finite (see `finite_rows`); None for none.
      resume_hidden: the target's hidden states after its first `resume_layer` layers, of the pending and the drafted
        tokens; None if verification starts from the tokens.
      resume_layer: index of the target layer at which verification resumes.
      vocabulary: the ids of the columns of `probs`, in a draft with a reduced head; all other ids have probability 0.
      one_hot: rows whose draft is deterministic although others have `probs`, which are ignored there; None for none.
    """

    tokens: Int[Array, "B gamma"]
    probs: Float[Array, "B gamma W"] | None
    num_drafted: Int[Array, "B"]
    failed: Bool[Array, "B"] | None = None
    resume_hidden: Float[Array, "B gamma_plus_1 D"] | None = None
    resume_layer: int = dataclasses.field(default=0, metadata={"static": True})
    vocabulary: DraftVocabulary | None = dataclasses.field(default=None, metadata={"static": True})
    one_hot: Bool[Array, "B"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """The input of `Drafter.commit`: the result of a block.

    Attributes:
      tokens: emitted tokens; `tokens[b, num_emitted[b]:]` are ignored.
      num_emitted: 1 .. gamma + 1 in a live row, 0 in a row that has ended.
      num_accepted: number of drafted tokens among the emitted ones.
      lengths: number of committed tokens before the block.
      tap_states: hidden states `[B, gamma + 1, D]` of the pending and drafted tokens after each tapped layer above the
        proposal's `resume_layer`.
    """

    tokens: Int[Array, "B gamma_plus_1"]
    num_emitted: Int[Array, "B"]
    num_accepted: Int[Array, "B"]
    lengths: Int[Array, "B"]
    tap_states: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DrafterFields:
    greedy: bool = False
    leaves_unsure: bool = False


class Drafter(_DrafterFields):
    """Base class of drafters. Subclasses are frozen dataclasses, because they are static arguments of compiled code.

    Attributes:
      gamma: maximum number of drafted tokens per block.
      taps: the drafter reads the target's hidden states after this many layers, for each entry.
      stops: whether rows often draft fewer than gamma tokens. Verification is then compiled for several widths and runs
        the narrowest that has a column for every drafted token.
      idles: whether a block may have no drafted token in any row. Verification is then also compiled for one column.
      looks_up: whether `propose` runs no model, so that a proposal depends on committed tokens alone. An adaptive draft
        length is then chosen knowing how many tokens each row can draft.
      scores: whether `score` is defined.
      resumes: whether proposals have `resume_hidden`.
      lag: number of the last committed tokens whose keys the drafter's cache may lack, or hold of drafted tokens or
        masks; where a text is continued (`prefill.extend`), `prefill` runs on them again.
      greedy: whether it drafts the most probable tokens at any temperature; `Context.noise` is then greedy.
      leaves_unsure: whether the token after which drafting stops is left out, see `HeadOptions`.
    """

    gamma: int
    taps: tuple[int, ...] = ()
    stops: bool = False
    looks_up: bool = False
    scores: bool = False
    resumes: bool = False
    lag: int = 2

    @property
    def idles(self) -> bool:
        return self.leaves_unsure

    @property
    def ends(self) -> dict[str, bool]:
        """When drafting ends before gamma tokens, as arguments of `drafting.draft`."""
        return {"stops": self.stops, "leaves_unsure": self.leaves_unsure}

    def start(self, params: Any, target_params: Any, prompts: Prompts) -> Any:
        """The drafter's state before prefill, such as an empty cache; `()` for a drafter without state."""
        return ()

    def prefill(self, params: Any, target_params: Any, state: Any, chunk: Chunk) -> Any:
        """The drafter's state after one more chunk of the texts.

        It has the arrays of `state` with the same shapes, because chunks run in a compiled loop. Texts of one token
        have no chunk, and those of an encoder-decoder none either. After decoding, prefill may resume: with
        new tokens at the end of the text, or from an earlier position on (see `prefill.extend`).
        """
        return state

    def propose(
        self, params: Any, target_params: Any, state: Any, target_cache: Any, context: Context
    ) -> tuple[Proposal, Any, Any]:
        """Drafts the tokens of one block. Returns the proposal, the drafter's new state and the target's new cache."""
        raise NotImplementedError

    def commit(self, params: Any, state: Any, outcome: Outcome) -> Any:
        """The drafter's state after a block was verified; caches need no change for rejected tokens, see `kv_cache`."""
        return state

    def recorded(self, state: Any) -> Any:
        """Arrays `[B, ...]` of the state, or (); `scheduler.decode` gives each row's part to `on_end`."""
        return ()

    def score(
        self, params: Any, target_params: Any, texts: Int[Array, "B T"], prompt_lengths: Int[Array, "B"]
    ) -> Float[Array, "B T V"]:
        """The draft's logits after every token of whole texts, each a prompt of this length and its continuation."""
        raise NotImplementedError


# vLLM's names; its default is "greedy".
SAMPLE_METHODS = ("probabilistic", "greedy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterOptions:
    """Base class of the options of a drafter; the fields of a subclass are the keys of a drafter's config section.

    Attributes:
      adaptive: whether each block drafts as many tokens, 0 .. gamma, as pay in the batch (see `AdaptiveDrafter`).
      costs: for `adaptive`, the seconds of drafting one token and of verifying it, relative to a plain decoding step;
        if empty, an evaluation measures them.
      loads: what the drafter's `path` names: "model", "attachment" (an adapter or heads), or "" for nothing.
      states_after: for loading a draft whose files leave open which of the target's states it reads, see `Eagle3`.
      threshold: drafting stops after a token whose distribution has a largest probability below this; 0 never stops.
      leave_unsure: whether that token is left out, see `HeadOptions`.
      lookup, head_gamma: see `HeadOptions`.
      vocabulary: the only ids that the draft can draft; None for all.
      draft_sample_method: how tokens are drafted above temperature 0, see `HeadOptions`.
    """

    adaptive: bool = False
    costs: Sequence[float] = ()
    loads: ClassVar[str] = ""
    states_after: ClassVar[Sequence[int]] = ()
    threshold: ClassVar[float] = 0.0
    leave_unsure: ClassVar[bool] = False
    lookup: ClassVar[float] = 0.0
    head_gamma: ClassVar[int] = 0
    vocabulary: ClassVar[DraftVocabulary | None] = None
    draft_sample_method: ClassVar[str] = SAMPLE_METHODS[0]

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
          loaded: the LanguageModel or Attachment read from `path`, without its parameters; None if `loads` is "".

        Raises:
          UserError: for values that are invalid for this target, gamma or loaded network.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOptions(DrafterOptions):
    """Options of a drafter with a head: it has a distribution for each token, over all of the target's ids or some.

    Attributes:
      threshold: a row's draft ends after the first token whose distribution at temperature 1 has a largest probability
        below this; 0 always drafts gamma tokens.
      leave_unsure: whether that token is left out of the draft. A block without a sure token is then a plain step. It
        pays where verifying the first token costs time, as on a CPU; elsewhere an unsure token costs nothing.
      lookup: above 0, a row drafts what the text has after an earlier occurrence of its last tokens, if there is one,
        and uses the head otherwise. The draft ends before the estimated chance that all its tokens are right falls
        below this, as with the `threshold` of `NGram`. On a GPU the host then waits for each drafted token.
      head_gamma: with `lookup`, the largest number of tokens that the head drafts; 0 for gamma. Looked-up tokens cost
        no draft step and are accepted more often, so more of them may pay.
      draft_sample_method: "probabilistic" draws tokens from the draft's adjusted distributions; "greedy" drafts the
        most probable ones at any temperature, which takes less time.
      vocabulary: the only ids that the draft can draft, see `models.vocabulary.draft_vocabulary`; None or "" for all
        that its head has. `hub.model.with_end_ids` adds those that end a text, `hub.model.reduced` cuts what is loaded.
    """

    threshold: float = 0.0
    leave_unsure: bool = False
    lookup: float = 0.0
    head_gamma: int = 0
    draft_sample_method: str = SAMPLE_METHODS[0]
    vocabulary: DraftVocabulary | Sequence[int] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.draft_sample_method not in SAMPLE_METHODS:
            raise UserError(
                f'draft_sample_method must be "probabilistic" or "greedy", not {self.draft_sample_method!r}'
            )
        if self.leave_unsure and not self.threshold:
            raise UserError("leave_unsure is True, and no token is unsure without a threshold; set threshold too")
        if not 0 <= self.lookup < 1:
            raise UserError(f"lookup must be 0 (none) or a chance below 1, not {self.lookup}")
        if self.head_gamma < 0 or (self.head_gamma and not self.lookup):
            raise UserError(
                f"head_gamma is {self.head_gamma}; it is a number of tokens, and means something only with lookup"
            )
        object.__setattr__(self, "vocabulary", draft_vocabulary(self.vocabulary))

    @property
    def stops(self) -> bool:
        """Whether the threshold is used, which is static; its value is traced, see `Sampling`."""
        return self.threshold > 0
