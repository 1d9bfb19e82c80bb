"""The Gemma families: Llama's layout with norm gains 1 + weight, scaled embeddings, a gated GELU and a head size field.

Gemma 2 (arXiv 2408.00118) has norms before and after each sublayer, soft caps, and a window in every other layer. Gemma
3 (arXiv 2503.19786; only its text model is supported) has norms of query and key heads instead of attention soft caps,
and another rotary base in layers with a window.
"""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, rotary_fields
from specjax.hub.families.base import Field
from specjax.hub.families.window_fields import FULL, KINDS, SLIDING, windows
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
}
_ABSENT = {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192}
_ALWAYS = {"norm": "rms_plus_one", "activation": "gelu_tanh"}
# Some readers use the first field, others the second.
_WRITTEN = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def alternating(pattern: int, size: int = 4096) -> base.Group:
    """Windows in every layer except each `pattern`-th, unless "layer_types" says otherwise."""

    def windowed(fields: dict[str, Any], values: dict[str, Any]) -> list[bool]:
        step = base.value_of(fields, "sliding_window_pattern", int, absent=pattern)
        return [bool((layer + 1) % step) for layer in range(values["layers"])]

    return windows(windowed, ("sliding_window", "layer_types"), size)


def _read_scale(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    scalar = base.value_of(fields, "query_pre_attn_scalar", int, absent=256)
    return {"query_scale": None if scalar == values["head_size"] else scalar**-0.5}


def _write_scale(config: DecoderConfig) -> dict[str, Any]:
    scale = config.query_scale
    return {"query_pre_attn_scalar": config.head_size if scale is None else round(scale**-2)}


_FINAL_SOFTCAP = Field("final_softcap", "final_logit_softcapping", float, 0.0)
_SCALED = base.derived(lambda values: {"embedding_scale": values["width"] ** 0.5})
_SCALE = base.Group(_read_scale, _write_scale)
_FIELDS = (*llama.FIELDS, *llama.ATTENTION_BIAS, _SCALED)


_ROTARY = rotary_fields.rotary(1e6)


def _read_rotary(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Newer files have the rotary fields of each type of layer in "rope_parameters"."""
    nested = {} if fields.get("rope_parameters") is None else fields["rope_parameters"]
    if not isinstance(nested, dict) or not set(nested) <= set(KINDS):
        raise UserError(f'"rope_parameters" must have the entries "{FULL}" and "{SLIDING}", not {nested!r}')
    full = {**fields, "rope_parameters": nested.get(FULL)}
    local = {"rope_parameters": nested.get(SLIDING), "rope_theta": fields.get("rope_local_base_freq")}
    local_rotary = rotary_fields.rotary_of(local, values["head_size"], values["max_positions"])
    return {**_ROTARY.read(full, values), "local_rotary": local_rotary}


def _write_rotary(config: DecoderConfig) -> dict[str, Any]:
    full, local = _ROTARY.write(config), rotary_fields.written_rotary(config.local_rotary, config.head_size)
    nested = {FULL: full["rope_parameters"], SLIDING: local["rope_parameters"]}
    return {**full, "rope_parameters": nested, "rope_local_base_freq": local["rope_theta"]}


GEMMA = dataclasses.replace(
    llama.FAMILY,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields=(*_FIELDS, rotary_fields.rotary()),
    only=_ONLY,
    absent={**_ABSENT, "num_key_value_heads": 16},
    always=_ALWAYS,
    written=_WRITTEN,
)

GEMMA2 = dataclasses.replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields=(
        *GEMMA.fields,
        alternating(pattern=2),
        _SCALE,
        Field("attention_softcap", "attn_logit_softcapping", float, 0.0),
        _FINAL_SOFTCAP,
    ),
    names=llama.names(llama.MODULES | _FOUR_NORMS),
    absent={
        **_ABSENT,
        "num_key_value_heads": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    always={**_ALWAYS, "order": "both"},
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    # The format has "attn_logit_softcapping", but transformers' model of Gemma 3 does not read it.
    fields=(
        *_FIELDS,
        base.Group(_read_rotary, _write_rotary),
        alternating(pattern=6),
        _SCALE,
        _FINAL_SOFTCAP,
    ),
    absent={**_ABSENT, "num_key_value_heads": 4, "max_position_embeddings": 131072},
    always={**_ALWAYS, "order": "both", "qk_norm": True},
    written={"hidden_activation": "gelu_pytorch_tanh"},
)
