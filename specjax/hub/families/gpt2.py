"""GPT-2: learned positions, one fused projection for query, key and value, kernels stored [in, out]."""

from specjax.hub.families import base
from specjax.hub.families.base import Field
from specjax.hub.file_layout import tensor_names

_MODULES = {
    "attention_norm": "ln_1",
    **dict.fromkeys(base.QUERY_KEY_VALUE, "attn.c_attn"),
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}

FAMILY = base.Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields=(
        *base.sizes("n_embd", "n_inner", "n_layer", "n_head", absent=lambda values: 4 * values["width"]),
        base.one_size_heads("n_embd", "n_head"),
        Field("max_positions", "n_positions", absent=1024),
        Field("norm_epsilon", "layer_norm_epsilon", float, 1e-5),
        Field("activation", "activation_function", {"gelu_new": "gelu_tanh", **base.ACTIVATIONS}, "gelu_tanh"),
        Field("tied_head", "tie_word_embeddings", bool, True),
        base.derived(lambda values: {"learned_positions": values["max_positions"]}),
    ),
    names={
        "positions": "transformer.wpe.weight",
        **tensor_names("transformer.wte", "transformer.h", _MODULES, "transformer.ln_f", "lm_head"),
    },
    transposed=True,
    ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks
    # "reorder_and_upcast_attn" is about rounding alone: our scores are float32 anyway.
    only={"scale_attn_weights": (True, None), "scale_attn_by_inverse_layer_idx": (False, None)},
    always={
        "rotary": None,
        "norm": "layer",
        "gated_mlp": False,
        **dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), True),
    },
    written={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
)
