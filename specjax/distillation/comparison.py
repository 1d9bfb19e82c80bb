"""Draft and target compared at some positions: the divergence, the acceptance, and what a reduced draft lacks.

Draft and target may pad the vocabulary of one tokenizer to different sizes. The loss compares them on the ids that both
have, after renormalising each distribution, so that every divergence is finite. For the acceptance, as in decoding, an
id that the draft lacks has draft probability 0.

A draft with a reduced head (`models.vocabulary`) lacks ids that the target does write. Let m be the target's
probability of the ids S that the draft has:

- The divergences in `divergences.FINITE` compare the two distributions over all ids. The ids outside of S count as one
  id, because these divergences depend only on the sum of their target probabilities, 1 - m.
- Any other divergence D, such as the forward KL, would be infinite; the loss is m * D(P given S, Q). Of the forward KL
  this has the gradient of the finite terms, the sum over S of P log(P / Q). EAGLE-3 (arXiv 2503.01840) also compares
  with P given S; it has no weight m, but leaves out positions whose most probable id is outside of S.
- Hard labels outside of S add 0 to the loss; their positions count.
- The acceptance counts ids outside of S as rejected, so m is its upper bound.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.distillation import divergences
from specjax.distillation.cached_text import NORMALISERS
from specjax.distillation.divergences import Divergence
from specjax.models.language_model import LanguageModel, Params, fit_logits

# The least probability of all ids outside of a draft's vocabulary together; sums in float32 are less exact.
_SMALLEST = 1e-7

# The target's parameters, and the rows of its head for the ids of a reduced draft; None if the draft has all.
Head = tuple[Params, Float[Array, "W D"] | None]


@dataclasses.dataclass(frozen=True)
class Values:
    """The terms of `Sums` of each prediction of a chunk, `[B, C]`, and their weights."""

    losses: Float[Array, "B C"]
    weights: Float[Array, "B C"]
    overlap: Float[Array, "B C"]
    outside: Float[Array, "B C"] | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compares a draft's predictions with the target's distributions, or with labels.

    Attributes:
      draft, target, divergence, temperature, refused: as of `objective.Loss`.
    """

    draft: LanguageModel
    target: LanguageModel | None
    divergence: Divergence | None
    temperature: float = 1.0
    refused: Divergence | None = None

    def head_of(self, target_params: Params) -> Head:
        """What of the target `__call__` needs."""
        return target_params, self.target.head_kernel(target_params, self.draft.vocabulary)

    def __call__(self, params: Params, head: Head | None, part: Mapping[str, Array]) -> Values:
        """Computes the logits of one chunk of positions, and compares them.

        Args:
          params: the draft's, as its head takes them.
          head: what the target's head needs, see `head_of`; None without a target.
          part: `draft` [B, C, E] and `target` [B, C, P or 1, D], the inputs of the heads; `labels`, `weights` and, of
            assisted rollouts, `refused` [B, C, P], for P predictions at each of the C positions; if they are stored,
            `normalisers` [B, C, P or 1].
        """
        whole = ("draft", "reference")
        part = {name: x if name in whole else x.reshape(x.shape[0], -1, *x.shape[3:]) for name, x in part.items()}
        draft_logits = self.draft.column_logits(params, part["draft"])
        for_each = lambda logits: jnp.repeat(logits, draft_logits.shape[1] // logits.shape[1], axis=1)
        weights, overlap = part["weights"], jnp.zeros_like(part["weights"])
        if self.draft.vocabulary is not None:
            of_target = None if head is None else tuple(map(for_each, self._with_others(head, part)))
            return self._reduced(of_target, draft_logits.astype(jnp.float32), part)
        if head is not None:
            target_logits = for_each(self.target.head(head[0], part["target"]))
            draft_logits = draft_logits[..., : target_logits.shape[-1]]
            padded = fit_logits(jax.lax.stop_gradient(draft_logits), target_logits.shape[-1])
            overlap = divergences.acceptance(target_logits, padded)
            target_logits = target_logits[..., : draft_logits.shape[-1]]
        scaled = draft_logits.astype(jnp.float32) / self.temperature
        if self.divergence is None:  # labels that the draft's vocabulary lacks are left out
            weights = weights * (part["labels"] < draft_logits.shape[-1]).astype(weights.dtype)
            return Values(_negative_log_likelihood(scaled, part["labels"]), weights, overlap)
        taught = target_logits / self.temperature
        return Values(self._diverging(lambda divergence: divergence(taught, scaled), part), weights, overlap)

    def _with_others(
        self, head: Head, part: Mapping[str, Array]
    ) -> tuple[Float[Array, "B C W_plus_1"], Float[Array, "B C W_plus_1"]]:
        """The target's logits of the ids in the draft's vocabulary and the one of all others together, at temperature 1
        and at that of the loss.

        Only the others need the whole head; at temperature 1 the normalisers, if there are any, give them too.
        """
        params, kernel = head
        reduced = self.target.reduced(self.draft.vocabulary)
        columns = reduced.column_logits(reduced.reduced_params(params, kernel), part["target"])
        with_others = lambda columns, others: jnp.concatenate([columns, others[..., None]], axis=-1)
        if self.temperature == 1 and NORMALISERS in part:
            whole = part[NORMALISERS]
            inside = jax.nn.logsumexp(columns, axis=-1) - whole
            # Both are rounded, so a small difference may have any sign.
            others = whole + jnp.log(jnp.maximum(-jnp.expm1(inside), _SMALLEST))
            return (with_others(columns, others),) * 2
        logits = self.target.head(params, part["target"])
        is_other = np.isin(np.arange(logits.shape[-1]), self.draft.vocabulary.ids, invert=True)[None, None]

        def at(temperature):
            others = jax.nn.logsumexp(jnp.where(is_other, logits / temperature, -jnp.inf), axis=-1)
            return with_others(columns / temperature, others)

        at_1 = at(1.0)
        return at_1, at_1 if self.temperature == 1 else at(self.temperature)

    def _reduced(
        self,
        of_target: tuple[Float[Array, "B C W_plus_1"], Float[Array, "B C W_plus_1"]] | None,
        draft_logits: Float[Array, "B C W"],
        part: dict[str, Array],
    ) -> Values:
        """The comparison of a draft whose logits are those of the ids in its vocabulary, see `_with_others`."""
        weights, outside = part["weights"], None
        overlap = jnp.zeros_like(weights)
        scaled = draft_logits / self.temperature
        never = jnp.full((*draft_logits.shape[:2], 1), -jnp.inf)
        with_never = lambda logits: jnp.concatenate([logits, never], axis=-1)
        if of_target is not None:
            at_1, target = of_target
            overlap = divergences.acceptance(at_1, with_never(jax.lax.stop_gradient(draft_logits)))
            outside = jax.nn.softmax(at_1)[..., -1]
        if self.divergence is None:
            columns, has_column = self.draft.vocabulary.columns(part["labels"])
            losses = jnp.where(has_column, _negative_log_likelihood(scaled, columns), 0)
            return Values(losses, weights, overlap, outside)

        def diverging(divergence: Divergence):
            if divergence.name in divergences.FINITE:
                return divergence(target, with_never(scaled))
            mass = 1 - jax.nn.softmax(target)[..., -1]
            return mass * divergence(target[..., :-1], scaled)

        return Values(self._diverging(diverging, part), weights, overlap, outside)

    def _diverging(self, diverging, part: dict[str, Array]) -> Float[Array, "B C"]:
        """The values of `diverging` for the divergence, and at refused positions for theirs."""
        values = diverging(self.divergence)
        if "refused" not in part or self.refused in (None, self.divergence):
            return values
        return jnp.where(part["refused"], diverging(self.refused), values)


def _negative_log_likelihood(logits: Float[Array, "B C W"], labels: Int[Array, "B C"]) -> Float[Array, "B C"]:
    # A comparison instead of a gather: its gradient is not a scatter, and a sharded vocabulary stays sharded.
    chosen = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None] == labels[..., None]
    label_logits = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - label_logits
