"""The fields of a `config.json` about rotary positions, read and written."""

import math
from collections.abc import Mapping
from typing import Any

from specjax.hub.families.base import number
from specjax.models.rotary import Rotary
from specjax.runtime.errors import UserError


def rotary_of(fields: Mapping[str, Any], size: int, max_positions: int, *, theta: float = 10000.0) -> Rotary:
    """The rotary positions that a `config.json` describes.

    Older files have "rope_theta" and "partial_rotary_factor" at the top level and "rope_scaling" beside them, newer
    ones all of it inside "rope_parameters".

    Args:
      size: H, channels of a head (the partial factor is taken off here).
      max_positions: what "dynamic", "llama3", "yarn" and "longrope" take for the original length where none is given.
      theta: the family's own base where the file gives none.

    Raises:
      UserError: naming the field, for what is unknown or contradicts itself.
    """
    scaling: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        nested = fields.get(name)
        if nested is not None and not isinstance(nested, dict):
            raise UserError(f'"{name}" must be an object, not {nested!r}')
        scaling |= nested or {}
    nested = [fields[name] for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    kinds = {place.get("rope_type", place.get("type", "default")) for place in nested} or {"default"}
    kind = kinds.pop()
    if kinds:
        raise UserError(f'"rope_parameters" and "rope_scaling" disagree ({kind!r}, {kinds.pop()!r}); keep one')
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in _SCALINGS:
        raise UserError(f'"rope_scaling" is of type {kind!r}, which is not supported; {", ".join(_SCALINGS)} are')
    base = _once([fields, *nested], "rope_theta", theta)
    turned = int(size * _once([fields, *nested], "partial_rotary_factor", 1.0))
    for key in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
    try:
        values = _SCALINGS[kind](_Scaling(kind, scaling), fields, max_positions)
        return Rotary(theta=base, size=turned, kind=kind, **values)
    except ValueError as error:
        raise UserError(f"no such rotary positions can be built: {str(error).rstrip('.')}; correct them") from None


def _once(places, name, absent, kind=float) -> int | float:
    """A number that several places may give, but only one value."""
    given = [number(place, name, kind) for place in places if place.get(name) is not None]
    if len(set(given)) > 1:
        raise UserError(f'"{name}" is given twice and differently, {given[0]:g} and {given[1]:g}; keep the right one')
    return given[0] if given else absent


class _Scaling:
    """The fields of a scaling, taken out one by one: what is left over is not understood."""

    def __init__(self, kind: str, fields: dict[str, Any]):
        self.kind, self.fields = kind, dict(fields)

    def take(self, name: str, absent: float | None = None) -> float:
        value = number(self.fields, name, float, absent=-1 if absent is None else absent)
        self.fields.pop(name, None)
        if value == -1:
            raise UserError(f'"rope_scaling" of type "{self.kind}" lacks "{name}"; take the complete config.json')
        return value

    def optional(self, name: str) -> Any:
        value = self.fields.pop(name, None)
        return None if value is None else number({name: value}, name, float)

    def done(self, values: dict[str, Any]) -> dict[str, Any]:
        for name, value in self.fields.items():
            if value is not None:
                raise UserError(
                    f'"rope_scaling" sets {name!r} to {value!r}, which "{self.kind}" rotary positions do not support'
                )
        return values


def _default(scaling, fields, max_positions):
    return scaling.done({})


def _linear(scaling, fields, max_positions):
    return scaling.done({"factor": scaling.take("factor")})


def _original(scaling, fields, max_positions) -> int:
    """The longest text before stretching: newer readers prefer the one at the top level (Phi-3), older the other."""
    name = "original_max_position_embeddings"
    return int(_once([fields, {name: scaling.fields.pop(name, None)}], name, max_positions, int))


def _dynamic(scaling, fields, max_positions):
    original = _original(scaling, {}, max_positions)
    if original != max_positions:
        raise UserError(
            f'"original_max_position_embeddings" is {original}, but "dynamic" stretches {max_positions}; remove it'
        )
    return scaling.done({"factor": scaling.take("factor"), "original_positions": original})


def _llama3(scaling, fields, max_positions):
    return scaling.done(
        {
            "factor": scaling.take("factor"),
            "low_frequency": scaling.take("low_freq_factor"),
            "high_frequency": scaling.take("high_freq_factor"),
            "original_positions": _original(scaling, fields, max_positions),
        }
    )


def _yarn(scaling, fields, max_positions):
    factor = scaling.take("factor")
    values = {
        "factor": factor,
        "original_positions": _original(scaling, fields, max_positions),
        "beta_fast": scaling.take("beta_fast", 32.0),
        "beta_slow": scaling.take("beta_slow", 1.0),
        "truncate": scaling.fields.pop("truncate", True) is not False,
        "magnitude": scaling.optional("attention_factor"),
    }
    mscale, every = scaling.optional("mscale"), scaling.optional("mscale_all_dim")
    if values["magnitude"] is None and mscale is not None and every is not None:
        grown = lambda share: 0.1 * share * math.log(factor) + 1 if factor > 1 else 1.0
        values["magnitude"] = grown(mscale) / grown(every)
    return scaling.done(values)


def _longrope(scaling, fields, max_positions):
    original = _original(scaling, fields, max_positions)
    factors = {}
    for name, key in (("short_factor", "short_factors"), ("long_factor", "long_factors")):
        values = scaling.fields.pop(name, None)
        if not isinstance(values, list) or not all(isinstance(v, int | float) and v > 0 for v in values):
            raise UserError(f'"{name}" must be a list of positive numbers; take the complete config.json')
        factors[key] = tuple(map(float, values))
    factor = scaling.take("factor", max_positions / original)
    return scaling.done(
        {"factor": factor, "original_positions": original, "magnitude": scaling.optional("attention_factor"), **factors}
    )


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def written_rotary(rotary: Rotary, head_size: int) -> dict[str, Any]:
    """The fields of `config.json` for these rotary positions; the inverse of `rotary_of`.

    Readers before transformers 5 look for "rope_theta" and "rope_scaling", later ones for "rope_parameters".
    """
    scaling: dict[str, Any] = {"rope_type": rotary.kind}
    keys = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_frequency", "high_frequency", "original_positions"),
        "yarn": ("factor", "original_positions", "beta_fast", "beta_slow", "truncate", "magnitude"),
        "longrope": ("factor", "original_positions", "short_factors", "long_factors", "magnitude"),
    }
    for key in keys.get(rotary.kind, ()):
        value = getattr(rotary, key)
        if value is not None:
            scaling[_WRITTEN.get(key, key)] = list(value) if isinstance(value, tuple) else value
    share = rotary.size / head_size
    if int(head_size * share) < rotary.size:  # readers cut off, 44 * (30 / 44) to 29
        share = math.nextafter(share, 1)
    partial = {} if rotary.size == head_size else {"partial_rotary_factor": share}
    fields: dict[str, Any] = {"rope_theta": rotary.theta, **partial}
    fields["rope_parameters"] = {"rope_theta": rotary.theta, **scaling, **partial}
    if rotary.kind != "default":
        fields["rope_scaling"] = scaling
    return fields


_WRITTEN = {
    "original_positions": "original_max_position_embeddings",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "magnitude": "attention_factor",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}
