"""Gemma 1: Llama's layout with gains of 1 + weight, scaled embeddings, a gated GELU and heads of their own size."""

from typing import Any

from specjax.hub.families import base, llama
from specjax.models.config import DecoderConfig

MODEL_TYPE = "gemma"
ARCHITECTURE = "GemmaForCausalLM"
HEAD = llama.HEAD
EMBEDDING = llama.EMBEDDING
IGNORED = llama.IGNORED

# What the format takes for a field that is absent.
_ABSENT = {"head_dim": 256, "num_key_value_heads": 16, "max_position_embeddings": 8192}
_ONLY = {
    # The first files say "gelu" and mean the tanh approximation.
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "partial_rotary_factor": (1, None),
    "use_bidirectional_attention": (False, None),
    "sliding_window": (None,),
    "layer_types": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


def filled(fields: dict[str, Any], absent: dict[str, Any]) -> dict[str, Any]:
    """The fields, with these values for those that are missing or null."""
    return {**absent, **{name: value for name, value in fields.items() if value is not None}}


def arithmetic_of(fields: dict[str, Any], width: int) -> dict[str, Any]:
    """The values of a DecoderConfig that all of Gemma 1 to 3 have."""
    bias = base.flag(fields, "attention_bias", absent=False)
    return dict(
        norm="rms_plus_one",
        activation="gelu_tanh",
        embedding_scale=width**0.5,
        attention_bias=bias,
        output_bias=bias,
    )


def tensors(config: DecoderConfig) -> list[base.Tensor]:
    """Every learned array of such a model, in the order of computation."""
    return llama.tensors(config)


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    shape = llama.shape_of(filled(fields, _ABSENT), tied=True)
    return base.build(
        MODEL_TYPE,
        **shape,
        **arithmetic_of(fields, shape["width"]),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **llama.written_shape(config),
        # Readers look at the one or the other.
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_bias,
    }
