"""The loss of distillation and of plain training: sums over the counted positions, heads applied in chunks.

The token at position t is predicted by the hidden state at t - 1 and counts iff `loss_start <= t < lengths`,
so neither a prompt nor padding is learned. The trunks run once over the whole batch; the heads run over
`chunk` positions at a time and are run again in the backward pass, so that logits `[B, T, V]`, the draft's or
the target's, never exist for a whole batch.

A draft may have several heads (`LanguageModel.predicts`). Head k at position t is compared with what its target says at
position t + k, counts where that position does, and weighs as the draft says; the weights stand in the sums of loss,
acceptance and tokens alike, so that their means are means over heads too.

Draft and target may pad the vocabulary of one tokenizer to different sizes. The loss compares them on the ids that
both have, each law renormalised there, so it is finite whatever the divergence: no draft could learn of an id that it
lacks. The acceptance is that of decoding, where such an id has draft probability 0.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.distillation import divergences
from specjax.models.language_model import consecutive, fit_logits
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# Hard labels: the negative log-likelihood of the batch's own tokens, for which no target is needed.
CROSS_ENTROPY = "cross_entropy"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over counted positions: they add up across chunks, microbatches and batches, unlike means.

    Attributes:
      loss: of the divergence, a float32 scalar as the others are.
      acceptance: of sum_v min(P, Q) at temperature 1; 0 without a target.
      tokens: how many positions counted, by their weights.
    """

    loss: Any
    acceptance: Any
    tokens: Any

    @classmethod
    def zeros(cls) -> "Sums":
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)


def mean(total: Array, tokens: Float[Array, ""]) -> Array:
    """A sum over counted positions (or the gradient of one) per position; 0 where nothing counted."""
    return (total / jnp.maximum(tokens, 1.0).astype(total.dtype)).astype(total.dtype)


def check(divergence: str, beta: float, loss_temperature: float, chunk: int, *, has_target: bool) -> None:
    """Refuses settings of the loss that make no sense.

    Raises:
      UserError: naming the setting.
    """
    if divergence != CROSS_ENTROPY:
        divergences.divergence(divergence, beta)
        if not has_target:
            raise UserError(
                f'the divergence "{divergence}" compares with a target: set `target`, or loss.divergence to '
                f'"{CROSS_ENTROPY}" for plain training'
            )
    if not loss_temperature > 0:
        raise UserError(f"loss.temperature is {loss_temperature}; it must be above 0")
    if chunk < 1:
        raise UserError(f"loss.chunk is {chunk}; it must be 1 position or more")


def counted(lengths: Int[Array, "B"], loss_start: Int[Array, "B"], positions: int) -> Float[Array, "B positions"]:
    """1 at the positions whose next token is a prediction target, 0 elsewhere."""
    following = jnp.arange(1, positions + 1)[None]
    return ((following >= loss_start[:, None]) & (following < lengths[:, None])).astype(jnp.float32)


def distillation_loss(
    draft,
    draft_params: dict,
    target,
    target_params: dict | None,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    loss_start: Int[Array, "B"],
    *,
    prompts: tuple[Int[Array, "B P"], Int[Array, "B"]] | None = None,
    divergence: str,
    beta: float,
    loss_temperature: float,
    chunk: int,
) -> Sums:
    """Sums of the loss over the counted positions of a batch; differentiable in `draft_params` alone.

    Args:
      target: None with `cross_entropy`, or to have no acceptance beside it.
      prompts: what an encoder-decoder reads apart from `tokens`, right-padded, and the lengths.
      divergence: a name in `divergences.DIVERGENCES`, or "cross_entropy".
      beta: of `jsd`.
      loss_temperature: divides both logits in the loss (not in `acceptance`); the loss is not rescaled by it.
      chunk: predictions, of all rows and heads of one device, whose logits exist at one time (but one of each row and
        head at least). Each chunk of a mesh adds up the heads' gradients over devices, so more rows must not be more
        chunks.

    Raises:
      UserError: for an unknown divergence, and for one that lacks its target.
    """
    check(divergence, beta, loss_temperature, chunk, has_target=target is not None)
    with jax.named_scope("draft_trunk"):
        hidden = _trunk(draft, draft_params, prompts, tokens)
    weight = jnp.asarray([weight for _, weight in draft.predicts], jnp.float32)[None, None]
    parts = {
        "draft": hidden,
        "labels": _ahead(jnp.roll(tokens, -1, axis=1), draft),
        "weights": _ahead(counted(lengths, loss_start, tokens.shape[1]), draft) * weight,
    }
    if target is not None:
        target_params = jax.lax.stop_gradient(target_params)
        with jax.named_scope("target_trunk"):
            parts["target"] = _ahead(jax.lax.stop_gradient(_trunk(target, target_params, prompts, tokens)), draft)

    # Inside a scan nothing can be merged across the checkpoint, so its barriers would only cost time.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_sums(draft_params, part):
        part = {name: x if name == "draft" else x.reshape(x.shape[0], -1, *x.shape[3:]) for name, x in part.items()}
        draft_logits = draft.head(draft_params, part["draft"])
        target_logits = None if target is None else target.head(target_params, part["target"])
        weights, overlap = part["weights"], jnp.zeros_like(part["weights"])
        if target is not None:
            draft_logits = draft_logits[..., : target_logits.shape[-1]]
            fitted = fit_logits(jax.lax.stop_gradient(draft_logits), target_logits.shape[-1])
            overlap = divergences.acceptance(target_logits, fitted)
            target_logits = target_logits[..., : draft_logits.shape[-1]]
        if divergence == CROSS_ENTROPY:  # of a token that the draft lacks there is nothing to learn
            weights = weights * (part["labels"] < draft_logits.shape[-1]).astype(weights.dtype)
        losses = _losses(target_logits, draft_logits, part["labels"], divergence, beta, loss_temperature)
        return Sums(jnp.sum(weights * losses), jnp.sum(weights * overlap), jnp.sum(weights))

    rows, columns = tokens.shape
    width = min(max(chunk * meshes.num_shards("batch") // (rows * len(draft.predicts)), 1), columns)
    chunks = jax.tree.map(functools.partial(_in_chunks, chunk=width), parts)
    with jax.named_scope("heads"):
        sums, _ = jax.lax.scan(lambda total, part: (total + chunk_sums(draft_params, part), None), Sums.zeros(), chunks)
    return sums


def _ahead(array: Array, draft) -> Array:
    """[B, T, ...] -> [B, T, heads, ...]: what stands at the place of which each head speaks; 0 beyond the end."""
    moved = lambda places: jnp.pad(array[:, places:], [(0, 0), (0, places)] + [(0, 0)] * (array.ndim - 2))
    return jnp.stack([moved(places) for places, _ in draft.predicts], axis=2)


def _trunk(model, params, prompts, tokens) -> Float[Array, "B T D"]:
    """The last hidden states of the plain forward."""
    start = None if prompts is None else model.start(params, *prompts, 0)
    return model.extend(params, start, tokens, consecutive(tokens))[0]


def _losses(target_logits, draft_logits, labels, divergence, beta, temperature) -> Float[Array, "B C"]:
    draft_logits = draft_logits.astype(jnp.float32) / temperature
    if divergence == CROSS_ENTROPY:
        # A comparison, not a gather: its gradient is no scatter, and a sharded vocabulary stays sharded.
        chosen = jnp.arange(draft_logits.shape[-1], dtype=labels.dtype)[None, None] == labels[..., None]
        label_logits = jnp.sum(jnp.where(chosen, draft_logits, 0.0), axis=-1)
        return jax.nn.logsumexp(draft_logits, axis=-1) - label_logits
    return divergences.divergence(divergence, beta)(target_logits / temperature, draft_logits)


def _in_chunks(array: Array, chunk: int) -> Array:
    """[B, T, ...] -> [chunks, B, chunk, ...]; what is added at the end has weight 0."""
    missing = -array.shape[1] % chunk
    array = jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))
    array = array.reshape(array.shape[0], -1, chunk, *array.shape[2:])
    return jnp.moveaxis(array, 1, 0)
