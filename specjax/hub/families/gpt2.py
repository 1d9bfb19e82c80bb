"""GPT-2: learned positions, one fused projection for query, key and value, kernels stored [in, out]."""

from specjax.hub.families import base
from specjax.hub.families.base import Field
from specjax.models.config import DecoderConfig

_NORMS = (("ln_1", "attention_norm"), ("ln_2", "mlp_norm"))
_LINEAR = (
    *(("attn.c_attn", path) for path in base.QUERY_KEY_VALUE),
    ("attn.c_proj", "attention.output"),
    ("mlp.c_fc", "mlp.up"),
    ("mlp.c_proj", "mlp.down"),
)


def _parts(config: DecoderConfig) -> dict[str, base.Part]:
    return base.fused(dict.fromkeys(base.QUERY_KEY_VALUE, config.width))


FAMILY = base.Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("width", "n_embd"),
        Field("mlp_width", "n_inner", absent=lambda values: 4 * values["width"]),
        Field("layers", "n_layer"),
        Field("heads", "n_head"),
        base.one_size_heads("n_embd", "n_head"),
        Field("max_positions", "n_positions", absent=1024),
        Field("norm_epsilon", "layer_norm_epsilon", float, 1e-5),
        Field("activation", "activation_function", str, "gelu_new", {"gelu_new": "gelu_tanh", **base.ACTIVATIONS}),
        Field("tied_head", "tie_word_embeddings", bool, True),
        base.derived(lambda values: {"learned_positions": values["max_positions"]}),
    ),
    names={
        "embedding": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        **base.weight_and_bias("transformer.h", _NORMS, "scale"),
        **base.weight_and_bias("transformer.h", _LINEAR, "kernel"),
        "norm.scale": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "unembedding.kernel": "lm_head.weight",
    },
    parts=_parts,
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
