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
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_ROTARY = rotary_fields.rotary(150000.0)


def _read_rotary(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    given = fields.get("rope_parameters") or fields.get("rope_scaling")
    return _ROTARY.read(fields if given else {**fields, "rope_scaling": _YARN}, values)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    fields=(
        *llama.fields(kv_heads=8, head_size=64, max_positions=131072),
        *base.biases("attention_bias", True, "attention_bias", "output_bias"),
        base.Group(_read_rotary, _ROTARY.write),
        gemma.windows(pattern=2, size=128),
        Field("experts", "num_local_experts"),
        Field("experts_per_token", "num_experts_per_tok"),
        Field("swiglu_limit", "swiglu_limit", float, 7.0),
        Field("swiglu_alpha", "swiglu_alpha", float, 1.702),
        base.derived(lambda values: {"expert_width": values["mlp_width"]}),
    ),
    names=experts.names({"mlp.router": "mlp.router"})
    | {"blocks.{}.attention.sinks": "model.layers.{}.self_attn.sinks", **_EXPERTS},
    parts=lambda config: base.fused({"mlp.experts.gate": 1, "mlp.experts.up": 1}, groups=config.expert_width),
    only={**llama.ONLY, **experts.ONLY, "norm_topk_prob": (True, None)},
    absent={"rms_norm_eps": 1e-5},
    always={"mlp_bias": True, "attention_sinks": True},
)
