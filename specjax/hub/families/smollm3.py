"""The SmolLM3 family (arXiv 2501.18795): Llama's layout, but some layers do not rotate queries and keys."""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, rotary_fields, window_fields
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Which layers rotate; 1 in "no_rope_layers" says that the layer does."""
    rotates, layers = fields.get("no_rope_layers"), values["layers"]
    if rotates is None:
        interval = base.value_of(fields, "no_rope_layer_interval", int)
        rotates = [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(rotates, list) or len(rotates) < layers or any(entry not in (0, 1) for entry in rotates):
        raise UserError(f'"no_rope_layers" must have a 0 or a 1 for each layer, not {rotates!r}')
    rotates = tuple(map(bool, rotates[:layers]))
    return {"rotary_layers": () if all(rotates) else rotates}


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {"no_rope_layers": [int(config.uses_rotary(layer)) for layer in range(config.layers)]}


def _windowed(fields: dict[str, Any], values: dict[str, Any]) -> list[bool]:
    """The layers that do not rotate."""
    return [not rotates for rotates in values["rotary_layers"] or [True] * values["layers"]]


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    fields=(
        *llama.FIELDS,
        *llama.ATTENTION_BIAS,
        llama.MLP_BIAS,
        rotary_fields.rotary(2e6),
        base.Group(_read, _write),
        window_fields.windows(_windowed),
    ),
    absent={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
)
