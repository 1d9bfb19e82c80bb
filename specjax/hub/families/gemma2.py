"""Gemma 2 (arXiv 2408.00118): norms around each sublayer, soft caps, every other layer with a window."""

from typing import Any

from specjax.hub.families import base, gemma, llama, qwen2
from specjax.models.config import DecoderConfig

MODEL_TYPE = "gemma2"
ARCHITECTURE = "Gemma2ForCausalLM"
HEAD = llama.HEAD
EMBEDDING = llama.EMBEDDING
IGNORED = llama.IGNORED

_NORMS = (
    ("model.layers.{}.input_layernorm.weight", ("attention_norm", "scale")),
    ("model.layers.{}.post_attention_layernorm.weight", ("attention_output_norm", "scale")),
    ("model.layers.{}.pre_feedforward_layernorm.weight", ("mlp_norm", "scale")),
    ("model.layers.{}.post_feedforward_layernorm.weight", ("mlp_output_norm", "scale")),
)

# What the format takes for a field that is absent. Null is a value of the soft caps: none.
_WINDOW = 4096
_ABSENT = {"head_dim": 256, "num_key_value_heads": 4, "max_position_embeddings": 8192}
_ONLY = {
    # "hidden_activation" is the one that counts.
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "partial_rotary_factor": (1, None),
    "use_bidirectional_attention": (False, None),
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def tensors(config: DecoderConfig) -> list[base.Tensor]:
    """Every learned array of such a model, in the order of computation."""
    return base.list_tensors(config, first=llama.FIRST, layer=(*_NORMS, *llama.LAYER), last=llama.LAST)


def windows_of(fields: dict[str, Any], layers: int, pattern: int) -> tuple[int, ...]:
    """The window of each layer, () where none has one.

    Args:
      layers: L.
      pattern: where the file has no "layer_types", all layers have a window but each `pattern`-th.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(layers)]
    given = {"sliding_window": _WINDOW, **fields, "layer_types": kinds, "use_sliding_window": True}
    return qwen2.windows_of(given, [False] * layers)


def written_windows(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `windows_of`."""
    windows = [config.window(layer) for layer in range(config.layers)]
    return {
        # Readers want a number even where no layer has a window.
        "sliding_window": max(windows) or _WINDOW,
        "layer_types": [_SLIDING if window else _FULL for window in windows],
    }


def query_scale_of(fields: dict[str, Any], head_size: int) -> float | None:
    """Of "query_pre_attn_scalar"; None where it is the usual one."""
    scalar = base.number(fields, "query_pre_attn_scalar", int, absent=256)
    return None if scalar == head_size else scalar**-0.5


def written_query_scale(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `query_scale_of`."""
    scale = config.query_scale
    return {"query_pre_attn_scalar": config.head_size if scale is None else round(scale**-2)}


def softcap_of(fields: dict[str, Any], name: str, absent: float) -> float:
    """A soft cap; null is none (0), and `absent` is for a file that does not say."""
    return 0.0 if fields.get(name, absent) is None else base.number(fields, name, float, absent=absent)


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    shape = llama.shape_of(gemma.filled(fields, _ABSENT), tied=True)
    return base.build(
        MODEL_TYPE,
        **shape,
        **gemma.arithmetic_of(fields, shape["width"]),
        order="both",
        windows=windows_of(fields, shape["layers"], 2),
        query_scale=query_scale_of(fields, shape["head_size"]),
        attention_softcap=softcap_of(fields, "attn_logit_softcapping", 50.0),
        final_softcap=softcap_of(fields, "final_logit_softcapping", 30.0),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **llama.written_shape(config),
        **written_windows(config),
        **written_query_scale(config),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.final_softcap or None,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_bias,
    }
