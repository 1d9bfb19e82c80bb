"""Drafters by name: the one table that a new drafter joins."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from specjax.decoding.drafters.adaptive import AdaptiveDrafter
from specjax.decoding.drafters.base import Drafter, DrafterOptions
from specjax.decoding.drafters.early_exit import EarlyExit
from specjax.decoding.drafters.kangaroo import Kangaroo
from specjax.decoding.drafters.medusa import Medusa
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.ngram import NGram
from specjax.decoding.drafters.skip_layers import SkipLayers
from specjax.models.language_model import LanguageModel
from specjax.runtime import checks
from specjax.runtime.errors import UserError, nearest, prefixed
from specjax.runtime.extensions import named

DRAFTERS: dict[str, type[DrafterOptions]] = {
    "model": ModelDraft,
    "ngram": NGram,
    "early_exit": EarlyExit,
    "skip_layers": SkipLayers,
    "kangaroo": Kangaroo,
    "medusa": Medusa,
}


def options_class(kind: str | type) -> type[DrafterOptions]:
    """The options of a drafter: a name of `DRAFTERS`, "path/to/file.py:Name" of a user's own class, or that class.

    Raises:
      UserError: for an unknown name, and for what is no subclass of DrafterOptions.
    """
    options = named(kind, DRAFTERS, "drafter") if isinstance(kind, str) else kind
    if not (isinstance(options, type) and issubclass(options, DrafterOptions)):
        raise UserError(f'drafter "{kind}" must be a subclass of specjax.decoding.drafters.base.DrafterOptions')
    return options


def make_options(kind: str | type, values: Mapping[str, Any], where: str = "") -> DrafterOptions:
    """The options of one drafter from a config's keys.

    Args:
      values: by name.
      where: the key of the section that they are in, with a dot; it begins the names in errors.

    Raises:
      UserError: for a name that this drafter does not have, one that is missing, or a value of another type.
    """
    options = options_class(kind)
    fields = dataclasses.fields(options)
    for name in values:
        if name not in [field.name for field in fields]:
            owners = [f'"{other}"' for other, table in DRAFTERS.items() if name in table.__dataclass_fields__]
            if owners:
                raise UserError(f'{where}{name} is an option of {" and ".join(owners)}, not of "{kind}"; leave it out')
            raise UserError(f"{where}{name} does not exist{nearest(name, [field.name for field in fields])}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in values:
            raise UserError(f'{where}{field.name} is missing, and drafter "{kind}" needs it; give it a value')
    with prefixed(where):
        return options(**values)


def build_drafter(options: DrafterOptions, target: LanguageModel, gamma: int, loaded: Any = None) -> Drafter | None:
    """The drafter with these options, wrapped where its draft length adapts; None when gamma is 0 (plain decoding).

    Args:
      loaded: the model or attachment, without its parameters, that `options.loads` announces.

    Raises:
      UserError: for a gamma that is no number of tokens, or options that do not fit the target.
    """
    checks.instance("gamma", gamma, int)
    if gamma < 0:
        raise UserError(f"gamma must be 0 (plain decoding) or more, not {gamma}")
    if options.loads == "attachment" and not isinstance(options, options_class(loaded.drafter)):
        raise UserError(f'what is loaded is made for drafter "{loaded.drafter}", not for {options}; set kind to that')
    drafter = options.build(target, gamma, loaded) if gamma else None
    return AdaptiveDrafter(drafter, gamma) if drafter is not None and options.adaptive else drafter
