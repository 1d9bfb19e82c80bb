"""The SmolLM3 family (arXiv 2501.18795): Llama's layout, but some layers do not rotate queries and keys."""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, qwen
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError


def _rotary_layers(fields: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """For each layer, whether it rotates queries and keys. In the field "no_rope_layers", 1 means that it does."""
    rotates = fields.get("no_rope_layers")
    if rotates is None:
        interval = base.number(fields, "no_rope_layer_interval", int)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(rotates, list) or len(rotates) < layers or any(entry not in (0, 1) for entry in rotates):
        raise UserError(f'"no_rope_layers" must have a 0 or a 1 for each layer, not {rotates!r}')
    return tuple(map(bool, rotates[:layers]))


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    rotates = _rotary_layers(fields, values["layers"])
    return {
        **llama.rotary(fields, values, theta=2e6),
        "rotary_layers": () if all(rotates) else rotates,
        "windows": qwen.windows_of(fields, [not rotated for rotated in rotates]),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    rotates = [int(config.uses_rotary(layer)) for layer in range(config.layers)]
    return {**llama.written_rotary(config), "no_rope_layers": rotates, **qwen.written_windows(config)}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    fields=(*llama.TIED_FIELDS, *llama.ATTENTION_BIAS, llama.MLP_BIAS),
    only=llama.ONLY,
    absent={"num_key_value_heads": 4, "max_position_embeddings": 32768, "no_rope_layer_interval": 4},
    read=_read,
    write=_write,
)
