"""The Qwen families: Llama's layout with windows in some layers.

Qwen2 and Qwen2.5 have biases of query, key and value; Qwen3 has norms of query and key heads.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from specjax.hub.families import base, llama, rotary_fields
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

FULL, SLIDING = KINDS = ("full_attention", "sliding_attention")


def windows_of(fields: dict[str, Any], windowed: Sequence[bool]) -> tuple[int, ...]:
    """The window of each layer, () where none has one.

    Args:
      windowed: which layers have the window if there is no "layer_types".

    Raises:
      UserError: naming the field that is wrong.
    """
    window = 0
    if base.value_of(fields, "use_sliding_window", bool, absent=False):
        window = base.value_of(fields, "sliding_window", int, absent=0)
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [KINDS[bool(window) and layer] for layer in windowed]
    if not isinstance(kinds, list) or len(kinds) != len(windowed) or any(kind not in KINDS for kind in kinds):
        raise UserError(f'"layer_types" must have one of {", ".join(KINDS)} for each layer, not {kinds!r}')
    if SLIDING in kinds and not window:
        raise UserError(
            '"layer_types" names layers with a window, but there is none; '
            'give "sliding_window" and "use_sliding_window", or take the complete config.json'
        )
    return tuple(window * (kind == SLIDING) for kind in kinds) if SLIDING in kinds else ()


def written_windows(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `windows_of`."""
    windows = [config.window(layer) for layer in range(config.layers)]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "layer_types": [KINDS[bool(window)] for window in windows],
    }


def max_window_layers(fields: dict[str, Any]) -> int:
    """The field of this name. Raises UserError unless it is a number of layers."""
    count = fields.get("max_window_layers")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise UserError(f'"max_window_layers" must be a number of layers, not {count!r}')
    return count


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Windows in the layers from "max_window_layers" on, unless "layer_types" says otherwise."""
    first = max_window_layers(fields)
    return {"windows": windows_of(fields, [layer >= first for layer in range(values["layers"])])}


def _write(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `_read`; readers that ignore "layer_types" get the first layer that has a window."""
    first = next((layer for layer in range(config.layers) if config.window(layer)), config.layers)
    return {**written_windows(config), "max_window_layers": first}


_POSITIONS = (rotary_fields.rotary(), base.Group(_read, _write))
_ABSENT = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

QWEN2 = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=(*llama.fields(), *_POSITIONS),
    only={**llama.ONLY, "mlp_bias": (False, None), "use_mrope": (False, None)},
    absent=_ABSENT,
    always={"attention_bias": True},
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(*llama.fields(), *llama.ATTENTION_BIAS, *_POSITIONS),
    only={**llama.ONLY, "mlp_bias": (False, None)},
    absent={**_ABSENT, "head_dim": 128},  # whatever the width
    always={"qk_norm": True},
)
