"""The Llama family (Llama 1 to 3, Vicuna, SmolLM): `config.json` and tensor names as `LlamaForCausalLM` has them.

Families with similar files are defined as modified copies of this one.
"""

import dataclasses
from collections.abc import Mapping

from specjax.hub.families import base, rotary_fields
from specjax.hub.families.base import Field

MODULES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def names(modules: Mapping[str, str]) -> dict[str, str]:
    """The tensor names of Llama's layout with these modules in a layer."""
    return base.tensor_names("model.embed_tokens", "model.layers", modules, "model.norm", "lm_head")


def fields(
    *, kv_heads: int | None = None, head_size: int | None = None, max_positions: int = 2048, tied_head: bool = False
) -> tuple[Field, ...]:
    """The fields of Llama's layout; the arguments are the family's defaults for absent ones.

    Without a default there are as many key/value heads as heads, and the head size is the width / heads.
    """
    divided = lambda values: base.head_size(values, "hidden_size", "num_attention_heads", 'give "head_dim"')
    return (
        *base.sizes(),
        Field("kv_heads", "num_key_value_heads", absent=kv_heads or (lambda values: values["heads"])),
        Field("head_size", "head_dim", absent=head_size or divided),
        Field("max_positions", "max_position_embeddings", absent=max_positions),
        Field("norm_epsilon", "rms_norm_eps", float, 1e-6),
        Field("tied_head", "tie_word_embeddings", bool, tied_head),
    )


ATTENTION_BIAS = base.biases("attention_bias", False, "attention_bias", "output_bias")
MLP_BIAS = Field("mlp_bias", "mlp_bias", bool, False)
NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}

# Supported values of fields, shared by the families derived from Llama.
ONLY = {
    "hidden_act": ("silu", "swish", None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


FAMILY = base.Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=(*fields(), *ATTENTION_BIAS, MLP_BIAS, rotary_fields.rotary()),
    names=names(MODULES),
    ignored=("rotary_emb.inv_freq",),
    only={**ONLY, "sliding_window": (None,), "use_sliding_window": (False, None), "layer_types": (None,)},
    written={"hidden_act": "silu"},
)

# OLMo 2 (arXiv 2501.00656) normalises the output of each sublayer, and all query heads and all key heads together.
OLMO2 = dataclasses.replace(
    FAMILY,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=(*fields(), *ATTENTION_BIAS, rotary_fields.rotary()),
    names=names(MODULES | {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}),
    only={**FAMILY.only, "mlp_bias": (False, None), "clip_qkv": (None,)},
    absent={"rms_norm_eps": 1e-5},
    always={"order": "output", "qk_norm": True, "joint_qk_norm": True},
)

# Granite 3 has factors on embeddings, attention scores, residual stream and logits.
GRANITE = dataclasses.replace(
    FAMILY,
    model_type="granite",
    architecture="GraniteForCausalLM",
    fields=(
        *FAMILY.fields,
        Field("embedding_scale", "embedding_multiplier", float, 1.0),
        Field("query_scale", "attention_multiplier", float, 1.0),
        Field("residual_scale", "residual_multiplier", float, 1.0),
        Field("logit_divisor", "logits_scaling", float, 1.0),
    ),
)
