"""Assisted rollouts (Draft-OPD, arXiv 2605.29343): training text on which draft and target decode together.

The text is that of the speculative loop, so with an exact rule it follows the target's distribution. It has two kinds
of positions: those where a drafted token was refused, and all others. In addition, refused drafts are replayed: a
replay is the text before the first refused token of a block, followed by what was drafted from there on.

    text      the cat sat on a mat .      "on" and "." are in the text where the draft had "under" and ","
    replay    the cat sat under the table   refused from "under" on; trained: "the" (k = 1) and "table" (k = 2)

The loss of a refused position is another divergence, with the weight decay^k at the k-th token after the refused one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from specjax.decoding import loop, rules
from specjax.decoding.drafters.base import Drafter
from specjax.decoding.drafters.recording import RecordingDrafter
from specjax.decoding.drafters.table import build_drafter, make_options
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling
from specjax.distillation.data_sources import Generation
from specjax.models.attachment import AttachedDraft
from specjax.models.language_model import LanguageModel
from specjax.runtime.errors import UserError

# Logical axes of the arrays that a batch of rollouts has besides those of `data.batches`, see `Rollouts.__call__`.
ROLLOUT_AXES = {"refusals": ("batch", None), "anchors": ("batch",)}

# Folded into a row's key to choose its replays; above every position.
_REPLAYS = 2**30


def drafter_of(draft: LanguageModel, target: LanguageModel, gamma: int) -> Drafter:
    """The drafter that decodes with a model or attachment that is being trained."""
    network = draft.attachment if isinstance(draft, AttachedDraft) else draft
    return build_drafter(make_options(network.drafter, {}), target, gamma, network)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Generates training text by speculative decoding.

    Attributes:
      generation: temperature, limits and random numbers of the text.
      target: the target.
      drafter: a `RecordingDrafter`.
      rule: decides which drafted tokens are accepted.
      lenience: epsilon of a lossy rule.
      replays: number of refused blocks of each text that are replayed, drawn at random. They count as much as all
        refused blocks of the text.
      decay: weight of each drafted token after a refused one, relative to the token before it.
      replicate: see `Plan.replicate_draft`.
    """

    generation: Generation
    target: LanguageModel
    drafter: Drafter
    rule: rules.Rule
    lenience: float
    replays: int
    decay: float
    replicate: bool = False

    @classmethod
    def of_config(
        cls, section: Any, generation: Generation, draft: LanguageModel, target: LanguageModel, replicate: bool
    ) -> "Rollouts":
        """The rollouts that a config's `rollouts` section describes.

        Raises:
          UserError: for an unknown rule, and a lenience out of range.
        """
        learnt = len(draft.predicts)
        if 1 < learnt < section.gamma:
            raise UserError(
                f"rollouts.gamma is {section.gamma}, and the draft learns {learnt} tokens of a block; set "
                f"rollouts.gamma to {learnt} or less"
            )
        drafter = RecordingDrafter.of(drafter_of(draft, target, section.gamma), section.gamma)
        rule = rules.rule_named(section.rule)
        Sampling.of(lenience=section.lenience)
        how = section.lenience, section.replays, section.decay, replicate
        return cls(generation, target, drafter, rule, *how)

    def __call__(
        self,
        draft_params: Any,
        target_params: Any,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        step: Int[Array, ""],
    ) -> dict[str, Array]:
        """Continues each prompt.

        Returns:
          a batch (see `data.batches`) of B * (1 + replays) rows: each text, followed by its replays. It has two
          arrays in addition: `refusals` [rows, T], the weight of each refused position and 0 at all others, and
          `anchors` [rows], in a replay the position of the last committed token before the block, in a text -1.
        """
        generation, slots = self.generation, prompts.shape[1]
        limits = {"max_new_tokens": generation.max_new_tokens}
        plan = Plan.for_prompts(
            self.target,
            slots,
            greedy=generation.temperature == 0,
            drafter=self.drafter,
            gamma=self.drafter.gamma,
            rule=self.rule,
            replicate_draft=self.replicate,
            round_up=False,
            **limits,
        )
        sampling = Sampling.of(generation.temperature, generation.top_k, generation.top_p, lenience=self.lenience)
        row_keys = generation.row_keys(step, prompts.shape[0])
        how = {"sampling": sampling, "eos_ids": tuple(generation.eos_ids), **limits}
        state = loop.complete(plan, target_params, draft_params, prompts, lengths, row_keys, **how)
        width = self.target.text_slots(slots) + generation.max_new_tokens
        texts, starts = self.target.start_texts(prompts, lengths)
        rows = self._rows(state, starts, width) | {"prompt_lengths": self._repeated(lengths)}
        return rows if texts is prompts else {**rows, "sources": self._repeated(prompts)}

    def _rows(self, state: loop.DecodeState, starts: Int[Array, "B"], width: int) -> dict[str, Array]:
        index = jnp.arange(width, dtype=jnp.int32)[None]
        tokens = jnp.where(index < state.lengths[:, None], state.tokens[:, :width], 0)
        blocks = Blocks.of(state, starts, width)
        refusals = blocks.refused.astype(jnp.float32)
        text = {"tokens": tokens, "lengths": state.lengths, "loss_start": starts, "refusals": refusals}
        text["anchors"] = jnp.full_like(starts, -1)
        parts = [text, *self._replays(tokens, blocks, state.row_keys)]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)

    def _replays(self, tokens: Int[Array, "B T"], blocks: "Blocks", row_keys: Key[Array, "B"]) -> list[dict]:
        """The replays of every row: different blocks with a drafted token after the refused one, drawn at random."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, _REPLAYS)
        candidates = blocks.refused & (blocks.tail > 0)
        draws = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(keys)
        scores, places = jax.lax.top_k(jnp.where(candidates, draws, -1.0), self.replays)
        number = jnp.sum(candidates, axis=1)
        weight = number.astype(jnp.float32) / jnp.clip(number, 1, self.replays).astype(jnp.float32)
        return [
            self._replay(tokens, blocks, places[:, replay], jnp.where(scores[:, replay] >= 0, weight, 0.0))
            for replay in range(self.replays)
        ]

    def _replay(
        self, tokens: Int[Array, "B T"], blocks: "Blocks", refused: Int[Array, "B"], weight: Float[Array, "B"]
    ) -> dict[str, Array]:
        """Replays the block whose token at position `refused` was refused; with weight 0 no position counts."""
        at = lambda array: jnp.take_along_axis(array, refused[:, None], axis=1)
        first, end = at(blocks.first), refused[:, None] + 1 + at(blocks.tail)
        drafted = jnp.take_along_axis(blocks.drafted, first[..., None], axis=1)[:, 0]
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        inside = jnp.clip(index - first, 0, drafted.shape[1] - 1)
        replayed = jnp.take_along_axis(drafted, inside, axis=1)
        after = index - refused[:, None]
        # A text ends after its first end token, and so does a replay.
        ended = jnp.isin(replayed, jnp.asarray(self.generation.eos_ids, tokens.dtype)) & (after >= 0)
        end = jnp.minimum(end, jnp.min(jnp.where(ended, index, tokens.shape[1]), axis=1, keepdims=True) + 1)
        decayed = weight[:, None] * self.decay ** after.astype(jnp.float32)
        decayed = jnp.maximum(decayed, jnp.finfo(jnp.float32).tiny)  # 0 would say that nothing was refused
        counts = (after > 0) & (index < end)
        return {
            "tokens": jnp.where(index < first, tokens, jnp.where(index < end, replayed, 0)),
            "lengths": jnp.minimum(end[:, 0], tokens.shape[1]),
            "loss_start": jnp.where(weight > 0, refused + 1, tokens.shape[1]),
            "refusals": jnp.where(counts & (weight[:, None] > 0), decayed, 0.0),
            "anchors": first[:, 0] - 1,
        }

    def _repeated(self, array: Array) -> Array:
        return jnp.repeat(array, 1 + self.replays, axis=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """What was drafted in the blocks of decoded texts.

    Attributes:
      refused: positions of tokens that replaced a refused one.
      first: at such a position, that of the first token of its block.
      tail: at such a position, the number of tokens that were drafted after the refused one.
      drafted: at the position of the first token of a block, its drafted tokens.
    """

    refused: Bool[Array, "B T"]
    first: Int[Array, "B T"]
    tail: Int[Array, "B T"]
    drafted: Int[Array, "B T gamma"]

    @classmethod
    def of(cls, state: loop.DecodeState, starts: Int[Array, "B"], width: int) -> "Blocks":
        """The blocks of a state whose drafter is a `RecordingDrafter`.

        Args:
          starts: position of each row's first emitted token.
          width: number of positions.
        """
        index = jnp.arange(width, dtype=jnp.int32)[None]
        codes = state.origins[:, :width]
        kinds, counts = codes % len(loop.ORIGINS), codes // len(loop.ORIGINS)
        emitted = (index >= starts[:, None]) & (index < state.lengths[:, None])
        # Every token that was not accepted ends a block; the prompt's last one precedes the first block.
        ends = jax.lax.cummax(jnp.where(kinds == loop.ACCEPTED, -1, index), axis=1)
        first = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)), constant_values=-1) + 1
        tail = first + counts - index - 1
        return cls(emitted & (kinds == loop.RECOVERED), first, tail, state.drafter_state.drafted[:, :width])


def weights_in_blocks(
    weights: Float[Array, "B T P"], batch: Mapping[str, Array], offsets: tuple[int, ...], from_blocks: bool
) -> tuple[Float[Array, "B T P"], Bool[Array, "B T P"] | None]:
    """The weights of a batch's predictions, those of rollouts included, and which predictions are of refused positions.

    A draft that drafts from where a block starts predicts the i-th token of a replayed block from the state that
    decoding did, with its i-th prediction; other predictions of a replay do not count.

    Args:
      weights: of the predictions at each position, see `objective`.
      offsets: a prediction at position t with an offset is of the token at t + 1 + offset.
      from_blocks: whether the draft is such a one; others predict any token from the text before it.
    """
    if "refusals" not in batch:
        return weights, None
    of = jnp.arange(1, weights.shape[1] + 1)[:, None] + jnp.asarray(offsets)[None]  # [T, P]
    refusals = jnp.pad(batch["refusals"], ((0, 0), (0, max(offsets) + 1)))[:, of]
    if from_blocks:
        anchors = batch["anchors"][:, None, None]
        drafted = of[None] == anchors + 1 + jnp.arange(len(offsets))[None, None]
        weights = jnp.where((anchors < 0) | drafted, weights, 0)
    return weights * jnp.where(refusals > 0, refusals, 1), refusals > 0
