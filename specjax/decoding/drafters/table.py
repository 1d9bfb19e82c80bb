"""Drafters by name: the one table that a new drafter joins."""

from typing import Any

from specjax.decoding.drafters.adaptive import AdaptiveDrafter
from specjax.decoding.drafters.early_exit import EarlyExitDrafter
from specjax.decoding.drafters.kangaroo import KangarooDrafter
from specjax.decoding.drafters.medusa import MedusaDrafter
from specjax.decoding.drafters.model import ModelDrafter
from specjax.decoding.drafters.ngram import NGramDrafter
from specjax.decoding.drafters.skip_layers import SkipLayersDrafter
from specjax.models.language_model import LanguageModel
from specjax.runtime.errors import UserError, nearest


def _stops(options: dict) -> bool:
    """Whether confidence is computed at all; the threshold itself is traced, see `Sampling`."""
    return options.get("threshold", 0) > 0


def _adjusted(options: dict) -> bool:
    """Whether it is that of the probabilities drawn from, rather than that at temperature 1."""
    return options.get("adjusted", False)


def _model(target: LanguageModel, gamma: int, options: dict) -> ModelDrafter:
    # Padded to other sizes, models of one tokenizer still make a pair: the draft speaks of the target's ids.
    return ModelDrafter(options["model"].with_vocab_size(target.vocab_size), gamma, _stops(options))


def _ngram(target: LanguageModel, gamma: int, options: dict) -> NGramDrafter:
    shortest, longest = options["shortest"], options["longest"]
    if not 1 <= shortest <= longest:
        raise UserError(f"ngram needs 1 <= shortest <= longest, not shortest={shortest}, longest={longest}.")
    if _stops(options):
        raise UserError("ngram has no probabilities of which a threshold could speak; set threshold to 0.")
    return NGramDrafter(gamma, shortest, longest)


def _early_exit(target: LanguageModel, gamma: int, options: dict) -> EarlyExitDrafter:
    layer = options["exit_layer"]
    if not 1 <= layer < target.layers:
        raise UserError(f"exit_layer must lie in 1 .. {target.layers - 1} for this target, not {layer}.")
    return EarlyExitDrafter(target, layer, gamma, _stops(options), _adjusted(options))


def _skip_layers(target: LanguageModel, gamma: int, options: dict) -> SkipLayersDrafter:
    skipped = tuple(sorted(set(options["skipped"])))
    if not skipped or skipped[0] < 0 or skipped[-1] >= target.layers:
        raise UserError(
            f"skipped must name layers of the target, 0 .. {target.layers - 1}, one or more of them; not {skipped}."
        )
    if len(skipped) == target.layers:
        raise UserError(f"skipped names all {target.layers} layers of the target; leave at least one to draft with.")
    return SkipLayersDrafter(target, skipped, gamma, _stops(options))


def _adapter(kind: str, options: dict) -> Any:
    adapter = options["adapter"]
    if adapter.drafter != kind:
        raise UserError(
            f'what is loaded drafts in the manner of "{adapter.drafter}", not of "{kind}"; set kind to that.'
        )
    return adapter


def _medusa(target: LanguageModel, gamma: int, options: dict) -> MedusaDrafter:
    heads = _adapter("medusa", options)
    if gamma > heads.config.heads:
        raise UserError(
            f"gamma {gamma} is more than the {heads.config.heads} Medusa heads draft; "
            f"take gamma {heads.config.heads} or less, or train more heads."
        )
    return MedusaDrafter(target, heads, gamma, _stops(options))


def _kangaroo(target: LanguageModel, gamma: int, options: dict) -> KangarooDrafter:
    adapter = _adapter("kangaroo", options)
    layer = adapter.config.exit_layer
    return KangarooDrafter(target, layer, gamma, _stops(options), _adjusted(options), adapter=adapter)


DRAFTERS = {
    "model": _model,
    "ngram": _ngram,
    "early_exit": _early_exit,
    "skip_layers": _skip_layers,
    "kangaroo": _kangaroo,
    "medusa": _medusa,
}

# Those that need something trained beside the target, which `hub.adapter` keeps.
ATTACHED = ("kangaroo", "medusa")

# Options that are lists; other lists in a config's section of a drafter are the gammas of a rule.
LISTS = ("skipped", "costs")


def make_drafter(kind: str, target: LanguageModel, gamma: int, options: dict[str, Any]) -> Any:
    """Builds the drafter called `kind`; None when gamma is 0 (plain decoding).

    Args:
      options: `model` (a LanguageModel) for "model"; `shortest`, `longest` for "ngram"; `exit_layer` for "early_exit";
        `skipped` (layer numbers) for "skip_layers"; `adapter` for "kangaroo" (a models.adapters.Adapter) and "medusa"
        (a models.medusa.MedusaHeads). All but "ngram" take a `threshold`, 0 where there is none: above it the drafter
        stops where it is less sure than `Sampling.threshold` says. "early_exit" and "kangaroo" take `adjusted`:
        confidence after temperature, top-k and top-p. With `adaptive` any of them drafts up to gamma tokens, as many
        as pay by `Sampling.costs`.

    Raises:
      UserError: for an unknown kind, a negative gamma, or options outside their range.
    """
    if kind not in DRAFTERS:
        raise UserError(f"Unknown drafter {kind!r}{nearest(kind, DRAFTERS)}.")
    if gamma < 0:
        raise UserError(f"gamma must be 0 (plain decoding) or more, not {gamma}.")
    drafter = DRAFTERS[kind](target, gamma, options) if gamma else None
    return AdaptiveDrafter(drafter, gamma) if drafter is not None and options.get("adaptive") else drafter
