"""The Mistral family: Llama's layout without biases, with one sliding window in all layers or in none."""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama
from specjax.models.config import DecoderConfig


def window(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The config attribute for windows, equal in all layers, in the form of `Family.read`; null means no window."""
    size = base.number(fields, "sliding_window", int, absent=0)
    return {"windows": (size,) * values["layers"] if size else ()}


def written_window(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `window`."""
    return {"sliding_window": config.window(0) or None}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=llama.FIELDS,
    only={**llama.ONLY, **llama.NO_BIAS, "use_sliding_window": (None,), "layer_types": (None,)},
    absent={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    read=lambda fields, values: {**llama.rotary(fields, values), **window(fields, values)},
    write=lambda config: {**llama.written_rotary(config), **written_window(config)},
)
