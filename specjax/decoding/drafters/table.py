"""Drafters by name: the one table that a new drafter joins."""

from typing import Any

from specjax.decoding.drafters.early_exit import EarlyExitDrafter
from specjax.decoding.drafters.kangaroo import KangarooDrafter
from specjax.decoding.drafters.model import ModelDrafter
from specjax.decoding.drafters.ngram import NGramDrafter
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
    return ModelDrafter(options["model"].fitted(target.vocab_size), gamma, _stops(options))


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


def _kangaroo(target: LanguageModel, gamma: int, options: dict) -> KangarooDrafter:
    adapter = options["adapter"]
    layer = adapter.config.exit_layer
    return KangarooDrafter(target, layer, gamma, _stops(options), _adjusted(options), adapter=adapter)


DRAFTERS = {"model": _model, "ngram": _ngram, "early_exit": _early_exit, "kangaroo": _kangaroo}


def make_drafter(kind: str, target: LanguageModel, gamma: int, options: dict[str, Any]) -> Any:
    """Builds the drafter called `kind`; None when gamma is 0 (plain decoding).

    Args:
      options: `model` (a LanguageModel) for "model"; `shortest`, `longest` for "ngram"; `exit_layer` for "early_exit";
        `adapter` (a models.adapters.Adapter) for "kangaroo". All but "ngram" take a `threshold`, 0 where there is none:
        above it the drafter stops where it is less sure than `Sampling.threshold` says. The last two take `adjusted`:
        confidence after temperature, top-k and top-p.

    Raises:
      UserError: for an unknown kind, a negative gamma, or options outside their range.
    """
    if kind not in DRAFTERS:
        raise UserError(f"Unknown drafter {kind!r}{nearest(kind, DRAFTERS)}.")
    if gamma < 0:
        raise UserError(f"gamma must be 0 (plain decoding) or more, not {gamma}.")
    return DRAFTERS[kind](target, gamma, options) if gamma else None
