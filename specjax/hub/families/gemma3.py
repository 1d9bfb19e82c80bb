"""Gemma 3, text only (arXiv 2503.19786): Gemma 2 with q/k norms for soft caps and two bases of rotary positions."""

from typing import Any

from specjax.hub.families import base, gemma, gemma2, llama, rotary_fields
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

MODEL_TYPE = "gemma3_text"
ARCHITECTURE = "Gemma3ForCausalLM"
HEAD = llama.HEAD
EMBEDDING = llama.EMBEDDING
IGNORED = llama.IGNORED

_ABSENT = {"head_dim": 256, "num_key_value_heads": 4, "max_position_embeddings": 131072}
_ONLY = {
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "partial_rotary_factor": (1, None),
    "use_bidirectional_attention": (False, None),
    # A field of the format that transformers' own model of Gemma 3 does not read: no one law to follow.
    "attn_logit_softcapping": (None,),
}
_FULL, _LOCAL = "full_attention", "sliding_attention"


def tensors(config: DecoderConfig) -> list[base.Tensor]:
    """Every learned array of such a model, in the order of computation."""
    return gemma2.tensors(config)


def _rotary_fields(fields, layer_type, **older):
    """The fields of one type of layer as other families have them."""
    nested = fields.get("rope_parameters")
    if nested is None:
        return older
    if not isinstance(nested, dict) or not set(nested) <= {_FULL, _LOCAL}:
        raise UserError(f'"rope_parameters" must have the entries "{_FULL}" and "{_LOCAL}", not {nested!r}')
    return {"rope_parameters": nested.get(layer_type), **older}


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    full = _rotary_fields(fields, _FULL, rope_theta=fields.get("rope_theta"), rope_scaling=fields.get("rope_scaling"))
    local = _rotary_fields(fields, _LOCAL, rope_theta=fields.get("rope_local_base_freq"))
    shape = llama.shape_of(gemma.filled({**fields, "rope_parameters": None, **full}, _ABSENT), theta=1e6, tied=True)
    pattern = base.number(fields, "sliding_window_pattern", int, absent=6)
    return base.build(
        MODEL_TYPE,
        **shape,
        **gemma.arithmetic_of(fields, shape["width"]),
        order="both",
        qk_norm=True,
        local_rotary=rotary_fields.rotary_of(local, shape["head_size"], shape["max_positions"]),
        windows=gemma2.windows_of(fields, shape["layers"], pattern),
        query_scale=gemma2.query_scale_of(fields, shape["head_size"]),
        final_softcap=gemma2.softcap_of(fields, "final_logit_softcapping", 0.0),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    local = rotary_fields.written_rotary(config.local_rotary, config.head_size)
    written = llama.written_shape(config)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **written,
        "rope_parameters": {_FULL: written["rope_parameters"], _LOCAL: local["rope_parameters"]},
        "rope_local_base_freq": local["rope_theta"],
        **gemma2.written_windows(config),
        **gemma2.written_query_scale(config),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.final_softcap or None,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_bias,
    }
