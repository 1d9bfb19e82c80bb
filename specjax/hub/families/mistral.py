"""The Mistral family: Llama's layout without biases, with one sliding window in all layers or in none."""

from typing import Any

from specjax.hub.families import base, llama
from specjax.models.config import DecoderConfig

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"
HEAD, EMBEDDING, IGNORED, tensors = llama.HEAD, llama.EMBEDDING, llama.IGNORED, llama.tensors

# What the format gives to absent fields; a window that is null is none.
_ABSENT = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_ONLY = {
    **llama.ONLY,
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (None,),
    "layer_types": (None,),
}


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    fields = {**_ABSENT, **fields}
    shape = llama.shape_of(fields)
    window = base.number(fields, "sliding_window", int, absent=0)
    return base.build(
        MODEL_TYPE,
        **shape,
        windows=(window,) * shape["layers"] if window else (),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **llama.written_shape(config),
        "hidden_act": "silu",
        "sliding_window": config.window(0) or None,
    }
