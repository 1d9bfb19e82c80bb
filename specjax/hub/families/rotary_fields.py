"""Reads and writes the fields of a `config.json` for rotary positions."""

import math
from collections.abc import Mapping
from typing import Any

from specjax.hub.families.base import Field, Group, agreed, value_of
from specjax.models.config import DecoderConfig
from specjax.models.rotary import Rotary
from specjax.runtime.errors import UserError

_FACTOR = Field("factor", "factor", float)
_ORIGINAL = Field("original_positions", "original_max_position_embeddings")
_MAGNITUDE = Field("magnitude", "attention_factor", float, absent=None)
# The fields of each kind of scaling, in the order in which they are written.
_KINDS = {
    "default": (),
    "linear": (_FACTOR,),
    "dynamic": (_FACTOR,),
    "llama3": (
        _FACTOR,
        Field("low_frequency", "low_freq_factor", float),
        Field("high_frequency", "high_freq_factor", float),
        _ORIGINAL,
    ),
    "yarn": (
        _FACTOR,
        _ORIGINAL,
        Field("beta_fast", "beta_fast", float, Rotary.beta_fast),
        Field("beta_slow", "beta_slow", float, Rotary.beta_slow),
        Field("truncate", "truncate", bool, True),
        _MAGNITUDE,
    ),
    "longrope": (
        _ORIGINAL,
        _FACTOR._replace(absent=lambda values: values["max_positions"] / values["original_positions"]),
        Field("short_factors", "short_factor", tuple),
        Field("long_factors", "long_factor", tuple),
        _MAGNITUDE,
    ),
}
# Fields that all kinds have, and a family's own top-level names for them.
_NAMED = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}


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
    base, share = (
        agreed(places(*pair), float, absent) for pair, absent in zip(names.items(), (theta, share), strict=True)
    )
    scaling = {key: value for place in nested for key, value in place.items()}
    for key in ("rope_type", "type", *_NAMED):
        scaling.pop(key, None)
    try:
        return Rotary(base, int(size * share), kind, **_read_scaling(kind, scaling, fields, max_positions))
    except ValueError as error:
        raise UserError(f"no such rotary positions can be built: {str(error).rstrip('.')}; correct them") from None


def _read_scaling(kind: str, scaling: dict[str, Any], fields: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """The `Rotary` attributes of a scaling. Raises UserError for a field that its kind does not have."""
    known = {field.name for field in _KINDS[kind]} | ({"mscale", "mscale_all_dim"} if kind == "yarn" else set())
    values: dict[str, Any] = {}
    if kind == "dynamic":
        values["original_positions"] = max_positions
        if scaling.pop(_ORIGINAL.name, None) not in (None, max_positions):
            raise UserError(f'"{_ORIGINAL.name}" must be {max_positions}, which "dynamic" stretches; remove it')
    if _ORIGINAL in _KINDS[kind]:  # newer files (Phi-3) have the field at the top level, older ones nested
        places = [(fields, _ORIGINAL.name), (scaling, _ORIGINAL.name)]
        scaling[_ORIGINAL.name] = agreed(places, int, max_positions)
    for name, value in scaling.items():
        if name not in known and value is not None:
            raise UserError(
                f'"rope_scaling" sets {name!r} to {value!r}, which "{kind}" rotary positions do not support'
            )
    for field in _KINDS[kind]:
        values |= field.read(scaling, {**values, "max_positions": max_positions})
    if kind == "yarn":
        shares = [value_of(scaling, name, float, absent=None) for name in ("mscale", "mscale_all_dim")]
        if values["magnitude"] is None and None not in shares:
            one, every = (0.1 * share * math.log(max(values["factor"], 1)) + 1 for share in shares)
            values["magnitude"] = one / every
    return values


def written_rotary(rotary: Rotary, head_size: int, *, always: bool = False) -> dict[str, Any]:
    """The fields of `config.json` for these rotary positions; the inverse of `rotary_of`.

    transformers before 5 reads "rope_theta" and "rope_scaling", later versions read "rope_parameters". With `always`,
    "partial_rotary_factor" is written also if all channels are rotated.
    """
    scaling: dict[str, Any] = {"rope_type": rotary.kind}
    for field in _KINDS[rotary.kind]:
        scaling |= {name: value for name, value in field.write(rotary).items() if value is not None}
    share = rotary.size / head_size
    if int(head_size * share) < rotary.size:  # readers round down: 44 * (30 / 44) gives 29
        share = math.nextafter(share, 1)
    partial = {} if rotary.size == head_size and not always else {"partial_rotary_factor": share}
    fields: dict[str, Any] = {"rope_theta": rotary.theta, **partial}
    fields["rope_parameters"] = {"rope_theta": rotary.theta, **scaling, **partial}
    if rotary.kind != "default":
        fields["rope_scaling"] = scaling
    return fields
