"""The SmolLM3 family (arXiv 2501.18795): Llama's layout, but some layers do not rotate queries and keys."""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, qwen, rotary_fields
from specjax.runtime.errors import UserError


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Which layers rotate (1 in "no_rope_layers": it does); without "layer_types", the others have the window."""
    rotates, layers = fields.get("no_rope_layers"), values["layers"]
    if rotates is None:
        interval = base.value_of(fields, "no_rope_layer_interval", int)
        rotates = [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(rotates, list) or len(rotates) < layers or any(entry not in (0, 1) for entry in rotates):
        raise UserError(f'"no_rope_layers" must have a 0 or a 1 for each layer, not {rotates!r}')
    rotates = tuple(map(bool, rotates[:layers]))
    windows = qwen.windows_of(fields, [not rotated for rotated in rotates])
    return {"rotary_layers": () if all(rotates) else rotates, "windows": windows}


def _write(config) -> dict[str, Any]:
    rotates = [int(config.uses_rotary(layer)) for layer in range(config.layers)]
    return {"no_rope_layers": rotates, **qwen.written_windows(config)}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    fields=(
        *llama.fields(tied_head=True),
        *llama.ATTENTION_BIAS,
        llama.MLP_BIAS,
        rotary_fields.rotary(2e6),
        base.Group(_read, _write),
    ),
    only=llama.ONLY,
    absent={"num_key_value_heads": 4, "max_position_embeddings": 32768, "no_rope_layer_interval": 4},
)
