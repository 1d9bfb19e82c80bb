"""The Phi-3 family (Phi-3, Phi-3.5, Phi-4): Llama's arithmetic, fused projections, partial and "longrope" positions."""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, mistral
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

_QKV, _GATE_UP = "model.layers.{}.self_attn.qkv_proj.weight", "model.layers.{}.mlp.gate_up_proj.weight"
_FUSED = {
    "blocks.{}.attention.query.kernel": _QKV,
    "blocks.{}.attention.key.kernel": _QKV,
    "blocks.{}.attention.value.kernel": _QKV,
    "blocks.{}.mlp.gate.kernel": _GATE_UP,
    "blocks.{}.mlp.up.kernel": _GATE_UP,
}
_ORIGINAL = "original_max_position_embeddings"


def _parts(config: DecoderConfig) -> dict[str, base.Part]:
    queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
    return {
        **base.fused({"attention.query": queries, "attention.key": keys, "attention.value": keys}),
        **base.fused({"mlp.gate": config.mlp_width, "mlp.up": config.mlp_width}),
    }


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    read = llama.rotary(fields, values, partial=True)
    kind = read["rotary"].kind
    if kind not in ("default", "longrope"):
        raise UserError(f'"rope_scaling" of type {kind!r} is unknown to this family; "longrope" is known')
    return {**read, **mistral.window(fields, values)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    fields, rotary = llama.written_rotary(config), config.rotary
    if rotary.kind == "longrope" and rotary.factor == config.max_positions / rotary.original_positions:
        # transformers before 5 expects exactly these fields here, and the others at the top level.
        scaling = {key: fields["rope_scaling"][key] for key in ("short_factor", "long_factor")}
        magnitude = {} if rotary.magnitude is None else {"attention_factor": rotary.magnitude}
        fields["rope_scaling"] = {"type": "longrope", **scaling, **magnitude}
    original = rotary.original_positions or config.max_positions
    return {**fields, _ORIGINAL: original, **mistral.written_window(config)}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    fields=llama.FIELDS,
    names={**llama.NAMES, **_FUSED},
    parts=_parts,
    only={
        **llama.ONLY,
        **llama.NO_BIAS,
        "lm_head_bias": (False, None),
        "use_sliding_window": (None,),
        "layer_types": (None,),
    },
    absent={"max_position_embeddings": 4096, _ORIGINAL: 4096, "rms_norm_eps": 1e-5},
    read=_read,
    write=_write,
)
