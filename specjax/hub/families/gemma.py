"""The Gemma families: Llama's layout with norm gains 1 + weight, scaled embeddings, a gated GELU and a head size field.

Gemma 2 (arXiv 2408.00118) has norms before and after each sublayer, soft caps, and a window in every other layer. Gemma
3 (arXiv 2503.19786; only its text model is supported) has norms of query and key heads instead of attention soft caps,
and another rotary base in layers with a window.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from specjax.hub.families import base, llama, qwen, rotary_fields
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

_WINDOW = 4096
_NORMS = {
    "blocks.{}.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention_output_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.mlp_norm.scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blocks.{}.mlp_output_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
_NAMES_WITH_OUTPUT_NORMS = {**llama.FIRST, **_NORMS, **llama.NAMES, **_NORMS}
_FIELDS = (*llama.TIED_FIELDS, *llama.ATTENTION_BIAS)
_ONLY = {
    # In Gemma 1 files "gelu" means the tanh approximation. Later files use "hidden_activation" instead.
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "partial_rotary_factor": (1, None),
    "use_bidirectional_attention": (False, None),
}
_ALWAYS = {"norm": "rms_plus_one", "activation": "gelu_tanh"}
# Some readers use the first field, others the second.
_WRITTEN = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _fill(kv_heads: int, max_positions: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A `Family.prepare` that fills in fields that are missing or null."""
    absent = {"head_dim": 256, "num_key_value_heads": kv_heads, "max_position_embeddings": max_positions}
    return lambda fields: fields | {name: value for name, value in absent.items() if fields.get(name) is None}


def _windows(fields: dict[str, Any], layers: int, pattern: int) -> tuple[int, ...]:
    """The window of each layer; without "layer_types", every layer has one except each `pattern`-th."""
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [qwen.SLIDING if (layer + 1) % pattern else qwen.FULL for layer in range(layers)]
    complete = {"sliding_window": _WINDOW, **fields, "layer_types": kinds, "use_sliding_window": True}
    return qwen.windows_of(complete, [False] * layers)


def _softcap(fields: dict[str, Any], name: str, absent: float) -> float:
    """The soft cap in a field: 0 if the field is null, `absent` if it is missing."""
    return 0.0 if fields.get(name, absent) is None else base.number(fields, name, float, absent=absent)


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return {**llama.rotary(fields, values), "embedding_scale": values["width"] ** 0.5}


def _read_scale(fields: dict[str, Any], head_size: int) -> dict[str, Any]:
    scalar = base.number(fields, "query_pre_attn_scalar", int, absent=256)
    return {"query_scale": None if scalar == head_size else scalar**-0.5}


def _read_2(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return {
        **_read(fields, values),
        "windows": _windows(fields, values["layers"], 2),
        **_read_scale(fields, values["head_size"]),
        "attention_softcap": _softcap(fields, "attn_logit_softcapping", 50.0),
        "final_softcap": _softcap(fields, "final_logit_softcapping", 30.0),
    }


def _write_2(config: DecoderConfig) -> dict[str, Any]:
    scale = config.query_scale
    windows = [config.window(layer) for layer in range(config.layers)]
    return {
        **llama.written_rotary(config),
        "sliding_window": max(windows) or _WINDOW,  # readers want a number even if no layer has a window
        "layer_types": [qwen.KINDS[bool(window)] for window in windows],
        "query_pre_attn_scalar": config.head_size if scale is None else round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.final_softcap or None,
    }


def _rotary_fields(fields: dict[str, Any], layer_type: str, **older: Any) -> dict[str, Any]:
    """The rotary fields of one of Gemma 3's layer types, renamed as in other families."""
    nested = fields.get("rope_parameters")
    if nested is None:
        return older
    if not isinstance(nested, dict) or not set(nested) <= set(qwen.KINDS):
        raise UserError(f'"rope_parameters" must have the entries "{qwen.FULL}" and "{qwen.SLIDING}", not {nested!r}')
    return {"rope_parameters": nested.get(layer_type), **older}


def _read_3(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    older = {name: fields.get(name) for name in ("rope_theta", "rope_scaling")}
    full = {**fields, "rope_parameters": None, **_rotary_fields(fields, qwen.FULL, **older)}
    local = _rotary_fields(fields, qwen.SLIDING, rope_theta=fields.get("rope_local_base_freq"))
    pattern = base.number(fields, "sliding_window_pattern", int, absent=6)
    return {
        **llama.rotary(full, values, theta=1e6),
        "embedding_scale": values["width"] ** 0.5,
        "local_rotary": rotary_fields.rotary_of(local, values["head_size"], values["max_positions"]),
        "windows": _windows(fields, values["layers"], pattern),
        **_read_scale(fields, values["head_size"]),
        "final_softcap": _softcap(fields, "final_logit_softcapping", 0.0),
    }


def _write_3(config: DecoderConfig) -> dict[str, Any]:
    written = _write_2(config)
    local = rotary_fields.written_rotary(config.local_rotary, config.head_size)
    return {
        **written,
        "rope_parameters": {qwen.FULL: written["rope_parameters"], qwen.SLIDING: local["rope_parameters"]},
        "rope_local_base_freq": local["rope_theta"],
    }


GEMMA = dataclasses.replace(
    llama.FAMILY,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields=_FIELDS,
    only={
        **_ONLY,
        "sliding_window": (None,),
        "layer_types": (None,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
    },
    always=_ALWAYS,
    written=_WRITTEN,
    prepare=_fill(kv_heads=16, max_positions=8192),
    read=_read,
)

GEMMA2 = dataclasses.replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    names=_NAMES_WITH_OUTPUT_NORMS,
    only=_ONLY,
    always={**_ALWAYS, "order": "both"},
    prepare=_fill(kv_heads=4, max_positions=8192),
    read=_read_2,
    write=_write_2,
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    # The format has this field, but transformers' model of Gemma 3 does not read it, so its meaning is unclear.
    only={**_ONLY, "attn_logit_softcapping": (None,)},
    always={**_ALWAYS, "order": "both", "qk_norm": True},
    written={"hidden_activation": "gelu_pytorch_tanh"},
    prepare=_fill(kv_heads=4, max_positions=131072),
    read=_read_3,
    write=_write_3,
)
