"""Reads and writes the fields of a `config.json` for rotary positions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specjax.hub.families.base import Group, value_of
from specjax.models.config import DecoderConfig
from specjax.models.rotary import Rotary
from specjax.runtime.errors import UserError

# Attributes of `Rotary` and their fields, in the order in which they are written.
_NAMES = {
    "factor": "factor",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
    "magnitude": "attention_factor",
}
# The attributes that each kind of scaling has.
_KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_frequency", "high_frequency", "original_positions"),
    "yarn": ("factor", "original_positions", "beta_fast", "beta_slow", "truncate", "magnitude"),
    "longrope": ("factor", "original_positions", "short_factors", "long_factors", "magnitude"),
}
# Fields that all kinds have, and a family's own top-level names for them.
_NAMED = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
# Attributes whose field may be missing; they then keep the defaults of `Rotary`.
_OPTIONAL = ("beta_fast", "beta_slow", "magnitude")


def rotary(
    theta: float = 10000.0,
    *,
    partial: bool = False,
    share: float = 1.0,
    names: Mapping[str, str] = _NAMED,
) -> Group:
    """The group of fields for rotary positions.

    Args:
      theta: default rotary base of the family.
      partial: whether "partial_rotary_factor" may leave channels of each head unrotated.
      share: default share of the channels that are rotated.
      names: the family's own top-level names of these two fields.
    """

    def read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        size = values["head_size"]
        positions = rotary_of(fields, size, values["max_positions"], theta=theta, share=share, names=names)
        if positions.size != size and not partial:
            raise UserError(
                f'"partial_rotary_factor" turns {positions.size} of {size} channels, which this family does not; '
                "remove it"
            )
        return {"rotary": positions}

    def write(config: DecoderConfig) -> dict[str, Any]:
        written = written_rotary(config.rotary, config.head_size, always=share != 1)
        return {names.get(name, name): value for name, value in written.items()}

    return Group(read, write)


def rotary_of(
    fields: Mapping[str, Any],
    size: int,
    max_positions: int,
    *,
    theta: float = 10000.0,
    share: float = 1.0,
    names: Mapping[str, str] = _NAMED,
) -> Rotary:
    """The rotary positions that a `config.json` describes.

    Older files have "rope_theta" and "partial_rotary_factor" at the top level, next to "rope_scaling". Newer ones have
    all of it inside "rope_parameters".

    Args:
      size: H, the head size; "partial_rotary_factor" is applied here.
      max_positions: default for the original length of "dynamic", "llama3", "yarn" and "longrope".
      theta, share, names: see `rotary`.

    Raises:
      UserError: naming the field, for one that is unknown or contradicts another.
    """
    nested = []
    for name in ("rope_parameters", "rope_scaling"):
        place = fields.get(name)
        if place is not None and not isinstance(place, dict):
            raise UserError(f'"{name}" must be an object, not {place!r}')
        nested += [place] if place else []
    kinds = list(dict.fromkeys(place.get("rope_type", place.get("type", "default")) for place in nested)) or ["default"]
    if len(kinds) > 1:
        raise UserError(f'"rope_parameters" and "rope_scaling" disagree ({kinds[0]!r}, {kinds[1]!r}); keep one')
    kind = {"su": "longrope"}.get(kinds[0], kinds[0])
    if kind not in _KINDS:
        raise UserError(f'"rope_scaling" is of type {kind!r}, which is not supported; {", ".join(_KINDS)} are')
    places = lambda name, other: [(fields, name), (fields, other), *((place, name) for place in nested)]
    base, share = (_single(places(*pair), absent) for pair, absent in zip(names.items(), (theta, share), strict=True))
    rotated = int(size * share)
    scaling = {key: value for place in nested for key, value in place.items()}
    for key in ("rope_type", "type", *_NAMED):
        scaling.pop(key, None)
    try:
        return Rotary(theta=base, size=rotated, kind=kind, **_read_scaling(kind, scaling, fields, max_positions))
    except ValueError as error:
        raise UserError(f"no such rotary positions can be built: {str(error).rstrip('.')}; correct them") from None


def _single(places: Sequence[tuple[Mapping[str, Any], str]], absent: Any, kind: type = float) -> int | float:
    """A number that may be at several places, each a dict and a key. Raises UserError if they have different values."""
    values = {value_of(place, name, kind): name for place, name in reversed(places) if place.get(name) is not None}
    if len(values) > 1:
        (second, other), (first, name) = list(values.items())[-2:]
        where = "twice" if name == other else f'also as "{other}"'
        raise UserError(f'"{name}" is given {where} and differently, {first:g} and {second:g}; keep the right one')
    return next(iter(values), absent)


def _read_scaling(kind: str, scaling: dict[str, Any], fields: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """The `Rotary` attributes of a scaling. Removes their fields from `scaling`; raises UserError if any remain."""
    values: dict[str, Any] = {}
    name = _NAMES["original_positions"]
    if kind not in ("default", "linear"):
        # Newer files (Phi-3) have the field at the top level, older ones nested; for "dynamic" it is always nested.
        places = [({} if kind == "dynamic" else fields, name), ({name: scaling.pop(name, None)}, name)]
        values["original_positions"] = original = int(_single(places, max_positions, int))
        if kind == "dynamic" and original != max_positions:
            raise UserError(f'"{name}" is {original}, but "dynamic" stretches {max_positions}; remove it')
    for attribute in _KINDS[kind]:
        if attribute == "original_positions":
            continue
        name = _NAMES[attribute]
        value = scaling.pop(name, None)
        if attribute == "truncate":
            values[attribute] = value is not False
        elif attribute in ("short_factors", "long_factors"):
            if not isinstance(value, list) or not all(isinstance(v, int | float) and v > 0 for v in value):
                raise UserError(f'"{name}" must be a list of positive numbers; take the complete config.json')
            values[attribute] = tuple(map(float, value))
        elif value is not None:
            values[attribute] = value_of({name: value}, name, float)
        elif attribute == "factor" and kind == "longrope":
            values[attribute] = max_positions / original
        elif attribute not in _OPTIONAL:
            raise UserError(f'"rope_scaling" of type "{kind}" lacks "{name}"; take the complete config.json')
    if kind == "yarn":
        share, share_all = (
            None if (value := scaling.pop(name, None)) is None else value_of({name: value}, name, float)
            for name in ("mscale", "mscale_all_dim")
        )
        if "magnitude" not in values and share is not None and share_all is not None:
            grow = lambda share: 0.1 * share * math.log(values["factor"]) + 1 if values["factor"] > 1 else 1.0
            values["magnitude"] = grow(share) / grow(share_all)
    for name, value in scaling.items():
        if value is not None:
            raise UserError(
                f'"rope_scaling" sets {name!r} to {value!r}, which "{kind}" rotary positions do not support'
            )
    return values


def written_rotary(rotary: Rotary, head_size: int, *, always: bool = False) -> dict[str, Any]:
    """The fields of `config.json` for these rotary positions; the inverse of `rotary_of`.

    transformers before 5 reads "rope_theta" and "rope_scaling", later versions read "rope_parameters". With `always`,
    "partial_rotary_factor" is written also if all channels are rotated.
    """
    scaling: dict[str, Any] = {"rope_type": rotary.kind}
    for attribute, name in _NAMES.items():
        value = getattr(rotary, attribute)
        if attribute in _KINDS[rotary.kind] and value is not None:
            scaling[name] = list(value) if isinstance(value, tuple) else value
    share = rotary.size / head_size
    if int(head_size * share) < rotary.size:  # readers round down: 44 * (30 / 44) gives 29
        share = math.nextafter(share, 1)
    partial = {} if rotary.size == head_size and not always else {"partial_rotary_factor": share}
    fields: dict[str, Any] = {"rope_theta": rotary.theta, **partial}
    fields["rope_parameters"] = {"rope_theta": rotary.theta, **scaling, **partial}
    if rotary.kind != "default":
        fields["rope_scaling"] = scaling
    return fields
