"""Reads and writes the fields of a `config.json` for sliding windows."""

from collections.abc import Callable, Sequence
from typing import Any

from specjax.hub.families.base import Group, value_of
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

FULL, SLIDING = KINDS = ("full_attention", "sliding_attention")
NAMES = ("use_sliding_window", "sliding_window", "layer_types")
# Function from the fields, and the attributes read before, to whether each layer has the window.
Windowed = Callable[[dict[str, Any], dict[str, Any]], Sequence[bool]]


def every_layer(fields: dict[str, Any], values: dict[str, Any]) -> list[bool]:
    """The window is in all layers."""
    return [True] * values["layers"]


def windows(windowed: Windowed, names: Sequence[str] = NAMES, size: int = 0) -> Group:
    """The group of fields for windows.

    Args:
      windowed: the layers that have the window if there is no "layer_types".
      names: those of `NAMES` that are written; without "use_sliding_window", a window is always used.
      size: the window if the file has none, for families whose layers need one; 0 if there may be none.
    """

    def read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        window = 0
        if NAMES[0] not in names or value_of(fields, "use_sliding_window", bool, absent=False):
            window = value_of({"sliding_window": size or None, **fields}, "sliding_window", int, absent=0)
        kinds = fields.get("layer_types")
        if kinds is None:
            kinds = [KINDS[bool((window or size) and layer)] for layer in windowed(fields, values)]
        if not isinstance(kinds, list) or len(kinds) != values["layers"] or any(kind not in KINDS for kind in kinds):
            raise UserError(f'"layer_types" must have one of {", ".join(KINDS)} for each layer, not {kinds!r}')
        if SLIDING in kinds and not window:
            raise UserError(
                '"layer_types" names layers with a window, but there is none; '
                'give "sliding_window" and "use_sliding_window", or take the complete config.json'
            )
        return {"windows": tuple(window * (kind == SLIDING) for kind in kinds) if SLIDING in kinds else ()}

    def write(config: DecoderConfig) -> dict[str, Any]:
        sizes = [config.window(layer) for layer in range(config.layers)]
        kinds = [KINDS[bool(window)] for window in sizes]
        written = dict(zip(NAMES, (any(sizes), max(sizes) or size or None, kinds), strict=True))
        return {name: written[name] for name in names}

    return Group(read, write, NAMES)
