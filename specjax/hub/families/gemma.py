"""The Gemma families: Llama's layout with norm gains 1 + weight, scaled embeddings, a gated GELU and a head size field.

Gemma 2 (arXiv 2408.00118) has norms before and after each sublayer, soft caps, and a window in every other layer. Gemma
3 (arXiv 2503.19786; only its text model is supported) has norms of query and key heads instead of attention soft caps,
and another rotary base in layers with a window.
"""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, qwen, rotary_fields
from specjax.hub.families.base import Field
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

_FOUR_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
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


def windows(pattern: int, size: int = 4096) -> base.Group:
    """Without "layer_types", every layer has a window except each `pattern`-th; `size` is that of an absent field."""

    def read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        step = base.value_of(fields, "sliding_window_pattern", int, absent=pattern)
        kinds = fields.get("layer_types")
        if kinds is None:
            kinds = [qwen.KINDS[bool((layer + 1) % step)] for layer in range(values["layers"])]
        complete = {"sliding_window": size, **fields, "layer_types": kinds, "use_sliding_window": True}
        return {"windows": qwen.windows_of(complete, [False] * values["layers"])}

    def write(config: DecoderConfig) -> dict[str, Any]:
        written = qwen.written_windows(config)
        # Readers want a number even if no layer has a window.
        return {"sliding_window": written["sliding_window"] or size, "layer_types": written["layer_types"]}

    return base.Group(read, write)


def _read_scale(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    scalar = base.value_of(fields, "query_pre_attn_scalar", int, absent=256)
    return {"query_scale": None if scalar == values["head_size"] else scalar**-0.5}


def _write_scale(config: DecoderConfig) -> dict[str, Any]:
    scale = config.query_scale
    return {"query_pre_attn_scalar": config.head_size if scale is None else round(scale**-2)}


_FINAL_SOFTCAP = Field("final_softcap", "final_logit_softcapping", float, 30.0, null=0.0)
_SCALED = base.derived(lambda values: {"embedding_scale": values["width"] ** 0.5})
_SCALE = base.Group(_read_scale, _write_scale)


def _fields(kv_heads: int, max_positions: int) -> tuple[Field | base.Group, ...]:
    sizes = llama.fields(kv_heads=kv_heads, head_size=256, max_positions=max_positions, tied_head=True)
    return (*sizes, *llama.ATTENTION_BIAS, _SCALED)


def _rotary_fields(fields: dict[str, Any], layer_type: str, **older: Any) -> dict[str, Any]:
    """The rotary fields of one of Gemma 3's layer types, renamed as in other families."""
    nested = fields.get("rope_parameters")
    if nested is None:
        return older
    if not isinstance(nested, dict) or not set(nested) <= set(qwen.KINDS):
        raise UserError(f'"rope_parameters" must have the entries "{qwen.FULL}" and "{qwen.SLIDING}", not {nested!r}')
    return {"rope_parameters": nested.get(layer_type), **older}


def _read_rotary(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    older = {name: fields.get(name) for name in ("rope_theta", "rope_scaling")}
    full = {**fields, "rope_parameters": None, **_rotary_fields(fields, qwen.FULL, **older)}
    local = _rotary_fields(fields, qwen.SLIDING, rope_theta=fields.get("rope_local_base_freq"))
    return {
        **rotary_fields.rotary(1e6).read(full, values),
        "local_rotary": rotary_fields.rotary_of(local, values["head_size"], values["max_positions"]),
    }


def _write_rotary(config: DecoderConfig) -> dict[str, Any]:
    full, local = (
        rotary_fields.written_rotary(rotary, config.head_size) for rotary in (config.rotary, config.local_rotary)
    )
    return {
        **full,
        "rope_parameters": {qwen.FULL: full["rope_parameters"], qwen.SLIDING: local["rope_parameters"]},
        "rope_local_base_freq": local["rope_theta"],
    }


GEMMA = dataclasses.replace(
    llama.FAMILY,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields=(*_fields(kv_heads=16, max_positions=8192), rotary_fields.rotary()),
    only={
        **_ONLY,
        "sliding_window": (None,),
        "layer_types": (None,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
    },
    always=_ALWAYS,
    written=_WRITTEN,
)

GEMMA2 = dataclasses.replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    names=llama.names(llama.MODULES | _FOUR_NORMS),
    only=_ONLY,
    always={**_ALWAYS, "order": "both"},
    fields=(
        *_fields(kv_heads=4, max_positions=8192),
        rotary_fields.rotary(),
        windows(pattern=2),
        _SCALE,
        Field("attention_softcap", "attn_logit_softcapping", float, 50.0, null=0.0),
        _FINAL_SOFTCAP,
    ),
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    # The format has this field, but transformers' model of Gemma 3 does not read it, so its meaning is unclear.
    only={**_ONLY, "attn_logit_softcapping": (None,)},
    always={**_ALWAYS, "order": "both", "qk_norm": True},
    written={"hidden_activation": "gelu_pytorch_tanh"},
    fields=(
        *_fields(kv_heads=4, max_positions=131072),
        base.Group(_read_rotary, _write_rotary),
        windows(pattern=6),
        _SCALE,
        _FINAL_SOFTCAP._replace(absent=0.0),
    ),
)
