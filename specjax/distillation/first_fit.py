"""Sums over training text for attachments that are fitted by least squares before step 0, see `Attachment.fitted`."""

from collections.abc import Mapping

from jaxtyping import Array

from specjax.distillation.objective import counted, stored_states
from specjax.models.attachment import AttachedDraft
from specjax.models.language_model import LanguageModel, Params, states_after
from specjax.models.least_squares import Moments


def fitted_batches(draft: LanguageModel) -> int:
    """Number of batches that the draft is fitted to; 0 if it is not."""
    return draft.attachment.fitted_batches if isinstance(draft, AttachedDraft) else 0


def moments(
    draft: AttachedDraft, target: LanguageModel, params: Params, target_params: Params, batch: Mapping[str, Array]
) -> Moments:
    """The moments of a batch (see `objective.Loss`) over the positions whose next token is in the loss."""
    tokens, layers = batch["tokens"], (*draft.attachment.taps, target.layers)
    states = stored_states(batch, layers, target)
    if states is None:
        different = sorted({*layers})
        of_layer = dict(zip(different, states_after(target, target_params, tokens, different), strict=True))
        states = tuple(of_layer[layer] for layer in layers)
    inputs, goals = draft.attachment.regression(params, target, target_params, states, tokens)
    return Moments.of(inputs, goals, counted(batch["lengths"], batch["loss_start"], tokens.shape[1]))
