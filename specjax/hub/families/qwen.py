"""The Qwen families: Llama's layout with windows in some layers.

Qwen2 and Qwen2.5 have biases of query, key and value; Qwen3 has norms of query and key heads.
"""

import dataclasses
from typing import Any

from specjax.hub.families import llama, rotary_fields, window_fields
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError


def max_window_layers(fields: dict[str, Any]) -> int:
    """The field of this name. Raises UserError unless it is a number of layers."""
    count = fields.get("max_window_layers")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise UserError(f'"max_window_layers" must be a number of layers, not {count!r}')
    return count


def _windowed(fields: dict[str, Any], values: dict[str, Any]) -> list[bool]:
    first = max_window_layers(fields)
    return [layer >= first for layer in range(values["layers"])]


def _write(config: DecoderConfig) -> dict[str, Any]:
    """Readers that ignore "layer_types" get the first layer that has a window."""
    first = next((layer for layer in range(config.layers) if config.window(layer)), config.layers)
    return {**_WINDOWS.write(config), "max_window_layers": first}


_WINDOWS = window_fields.windows(_windowed)
_POSITIONS = (rotary_fields.rotary(), _WINDOWS._replace(write=_write))
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
    fields=(*llama.FIELDS, *_POSITIONS),
    absent=_ABSENT,
    always={"attention_bias": True},
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(*llama.FIELDS, *llama.ATTENTION_BIAS, *_POSITIONS),
    absent={**_ABSENT, "head_dim": 128},  # whatever the width
    always={"qk_norm": True},
)
