"""Families with mixtures of experts: Mixtral, Qwen2-MoE (with a shared expert) and Qwen3-MoE."""

import dataclasses
from typing import Any

from specjax.hub.families import base, llama, mistral, qwen, rotary_fields
from specjax.hub.families.base import Field
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

# Fields of other routers, and the values that say that there is none of them.
ONLY = {
    "scoring_func": ("softmax", None),
    "topk_method": ("greedy", None),
    **dict.fromkeys(
        ("n_group", "topk_group", "num_expert_group", "routed_scaling_factor", "moe_layer_freq"), (1, None)
    ),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "router_jitter_noise"), (0, None)),
}


def names(modules: dict[str, str]) -> dict[str, str]:
    """Tensor names of Llama's layout with other modules in place of the MLP; experts are numbered by a second {}."""
    attention = {path: name for path, name in llama.MODULES.items() if not path.startswith("mlp.")}
    return llama.names(attention | modules)


MIXTRAL = dataclasses.replace(
    mistral.FAMILY,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields=(
        *llama.fields(),
        rotary_fields.rotary(1e6),
        mistral.WINDOW,
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
    only={**mistral.FAMILY.only, **ONLY, "norm_topk_prob": (True, None)},
    absent={"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
)


def _read_dense(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The dense layers: those of "mlp_only_layers", and all but every "decoder_sparse_step"-th."""
    named, step = fields.get("mlp_only_layers") or [], base.value_of(fields, "decoder_sparse_step", int, absent=1)
    if not isinstance(named, list) or not all(type(layer) is int and layer >= 0 for layer in named):
        raise UserError(f'"mlp_only_layers" must be a list of layer numbers, not {named!r}')
    layers = range(values["layers"])
    return {"dense_layers": tuple(layer for layer in layers if layer in named or (layer + 1) % step)}


_DENSE = base.Group(
    _read_dense, lambda config: {"mlp_only_layers": list(config.dense_layers), "decoder_sparse_step": 1}
)
_EXPERTS = {f"mlp.experts.{name}": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")}
_DENSE_MLP = {path: name for path, name in llama.MODULES.items() if path.startswith("mlp.")}
_SHARED = {f"mlp.shared.{name}": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}


_ABSENT = {"max_position_embeddings": 32768, "sliding_window": 4096}
_COUNTS = ("num_experts", "num_local_experts")


def _count(absent: int) -> base.Group:
    """The number of experts, which transformers writes as "num_local_experts" from version 5 on."""

    def read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        counts = {base.value_of(fields, name, int, absent=absent) for name in _COUNTS if fields.get(name) is not None}
        if len(counts) > 1:
            listed = " and ".join(f'"{name}" {fields[name]}' for name in _COUNTS)
            raise UserError(f"{listed} are different numbers of experts; keep the right one")
        return {"experts": counts.pop() if counts else absent}

    return base.Group(read, lambda config: dict.fromkeys(_COUNTS, config.experts))


def _router(experts: int, per_token: int, width: int) -> tuple[Field | base.Group, ...]:
    """The fields of Qwen's mixtures; the arguments are the family's defaults for absent ones."""
    return (
        _count(experts),
        Field("experts_per_token", "num_experts_per_tok", absent=per_token),
        Field("expert_width", "moe_intermediate_size", absent=width),
        Field("normalised_experts", "norm_topk_prob", bool, False),
        _DENSE,
    )


def _read_window(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """One window in all layers or in none; "max_window_layers" has no effect."""
    return {"windows": qwen.windows_of({**fields, "layer_types": None}, [True] * values["layers"])}


def _write_window(config: DecoderConfig) -> dict[str, Any]:
    return {"use_sliding_window": bool(config.windows), "sliding_window": config.window(0) or None}


QWEN3_MOE = dataclasses.replace(
    qwen.QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=(
        *llama.fields(),
        *llama.ATTENTION_BIAS,
        rotary_fields.rotary(),
        base.Group(_read_window, _write_window),
        *_router(128, 8, 768),
    ),
    names=names(_DENSE_MLP | {"mlp.router": "mlp.gate"} | _EXPERTS),
    only={**qwen.QWEN3.only, **ONLY, "layer_types": (None,)},
    absent={**_ABSENT, "num_key_value_heads": 4},
)


def _read_every_other(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Windows in every other layer before "max_window_layers", unless "layer_types" says otherwise."""
    last = qwen.max_window_layers(fields)
    return {"windows": qwen.windows_of(fields, [not layer % 2 and layer < last for layer in range(values["layers"])])}


QWEN2_MOE = dataclasses.replace(
    qwen.QWEN2,
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    fields=(
        *llama.fields(),
        Field("attention_bias", "qkv_bias", bool, True),
        rotary_fields.rotary(),
        base.Group(_read_every_other, qwen.written_windows),
        *_router(60, 4, 1408),
        Field("shared_expert_width", "shared_expert_intermediate_size", absent=5632),
    ),
    names=names(
        _DENSE_MLP | {"mlp.router": "mlp.gate", "mlp.shared_gate": "mlp.shared_expert_gate"} | _EXPERTS | _SHARED
    ),
    only={**qwen.QWEN2.only, **ONLY},
    absent={
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    always={},
)
