"""Families with mixtures of experts: Mixtral, Qwen2-MoE (with a shared expert) and Qwen3-MoE."""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, qwen, rotary_fields, window_fields
from specjax.hub.families.base import Field
from specjax.runtime.errors import UserError


def names(modules: dict[str, str]) -> dict[str, str]:
    """Tensor names of Llama's layout with other modules in place of the MLP; experts are numbered by a second {}."""
    attention = {path: name for path, name in llama.MODULES.items() if not path.startswith("mlp.")}
    return llama.names(attention | modules)


MIXTRAL = dataclasses.replace(
    llama.MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields=(
        *llama.FIELDS,
        rotary_fields.rotary(1e6),
        llama.WINDOW,
        Field("experts", "num_local_experts", absent=8),
        Field("experts_per_token", "num_experts_per_tok", absent=2),
        base.derived(lambda values: {"expert_width": values["mlp_width"]}),
    ),
    names=names(
        {
            "mlp.router": "block_sparse_moe.gate",
            "mlp.experts.gate": "block_sparse_moe.experts.{}.w1",
            "mlp.experts.up": "block_sparse_moe.experts.{}.w3",
            "mlp.experts.down": "block_sparse_moe.experts.{}.w2",
        }
    ),
    absent={"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
)


def _read_dense(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The dense layers: those of "mlp_only_layers", and all but every "decoder_sparse_step"-th."""
    named, step = fields.get("mlp_only_layers") or [], base.value_of(fields, "decoder_sparse_step", int, absent=1)
    if not isinstance(named, list) or not all(type(layer) is int and layer >= 0 for layer in named):
        raise UserError(f'"mlp_only_layers" must be a list of layer numbers, not {named!r}')
    layers = range(values["layers"])
    return {"dense_layers": tuple(layer for layer in layers if layer in named or (layer + 1) % step)}


_ROUTER = (
    Field("experts_per_token", "num_experts_per_tok"),
    Field("expert_width", "moe_intermediate_size"),
    Field("normalised_experts", "norm_topk_prob", bool, False),
    base.Group(_read_dense, lambda config: {"mlp_only_layers": list(config.dense_layers), "decoder_sparse_step": 1}),
)
_PROJECTIONS = ("gate", "up", "down")
_MODULES = {
    **{f"mlp.{name}": f"mlp.{name}_proj" for name in _PROJECTIONS},  # of dense layers
    "mlp.router": "mlp.gate",
    **{f"mlp.experts.{name}": f"mlp.experts.{{}}.{name}_proj" for name in _PROJECTIONS},
}
_SHARED = {f"mlp.shared.{name}": f"mlp.shared_expert.{name}_proj" for name in _PROJECTIONS}
_ABSENT = {"max_position_embeddings": 32768, "sliding_window": 4096}
_COUNTS = ("num_experts", "num_local_experts")


def _count(absent: int) -> base.Group:
    """The number of experts, which transformers writes as "num_local_experts" from version 5 on."""
    return base.Group(
        lambda fields, values: {"experts": base.agreed([(fields, name) for name in _COUNTS], int, absent)},
        lambda config: dict.fromkeys(_COUNTS, config.experts),
    )


QWEN3_MOE = dataclasses.replace(
    qwen.QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=(
        *llama.FIELDS,
        *llama.ATTENTION_BIAS,
        rotary_fields.rotary(),
        # One window in all layers or in none; "max_window_layers" has no effect.
        window_fields.windows(window_fields.every_layer, ("use_sliding_window", "sliding_window")),
        _count(128),
        *_ROUTER,
    ),
    names=names(_MODULES),
    only={**llama.ONLY, "layer_types": (None,)},
    absent={**_ABSENT, "num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
)


def _every_other(fields: dict[str, Any], values: dict[str, Any]) -> list[bool]:
    """Every other layer before "max_window_layers"."""
    last = qwen.max_window_layers(fields)
    return [not layer % 2 and layer < last for layer in range(values["layers"])]


QWEN2_MOE = dataclasses.replace(
    qwen.QWEN2,
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    fields=(
        *llama.FIELDS,
        Field("attention_bias", "qkv_bias", bool, True),
        rotary_fields.rotary(),
        window_fields.windows(_every_other),
        _count(60),
        *_ROUTER,
        Field("shared_expert_width", "shared_expert_intermediate_size", absent=5632),
    ),
    names=names({**_MODULES, "mlp.shared_gate": "mlp.shared_expert_gate", **_SHARED}),
    absent={
        **_ABSENT,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
    },
    always={},
)
