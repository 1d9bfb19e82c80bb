"""The Llama family (Llama 1 to 3, Vicuna, SmolLM), and Mistral, OLMo 2 and Granite as modified copies of it.

Families in other files whose `config.json` and tensor names are similar are modified copies of it too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from specjax.hub.families import base, rotary_fields, window_fields
from specjax.hub.families.base import Field
from specjax.hub.file_layout import tensor_names

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
    return tensor_names("model.embed_tokens", "model.layers", modules, "model.norm", "lm_head")


def _divided(values: dict[str, Any]) -> int:
    return base.head_size(values, "hidden_size", "num_attention_heads", 'give "head_dim"')


# Without a value in the file or the family's `absent`, there are as many key/value heads as heads.
FIELDS = (
    *base.sizes(),
    Field("kv_heads", "num_key_value_heads", absent=lambda values: values["heads"]),
    Field("head_size", "head_dim", absent=_divided),
    Field("max_positions", "max_position_embeddings", absent=2048),
    Field("norm_epsilon", "rms_norm_eps", float, 1e-6),
    Field("tied_head", "tie_word_embeddings", bool, False),
)
ATTENTION_BIAS = base.biases("attention_bias", False, "attention_bias", "output_bias")
MLP_BIAS = Field("mlp_bias", "mlp_bias", bool, False)
# Supported values of fields, shared by the families derived from Llama.
ONLY = {"hidden_act": ("silu", "swish", None)}

FAMILY = base.Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=(*FIELDS, *ATTENTION_BIAS, MLP_BIAS, rotary_fields.rotary()),
    names=names(MODULES),
    ignored=("rotary_emb.inv_freq",),
    only=ONLY,
    written={"hidden_act": "silu"},
)

# Mistral has no biases, and one sliding window in all layers or in none.
WINDOW = window_fields.windows(window_fields.every_layer, ("sliding_window",))
MISTRAL = dataclasses.replace(
    FAMILY,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=(*FIELDS, rotary_fields.rotary(), WINDOW),
    only={**ONLY, "attention_bias": (False, None), "use_sliding_window": (None,), "layer_types": (None,)},
    absent={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
)

# OLMo 2 (arXiv 2501.00656) normalises the output of each sublayer, and all query heads and all key heads together.
OLMO2 = dataclasses.replace(
    FAMILY,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=(*FIELDS, *ATTENTION_BIAS, rotary_fields.rotary()),
    names=names(MODULES | {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}),
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
