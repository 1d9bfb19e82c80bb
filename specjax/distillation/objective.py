"""The loss of distillation and of plain training: sums over the counted positions, with heads applied in chunks.

The hidden state at position t - 1 predicts the token at position t, which is counted iff `loss_start <= t < lengths`:
prompts and padding are not learned. All layers but the head ("trunk") run once over the whole batch. The heads run over
`chunk` positions at a time, and logits `[B, T, V]` never exist for a whole batch. The loss is a sum over chunks, so the
gradient of each is computed with its logits, and the backward pass only scales it.

A draft may make several predictions at each position (`LanguageModel.predicts`). A prediction at position t with an
offset is compared with the target's distribution at position t + offset, and is counted if that position is. All sums
are weighted by `Prediction.weight`, and means are weighted means over positions and predictions.

With `anchors`, the draft predicts at some drawn positions only, as trainers of block-parallel drafts and of PARD do to
save time and memory. A confidence head adds the cross-entropy between its confidence in a token and the acceptance.

Two options choose among positions. In a batch of assisted rollouts (`rollouts`), positions whose drafted token was
refused have a divergence of their own. With a reference draft, only the predictions count whose loss exceeds the
reference's by most (AdaSPEC, arXiv 2510.19779): a small draft does not spend its capacity on what it cannot learn.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.distillation import data_sources, divergences, rollouts
from specjax.distillation.cached_text import NORMALISERS, states_name
from specjax.distillation.comparison import Comparison, Head
from specjax.distillation.divergences import CROSS_ENTROPY, Divergence
from specjax.models import experts
from specjax.models.attachment import AttachedDraft, runtime_params
from specjax.models.language_model import LanguageModel, Params, Prediction, at_positions
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Weighted sums over counted positions, float32 scalars; unlike means, they add up across chunks and batches.

    Attributes:
      loss: sum of the divergence or the cross-entropy, with those of a sparse draft's balance and a confidence head.
      acceptance: sum of sum_v min(P, Q) at temperature 1; 0 without a target.
      tokens: sum of the weights; for a draft with one prediction this is the number of counted positions.
      outside: sum of the target's probability of ids that a reduced draft lacks; None for other drafts, or if there is
        no target.
    """

    loss: Any
    acceptance: Any
    tokens: Any
    outside: Any = None

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)


def mean(total: Array, tokens: Float[Array, ""]) -> Array:
    """A sum over counted positions (or its gradient) divided by the sum of their weights; 0 if nothing counted."""
    return jnp.where(tokens > 0, total / jnp.where(tokens > 0, tokens, 1).astype(total.dtype), 0).astype(total.dtype)


def counted(lengths: Int[Array, "B"], loss_start: Int[Array, "B"], positions: int) -> Float[Array, "B positions"]:
    """1 at positions whose next token is in the loss, 0 elsewhere."""
    following = jnp.arange(1, positions + 1)[None]
    return ((following >= loss_start[:, None]) & (following < lengths[:, None])).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a batch: (draft's parameters, target's parameters, batch) -> Sums over its counted positions.

    It is differentiable in the first argument; no gradient flows to the target.

    Attributes:
      draft: the model that is trained.
      target: the target; None for hard labels without measuring the acceptance.
      divergence: the divergence; None for hard labels (cross-entropy).
      temperature: divides both models' logits in the loss, but not in the acceptance; the loss is not rescaled by it.
      chunk: number of predictions per device, over its rows and the draft's heads, whose logits are in memory at one
        time (at least one per row and head). Each chunk sums the heads' gradients over devices, so the number of chunks
        must not grow with the number of devices.
      refused: the divergence at refused positions of assisted rollouts; None for the same one.
      selected: fraction of the counted predictions of a batch (of a microbatch, with several) that is in the loss:
        those with the largest difference between the losses of draft and reference; 1 is all of them.
      reference: a draft with the same predictions; None if all are selected. The target's parameters are then given as
        `{"target": .., "reference": ..}`.
      balance: weight, per counted position, of the load-balancing loss of a sparse draft, averaged over its routers.
      anchors: number of positions of each text at which the draft predicts, other ones in every step; 0 for all.

    Raises:
      UserError: for a divergence without a target, and for a reference that does not fit.
    """

    draft: LanguageModel
    target: LanguageModel | None
    divergence: Divergence | None
    temperature: float
    chunk: int
    refused: Divergence | None = None
    selected: float = 1.0
    reference: LanguageModel | None = None
    balance: float = 0.0
    anchors: int = 0

    def __post_init__(self):
        if self.divergence is not None and self.target is None:
            raise UserError(
                f'the divergence "{self.divergence.name}" compares with a target: set `target`, or loss.divergence to '
                f'"{CROSS_ENTROPY}" for plain training'
            )
        if self.draft.vocabulary is not None and self.target is not None:
            self.draft.vocabulary.check(self.target.vocab_size)
        if self.draft.confident and self.target is None:
            remedy = f'set loss.divergence to another than "{CROSS_ENTROPY}", or leave confidence out'
            raise UserError(f"a confidence head learns how probably the target accepts: {remedy}")
        if (self.selected < 1) != (self.reference is not None):
            raise UserError(
                f"loss.selected is {self.selected} and loss.reference names {'a' if self.reference else 'no'} draft; "
                "set selected below 1 with a reference to compare with, or 1 without"
            )
        if self.reference is not None and self.reference.predicts != self.draft.predicts:
            raise UserError(
                f"the draft makes {len(self.draft.predicts)} predictions at a position and the one in loss.reference "
                f"{len(self.reference.predicts)}, or of other tokens; let loss.reference name a draft of the same kind"
            )
        if self.reference is not None and self.reference.vocabulary != self.draft.vocabulary:
            raise UserError(
                "the draft and the one in loss.reference have different vocabularies, whose losses do not compare; let "
                "loss.reference name a draft with the same one"
            )
        if self.reference is not None and self.reference.is_encoder_decoder != self.draft.is_encoder_decoder:
            raise UserError("either the draft or the one in loss.reference is an encoder-decoder; take two of a kind")

    @classmethod
    def of_config(
        cls,
        config: Any,
        draft: LanguageModel,
        target: LanguageModel | None,
        reference: LanguageModel | None = None,
    ) -> "Loss":
        """The loss that a config's `loss` section describes."""
        compare = divergences.of_config(config)
        refused = divergences.of_config(config, "refused") if compare is not None else None
        if compare is not None and refused is None:
            raise UserError(
                f'loss.refused is "{CROSS_ENTROPY}", and a refused token has no label to learn; name a divergence'
            )
        how = config.temperature, config.chunk, refused, config.selected, reference, config.balance, config.anchors
        return cls(draft, target, compare, *how)

    @property
    def _drafts_from_blocks(self) -> bool:
        """Whether predictions depend on where a block starts, and not on the text before them alone."""
        reads_states = isinstance(self.draft, AttachedDraft) and not self.draft.attachment.writes
        return reads_states or len(self.draft.predicts) > 1

    @property
    def _comparison(self) -> Comparison:
        return Comparison(self.draft, self.target, self.divergence, self.temperature, self.refused)

    def on_all(self) -> "Loss":
        """This loss without a reference or balance, as validation computes it: over all counted positions or, with
        `anchors`, always the same ones."""
        return dataclasses.replace(self, selected=1.0, reference=None, balance=0.0)

    def __call__(
        self, params: Params, target_params: Params | None, batch: Mapping[str, Array], window: int = 0
    ) -> Sums:
        """Sums over the batch.

        Args:
          batch: see `data.batches`: `tokens` [B, T], `lengths` [B], `loss_start` [B], for an encoder-decoder also
            `sources` [B, P] and `prompt_lengths` [B], and the target's states [B, T, D] after some layers, if stored
            (`cached_text.states_name`); the target then does not run up to these; and of rollouts, see `rollouts`.
          window: the heads run on this many positions of each row, from the first counted one on; at least the number
            of counted positions of every row. 0 is all positions.
        """
        target, tokens, reference_params = self.target, batch["tokens"], None
        if self.reference is not None:
            reference_params = runtime_params(self.reference, target_params["reference"], target_params["target"])
            target_params = target_params["target"]
        prompts = (batch["sources"], batch["prompt_lengths"]) if "sources" in batch else None
        params = runtime_params(self.draft, params, target_params)
        predicts = self.draft.predicts
        weight = jnp.asarray([weight for _, weight in predicts], jnp.float32)[None, None]
        weights = _ahead(counted(batch["lengths"], batch["loss_start"], tokens.shape[1]), predicts) * weight
        offsets = tuple(offset for offset, _ in predicts)
        weights, refused = rollouts.weights_in_blocks(weights, batch, offsets, self._drafts_from_blocks)
        parts = {"labels": _ahead(jnp.roll(tokens, -1, axis=1), predicts), "weights": weights}
        if refused is not None:
            parts["refused"] = refused
        anchors, balance = None, None
        if 0 < self.anchors < tokens.shape[1]:
            anchors, parts = self._at_anchors(parts, batch)
        with jax.named_scope("draft_trunk"):
            if self.balance and self.draft.is_sparse:
                hidden, logits = self.draft.routed(params, tokens)
                parts["draft"], balance = at_positions(hidden, anchors), self._balance(logits, batch["lengths"])
            else:
                parts["draft"] = _draft_trunk(self.draft, params, prompts, batch, anchors)
        if self.reference is not None:
            with jax.named_scope("reference_trunk"):
                hidden = _draft_trunk(self.reference, reference_params, prompts, batch, anchors)
                parts["reference"] = jax.lax.stop_gradient(hidden)
        head = None
        if target is not None:
            target_params = jax.lax.stop_gradient(target_params)
            head = self._comparison.head_of(target_params)
            with jax.named_scope("target_trunk"):
                stored = stored_states(batch, (target.layers,), target)
                last = _trunk(target, target_params, prompts, tokens) if stored is None else stored[0]
                of_target = {"target": jax.lax.stop_gradient(last)}
                if stored is not None and NORMALISERS in batch:
                    of_target[NORMALISERS] = batch[NORMALISERS]
                for name, array in of_target.items():
                    ahead = _ahead(array, predicts, anchors)
                    # All predictions may be of the same token.
                    parts[name] = ahead if len({offset for offset, _ in predicts}) > 1 else ahead[:, :, :1]
        furthest = max(offset for offset, _ in predicts)
        if window and window + furthest < tokens.shape[1] and anchors is None:
            parts = _windows(parts, batch["loss_start"] - 1 - furthest, window + furthest)

        rows, columns = parts["draft"].shape[:2]
        width = min(max(self.chunk * meshes.num_shards("batch") // (rows * len(predicts)), 1), columns)
        chunks = jax.tree.map(functools.partial(_in_chunks, chunk=width), parts)
        if self.reference is not None:
            with jax.named_scope("selection"):
                chunks["weights"] = self._selected_weights(params, reference_params, head, chunks)
        attached = isinstance(self.draft, AttachedDraft)
        trained, attached_to = (params["attachment"], params["target"]) if attached else (params, None)
        with jax.named_scope("heads"):
            sums = _summed(self, trained, (attached_to, head), chunks)
        return sums if balance is None else dataclasses.replace(sums, loss=sums.loss + balance * sums.tokens)

    def _at_anchors(
        self, parts: dict[str, Array], batch: Mapping[str, Array]
    ) -> tuple[Int[Array, "B K"], dict[str, Array]]:
        """The drawn positions, and the parts there."""
        counts, draws = jnp.any(parts["weights"] > 0, axis=2), batch.get(data_sources.DRAWS)
        anchors = data_sources.drawn_positions(batch["tokens"], counts, self.anchors, draws)
        drawn = {name: at_positions(array, anchors) for name, array in parts.items()}
        if "refused" in parts:
            drawn["weights"] = _as_before(parts["weights"], drawn["weights"])
        return anchors, drawn

    def _balance(self, logits: Sequence[Float[Array, "B T E"]], lengths: Int[Array, "B"]) -> Float[Array, ""]:
        """The weighted load-balancing loss over all tokens of the texts, prompts included."""
        mask = (jnp.arange(logits[0].shape[1])[None] < lengths[:, None]).astype(jnp.float32)
        losses = [experts.balance_loss(each, self.draft.config.experts_per_token, mask) for each in logits]
        return self.balance * sum(losses) / len(losses)

    def zeros(self) -> Sums:
        """The sums over no position."""
        has_outside = self.target is not None and self.draft.vocabulary is not None
        return Sums(*(jnp.zeros((), jnp.float32) for _ in range(4 if has_outside else 3)))

    def _selected_weights(
        self, params: Params, reference_params: Params, head: Head | None, chunks: dict[str, Array]
    ) -> Float[Array, "chunks B C P"]:
        """The weights of all chunks, 0 for predictions that are not among the `selected`."""
        params, weights = jax.lax.stop_gradient(params), chunks["weights"]
        of_reference = dataclasses.replace(self._comparison, draft=self.reference)

        def gap(part):
            reference = of_reference(reference_params, head, {**part, "draft": part["reference"]})
            return self._comparison(params, head, part).losses - reference.losses

        gaps = jax.lax.stop_gradient(jax.lax.map(gap, chunks)).reshape(weights.shape)
        gaps = jnp.where(weights > 0, gaps, -jnp.inf)
        number = jnp.ceil(self.selected * jnp.sum((weights > 0).astype(jnp.float32))).astype(jnp.int32)
        threshold = jnp.sort(gaps.reshape(-1), descending=True)[jnp.maximum(number - 1, 0)]
        return jnp.where(gaps >= threshold, weights, 0)

    def _chunk_sums(self, trained: Params, fixed: tuple[Params | None, Head | None], part: dict[str, Array]) -> Sums:
        attached_to, head = fixed
        params = trained if attached_to is None else {"attachment": trained, "target": attached_to}
        values = self._comparison(params, head, part)
        weights, losses = values.weights, values.losses
        if self.draft.confident:
            sure = self.draft.confidence(params, part["draft"])
            losses = losses + jax.nn.softplus(sure) - sure * jax.lax.stop_gradient(values.overlap)
        total = lambda array: None if array is None else jnp.sum(weights * array)
        return Sums(total(losses), total(values.overlap), jnp.sum(weights), total(values.outside))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(loss: Loss, trained: Params, fixed: tuple, chunks: dict[str, Array]) -> Sums:
    """The sums over all chunks `[chunks, B, C, ...]`; only `Sums.loss` is differentiable, in `trained` and the draft's
    hidden states."""
    add = lambda total, part: (total + loss._chunk_sums(trained, fixed, part), None)
    return jax.lax.scan(add, loss.zeros(), chunks)[0]


def _summed_with_gradient(loss: Loss, trained: Params, fixed: tuple, chunks: dict[str, Array]):
    def of_part(part):
        def total(trained, hidden):
            sums = loss._chunk_sums(trained, fixed, part | {"draft": hidden})
            return sums.loss, sums

        return jax.grad(total, (0, 1), has_aux=True)(trained, part["draft"])

    def add(carry, part):
        (of_trained, of_hidden), sums = of_part(part)
        return jax.tree.map(jnp.add, carry, (sums, of_trained)), of_hidden

    start = loss.zeros(), jax.tree.map(jnp.zeros_like, trained)
    (sums, of_trained), of_hidden = jax.lax.scan(add, start, chunks)
    return sums, (of_trained, dict.fromkeys(chunks) | {"draft": of_hidden})


def _scaled_gradient(loss: Loss, gradient: tuple[Params, dict], cotangent: Sums):
    of_trained, of_chunks = jax.tree.map(lambda array: array * cotangent.loss.astype(array.dtype), gradient)
    return of_trained, None, of_chunks


_summed.defvjp(_summed_with_gradient, _scaled_gradient)


def _as_before(weights: Float[Array, "B T P"], drawn: Float[Array, "B K P"]) -> Float[Array, "B K P"]:
    """The weights at drawn positions, scaled so that those of a row have the same sum as before.

    Otherwise a replay, which has one position and keeps it, would count more than a text, which keeps a few of many.
    """
    whole, left = (jnp.sum(array, axis=(1, 2), keepdims=True) for array in (weights, drawn))
    return drawn * jnp.where(left > 0, whole / jnp.where(left > 0, left, 1), 0)


def _ahead(array: Array, predicts: Sequence[Prediction], anchors: Int[Array, "B K"] | None = None) -> Array:
    """[B, T, ...] -> [B, T or K, predictions, ...]: of each prediction at a position (all, or the anchors) the entry at
    position + offset, 0 past the end."""
    shifted = lambda offset: jnp.pad(array[:, offset:], [(0, 0), (0, offset)] + [(0, 0)] * (array.ndim - 2))
    return jnp.stack([at_positions(shifted(offset), anchors) for offset, _ in predicts], axis=2)


def _draft_trunk(
    draft: LanguageModel, params: Params, prompts, batch: Mapping[str, Array], anchors: Int[Array, "B K"] | None
) -> Float[Array, "B K E"]:
    """The input of the draft's heads; an attachment reads the target's states from the batch, if stored."""
    stored = stored_states(batch, draft.attachment.taps, draft) if isinstance(draft, AttachedDraft) else None
    if stored is None:
        return _trunk(draft, params, prompts, batch["tokens"], anchors)
    return draft.from_states(params, stored, batch["tokens"], anchors)


def _trunk(model, params, prompts, tokens, anchors=None) -> Float[Array, "B K D"]:
    """The hidden states that the heads take, for whole texts and without a cache; all of them, or at the anchors."""
    start = None if prompts is None else model.start(params, *prompts, 0)
    return model.training_states(params, start, tokens, anchors)


def stored_states(batch: Mapping[str, Array], layers: Sequence[int], model: LanguageModel) -> tuple[Array, ...] | None:
    """The target's states after these layers, in the model's compute dtype; None if one of them is not stored."""
    names = [states_name(layer) for layer in layers]
    if not all(name in batch for name in names):
        return None
    return tuple(batch[name].astype(dtype_named(model.config.compute_dtype)) for name in names)


def _windows(parts: dict[str, Array], starts: Int[Array, "B"], width: int) -> dict[str, Array]:
    """`width` columns of each array [B, T, ...], from `starts` on, or as near to it as the row's ends allow."""
    cut = jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=width, axis=0))
    return jax.tree.map(lambda x: cut(x, jnp.maximum(starts, 0)), parts)


def _in_chunks(array: Array, chunk: int) -> Array:
    """[B, T, ...] -> [chunks, B, chunk, ...], padded with zeros, which have weight 0."""
    missing = -array.shape[1] % chunk
    array = jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))
    array = array.reshape(array.shape[0], -1, chunk, *array.shape[2:])
    return jnp.moveaxis(array, 1, 0)
