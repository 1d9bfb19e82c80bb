"""The gpt-oss family (arXiv 2508.10925): mixtures of experts with clamped SwiGLU, attention sinks, alternating windows.

Its files have one tensor for all experts, as [E, in, out]. Gate and up are in one, whose even outputs are the gate's.
The published ones are in MXFP4 (`hub.mxfp4`); exports are not quantised.
"""

import dataclasses
from typing import Any

from specjax.hub.families import base, experts, gemma, llama, rotary_fields
from specjax.hub.families.base import Field

_EXPERTS = {
    f"blocks.{{}}.mlp.experts.{ours}.{kind}": f"model.layers.{{}}.mlp.experts.{theirs}{ending}"
    for ours, theirs in {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}.items()
    for kind, ending in {"kernel": "", "bias": "_bias"}.items()
}
# The scaling of a file that states none.
_YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
_ROTARY = rotary_fields.rotary(150000.0)


def _read_rotary(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    has_scaling = fields.get("rope_parameters") or fields.get("rope_scaling")
    return _ROTARY.read(fields if has_scaling else {**fields, "rope_scaling": _YARN}, values)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    fields=(
        *llama.FIELDS,
        *base.biases("attention_bias", True, "attention_bias", "output_bias"),
        base.Group(_read_rotary, _ROTARY.write),
        gemma.alternating(pattern=2, size=128),
        Field("experts", "num_local_experts"),
        Field("experts_per_token", "num_experts_per_tok"),
        Field("swiglu_limit", "swiglu_limit", float, 7.0),
        Field("swiglu_alpha", "swiglu_alpha", float, 1.702),
        base.derived(lambda values: {"expert_width": values["mlp_width"]}),
    ),
    names=experts.names({"mlp.router": "mlp.router"})
    | {"blocks.{}.attention.sinks": "model.layers.{}.self_attn.sinks", **_EXPERTS},
    groups=lambda config: config.expert_width,
    absent={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072},
    always={"mlp_bias": True, "attention_sinks": True},
)
