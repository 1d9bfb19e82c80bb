"""The Mistral family: Llama's layout without biases, with one sliding window in all layers or in none."""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, rotary_fields


def _window(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    size = base.value_of(fields, "sliding_window", int, absent=0)
    return {"windows": (size,) * values["layers"] if size else ()}


WINDOW = base.Group(_window, lambda config: {"sliding_window": config.window(0) or None})

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=(*llama.fields(), rotary_fields.rotary(), WINDOW),
    only={**llama.ONLY, **llama.NO_BIAS, "use_sliding_window": (None,), "layer_types": (None,)},
    absent={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
)
