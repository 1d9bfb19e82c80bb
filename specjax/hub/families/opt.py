"""OPT (arXiv 2205.01068), with the 350M model's projected embeddings and norms after the sublayers."""

from typing import Any

from specjax.hub.families import base
from specjax.hub.families.base import Field
from specjax.models.config import DecoderConfig

_OFFSET = 2  # the first two rows of the table of positions are for padding
_NORMS = (("self_attn_layer_norm", "attention_norm"), ("final_layer_norm", "mlp_norm"))
_LINEAR = (
    ("self_attn.q_proj", "attention.query"),
    ("self_attn.k_proj", "attention.key"),
    ("self_attn.v_proj", "attention.value"),
    ("self_attn.out_proj", "attention.output"),
    ("fc1", "mlp.up"),
    ("fc2", "mlp.down"),
)


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    inner = base.number(fields, "word_embed_proj_dim", int, absent=values["width"])
    removed = base.flag(fields, "_remove_final_layer_norm", absent=False)
    return {
        "learned_positions": values["max_positions"] + _OFFSET,
        "final_norm": values["order"] == "pre" and not removed,
        "embedding_width": 0 if inner == values["width"] else inner,
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "word_embed_proj_dim": config.embedding_width or config.width,
        "_remove_final_layer_norm": config.order == "pre" and not config.final_norm,
    }


FAMILY = base.Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("width", "hidden_size"),
        Field("mlp_width", "ffn_dim"),
        Field("layers", "num_hidden_layers"),
        Field("heads", "num_attention_heads"),
        base.one_size_heads("hidden_size", "num_attention_heads"),
        Field("max_positions", "max_position_embeddings", absent=2048),
        Field("activation", "activation_function", str, "relu"),
        *(Field(name, "enable_bias", bool, True) for name in ("attention_bias", "output_bias", "mlp_bias")),
        Field("tied_head", "tie_word_embeddings", bool, True),
        Field("order", "do_layer_norm_before", bool, True, {True: "pre", False: "post"}),
        base.Group(_read, _write),
    ),
    names={
        "embedding": "model.decoder.embed_tokens.weight",
        "project_in.kernel": "model.decoder.project_in.weight",
        "positions": "model.decoder.embed_positions.weight",
        **base.weight_and_bias("model.decoder.layers", _NORMS, "scale"),
        **base.weight_and_bias("model.decoder.layers", _LINEAR, "kernel"),
        "norm.scale": "model.decoder.final_layer_norm.weight",
        "norm.bias": "model.decoder.final_layer_norm.bias",
        "project_out.kernel": "model.decoder.project_out.weight",
        "unembedding.kernel": "lm_head.weight",
    },
    only={
        "layer_norm_elementwise_affine": (True, None),
        # Fields of Galactica's files.
        "learned_embeddings": (True, None),
        "scale_embeddings": (False, None),
    },
    always={
        "rotary": None,
        "position_offset": _OFFSET,
        "norm_epsilon": 1e-5,  # the format has no field for it
        "norm": "layer",
        "gated_mlp": False,
    },
    written={"layer_norm_elementwise_affine": True},
)
