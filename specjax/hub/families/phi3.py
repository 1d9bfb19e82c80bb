"""The Phi-3 family (Phi-3, Phi-3.5, Phi-4): Llama's arithmetic, fused projections, partial and "longrope" positions."""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, rotary_fields
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

_FUSED = {
    **dict.fromkeys(base.QUERY_KEY_VALUE, "self_attn.qkv_proj"),
    **dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj"),
}
_ORIGINAL = "original_max_position_embeddings"
_ROTARY = rotary_fields.rotary(partial=True)


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    read = _ROTARY.read(fields, values)
    kind = read["rotary"].kind
    if kind not in ("default", "longrope"):
        raise UserError(f'"rope_scaling" of type {kind!r} is unknown to this family; "longrope" is known')
    return read


def _write(config: DecoderConfig) -> dict[str, Any]:
    fields, rotary = _ROTARY.write(config), config.rotary
    if rotary.kind == "longrope" and rotary.factor == config.max_positions / rotary.original_positions:
        # transformers before 5 expects exactly these fields here, and the others at the top level.
        scaling = {key: fields["rope_scaling"][key] for key in ("short_factor", "long_factor")}
        magnitude = {} if rotary.magnitude is None else {"attention_factor": rotary.magnitude}
        fields["rope_scaling"] = {"type": "longrope", **scaling, **magnitude}
    return {**fields, _ORIGINAL: rotary.original_positions or config.max_positions}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    fields=(*llama.FIELDS, base.Group(_read, _write), llama.WINDOW),
    names=llama.names(llama.MODULES | _FUSED),
    only=llama.MISTRAL.only,
    absent={"max_position_embeddings": 4096, _ORIGINAL: 4096, "rms_norm_eps": 1e-5},
)
