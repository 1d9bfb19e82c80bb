"""GPT-NeoX, Pythia (arXiv 2204.06745, 2304.01373): parallel residual, partly rotated heads, QKV fused head by head."""

from specjax.hub.families import base, rotary_fields
from specjax.hub.families.base import Field
from specjax.hub.file_layout import tensor_names

_MODULES = {
    "attention_norm": "input_layernorm",
    **dict.fromkeys(base.QUERY_KEY_VALUE, "attention.query_key_value"),
    "attention.output": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_OLDER = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


FAMILY = base.Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields=(
        *base.sizes(),
        base.one_size_heads(),
        Field("max_positions", "max_position_embeddings", absent=2048),
        Field("norm_epsilon", "layer_norm_eps", float, 1e-5),
        Field("activation", "hidden_act", base.ACTIVATIONS, "gelu"),
        *base.biases("attention_bias", True, "attention_bias", "output_bias"),
        Field("tied_head", "tie_word_embeddings", bool, False),
        Field("order", "use_parallel_residual", {True: "parallel", False: "pre"}, "parallel"),
        rotary_fields.rotary(partial=True, share=0.25, names=_OLDER),  # by default a quarter of each head
    ),
    names=tensor_names("gpt_neox.embed_in", "gpt_neox.layers", _MODULES, "gpt_neox.final_layer_norm", "embed_out"),
    groups=lambda config: config.heads,  # query, key and value of the first head, then of the second, and so on
    # Causal masks, and angles that follow from the config.
    ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    always={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
)
