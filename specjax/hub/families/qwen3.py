"""The Qwen3 family: Llama's layout with norms of query and key heads, and Qwen2's windows."""

from typing import Any

from specjax.hub.families import base, llama, qwen2
from specjax.models.config import DecoderConfig

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
HEAD, EMBEDDING, IGNORED, tensors = llama.HEAD, llama.EMBEDDING, llama.IGNORED, llama.tensors

# Its heads have this size where the file does not say, whatever the width.
_ABSENT = {**qwen2.ABSENT, "head_dim": 128}
_ONLY = {**llama.ONLY, "mlp_bias": (False, None)}


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    fields = {**_ABSENT, **fields}
    shape = llama.shape_of(fields)
    bias = base.flag(fields, "attention_bias", absent=False)
    return base.build(
        MODEL_TYPE,
        **shape,
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=qwen2.late_windows(fields, shape["layers"]),
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
        "attention_bias": config.attention_bias,
        **qwen2.written_late_windows(config),
    }
