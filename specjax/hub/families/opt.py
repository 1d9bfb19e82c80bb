"""OPT (arXiv 2205.01068), with the 350M model's projected embeddings and norms after the sublayers."""

from typing import Any

from specjax.hub.families import base
from specjax.hub.families.base import Field
from specjax.hub.file_layout import tensor_names
from specjax.models.config import DecoderConfig

_OFFSET = 2  # the first two rows of the table of positions are for padding
_MODULES = {
    "attention_norm": "self_attn_layer_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    inner = base.value_of(fields, "word_embed_proj_dim", int, absent=values["width"])
    removed = base.value_of(fields, "_remove_final_layer_norm", bool, absent=False)
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
        *base.sizes(mlp="ffn_dim"),
        base.one_size_heads(),
        Field("max_positions", "max_position_embeddings", absent=2048),
        Field("activation", "activation_function", base.ACTIVATIONS, "relu"),
        *base.biases("enable_bias", True, "attention_bias", "output_bias", "mlp_bias"),
        Field("tied_head", "tie_word_embeddings", bool, True),
        Field("order", "do_layer_norm_before", {True: "pre", False: "post"}, "pre"),
        base.Group(_read, _write),
    ),
    names={
        "project_in.kernel": "model.decoder.project_in.weight",
        "positions": "model.decoder.embed_positions.weight",
        "project_out.kernel": "model.decoder.project_out.weight",
        **tensor_names(
            "model.decoder.embed_tokens", "model.decoder.layers", _MODULES, "model.decoder.final_layer_norm", "lm_head"
        ),
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
