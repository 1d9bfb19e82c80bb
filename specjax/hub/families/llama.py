"""The Llama family (Llama 1 to 3, Vicuna, SmolLM): `config.json` and tensor names as `LlamaForCausalLM` has them.

Families with similar files are defined as modified copies of this one.
"""

from specjax.hub.families import base, rotary_fields
from specjax.hub.families.base import Field

_PROJECTIONS = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
FIRST = {
    "embedding": "model.embed_tokens.weight",
    "blocks.{}.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
}
NAMES = {
    **FIRST,
    "blocks.{}.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    **{f"blocks.{{}}.{path}.kernel": f"model.layers.{{}}.{name}.weight" for name, path in _PROJECTIONS.items()},
    **{f"blocks.{{}}.{path}.bias": f"model.layers.{{}}.{name}.bias" for name, path in _PROJECTIONS.items()},
    "blocks.{}.attention.query_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.key_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.kernel": "lm_head.weight",
}


def fields(
    *, kv_heads: int | None = None, head_size: int | None = None, max_positions: int = 2048, tied_head: bool = False
) -> tuple[Field, ...]:
    """The fields of Llama's layout; the arguments are the family's defaults for absent ones.

    Without a default there are as many key/value heads as heads, and the head size is the width / heads.
    """
    divided = lambda values: base.head_size(values, "hidden_size", "num_attention_heads", 'give "head_dim"')
    return (
        Field("vocab_size", "vocab_size"),
        Field("width", "hidden_size"),
        Field("mlp_width", "intermediate_size"),
        Field("layers", "num_hidden_layers"),
        Field("heads", "num_attention_heads"),
        Field("kv_heads", "num_key_value_heads", absent=kv_heads or (lambda values: values["heads"])),
        Field("head_size", "head_dim", absent=head_size or divided),
        Field("max_positions", "max_position_embeddings", absent=max_positions),
        Field("norm_epsilon", "rms_norm_eps", float, 1e-6),
        Field("tied_head", "tie_word_embeddings", bool, tied_head),
    )


ATTENTION_BIAS = tuple(Field(name, "attention_bias", bool, False) for name in ("attention_bias", "output_bias"))
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
    names=NAMES,
    ignored=("rotary_emb.inv_freq",),
    only={**ONLY, "sliding_window": (None,), "use_sliding_window": (False, None), "layer_types": (None,)},
    written={"hidden_act": "silu"},
)
