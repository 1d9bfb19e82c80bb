"""The table of drafters by name, and how their options and drafters are made. A new drafter needs an entry here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from specjax.decoding.drafters.adaptive import AdaptiveDrafter
from specjax.decoding.drafters.base import Drafter, DrafterOptions
from specjax.decoding.drafters.block_parallel import BlockParallelDraft
from specjax.decoding.drafters.eagle3 import Eagle3
from specjax.decoding.drafters.early_exit import EarlyExit
from specjax.decoding.drafters.kangaroo import Kangaroo
from specjax.decoding.drafters.lookup_first import LookupFirstDrafter
from specjax.decoding.drafters.medusa import Medusa
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.ngram import NGram
from specjax.decoding.drafters.pard import Pard
from specjax.decoding.drafters.skip_layers import SkipLayers
from specjax.models.language_model import LanguageModel
from specjax.runtime import checks
from specjax.runtime.errors import UserError, nearest, prefixed
from specjax.runtime.extensions import named

DRAFTERS: dict[str, type[DrafterOptions]] = {
    "model": ModelDraft,
    "pard": Pard,
    "ngram": NGram,
    "early_exit": EarlyExit,
    "skip_layers": SkipLayers,
    "kangaroo": Kangaroo,
    "medusa": Medusa,
    "eagle3": Eagle3,
    "block_parallel": BlockParallelDraft,
}


def options_class(kind: str | type) -> type[DrafterOptions]:
    """The options class of a drafter: by a key of `DRAFTERS`, by "path/to/file.py:Name", or the class itself.

    Raises:
      UserError: for an unknown name, and for an object that is not a subclass of DrafterOptions.
    """
    options = named(kind, DRAFTERS, "drafter") if isinstance(kind, str) else kind
    if not (isinstance(options, type) and issubclass(options, DrafterOptions)):
        raise UserError(f'drafter "{kind}" must be a subclass of specjax.decoding.drafters.base.DrafterOptions')
    return options


def make_options(kind: str | type, values: Mapping[str, Any], where: str = "") -> DrafterOptions:
    """Makes the options of one drafter from the keys of a config section.

    Args:
      values: option values by name.
      where: prefix of option names in error messages: the section's key and a dot.

    Raises:
      UserError: for an option that this drafter does not have, a missing option, or a value of the wrong type.
    """
    options = options_class(kind)
    fields = dataclasses.fields(options)
    names_of = lambda table: [field.name for field in dataclasses.fields(table)]
    for name in values:
        if name not in names_of(options):
            owners = ", ".join(f'"{other}"' for other, table in DRAFTERS.items() if name in names_of(table))
            if owners:
                raise UserError(f'{where}{name} is an option of {owners}, not of "{kind}"; leave it out')
            raise UserError(f"{where}{name} does not exist{nearest(name, names_of(options))}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in values:
            raise UserError(f'{where}{field.name} is missing, and drafter "{kind}" needs it; give it a value')
    with prefixed(where):
        return options(**values)


def build_drafter(options: DrafterOptions, target: LanguageModel, gamma: int, loaded: Any = None) -> Drafter | None:
    """The drafter with these options, with lookup or an adaptive length if they say so; None if gamma is 0.

    Args:
      loaded: the LanguageModel or Attachment read from the drafter's `path`, without parameters; None if there is none.

    Raises:
      UserError: for a gamma that is not an int >= 0, or options that are invalid for this target.
    """
    checks.instance("gamma", gamma, int)
    if gamma < 0:
        raise UserError(f"gamma must be 0 (plain decoding) or more, not {gamma}")
    if options.loads == "attachment" and not isinstance(options, options_class(loaded.drafter)):
        raise UserError(f'what is loaded is made for drafter "{loaded.drafter}", not for {options}; set kind to that')
    if options.vocabulary is not None and loaded is not None and loaded.vocabulary != options.vocabulary:
        raise ValueError("What is loaded must be cut to the draft vocabulary first, see hub.model.reduced.")
    of_head = min(gamma, options.head_gamma or gamma)
    drafter = options.build(target, of_head, loaded) if gamma else None
    if drafter is None:
        return None
    how = {"greedy": options.draft_sample_method == "greedy", "leaves_unsure": options.leave_unsure}
    if any(how.values()):
        drafter = dataclasses.replace(drafter, **how)
    if options.lookup:
        drafter = LookupFirstDrafter.around(drafter, gamma, options.lookup, target.is_encoder_decoder)
    return AdaptiveDrafter.of(drafter, gamma) if options.adaptive else drafter
