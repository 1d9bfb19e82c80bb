"""GPT-NeoX, Pythia (arXiv 2204.06745, 2304.01373): parallel residual, partly rotated heads, QKV fused head by head."""

from typing import Any

from specjax.hub.families import base, rotary_fields
from specjax.hub.families.base import Field
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

_NORMS = (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm"))
_LINEAR = (
    *(("attention.query_key_value", path) for path in base.QUERY_KEY_VALUE),
    ("attention.dense", "attention.output"),
    ("mlp.dense_h_to_4h", "mlp.up"),
    ("mlp.dense_4h_to_h", "mlp.down"),
)
_OLDER = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def _parts(config: DecoderConfig) -> dict[str, base.Part]:
    """The fused projection has query, key and value of the first head, then of the second, and so on."""
    return base.fused(dict.fromkeys(base.QUERY_KEY_VALUE, config.head_size), groups=config.heads)


def _rotary_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields under the names of other families; by default a quarter of each head is rotated."""
    usual = {name: fields.get(name) for name in ("rope_parameters", "rope_scaling")}
    for name, older in _OLDER.items():
        values = {fields[key] for key in (name, older) if fields.get(key) is not None}
        if len(values) > 1:
            raise UserError(f'"{name}" and "{older}" differ; keep the right one')
        usual[name] = values.pop() if values else None
    places = [usual, *(usual[name] for name in ("rope_parameters", "rope_scaling") if isinstance(usual[name], dict))]
    if all(place.get("partial_rotary_factor") is None for place in places):
        usual["partial_rotary_factor"] = 0.25
    return usual


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return {"rotary": rotary_fields.rotary_of(_rotary_fields(fields), values["head_size"], values["max_positions"])}


def _write(config: DecoderConfig) -> dict[str, Any]:
    rotary = rotary_fields.written_rotary(config.rotary, config.head_size)
    share = rotary.pop("partial_rotary_factor", 1.0)
    return {
        "rotary_emb_base": rotary.pop("rope_theta"),
        "rotary_pct": share,
        **rotary,
        "rope_parameters": {**rotary["rope_parameters"], "partial_rotary_factor": share},
    }


FAMILY = base.Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("width", "hidden_size"),
        Field("mlp_width", "intermediate_size"),
        Field("layers", "num_hidden_layers"),
        Field("heads", "num_attention_heads"),
        base.one_size_heads("hidden_size", "num_attention_heads"),
        Field("max_positions", "max_position_embeddings", absent=2048),
        Field("norm_epsilon", "layer_norm_eps", float, 1e-5),
        Field("activation", "hidden_act", str, "gelu"),
        Field("attention_bias", "attention_bias", bool, True),
        Field("output_bias", "attention_bias", bool, True),
        Field("tied_head", "tie_word_embeddings", bool, False),
        Field("order", "use_parallel_residual", bool, True, {True: "parallel", False: "pre"}),
        base.Group(_read, _write),
    ),
    names={
        "embedding": "gpt_neox.embed_in.weight",
        **base.weight_and_bias("gpt_neox.layers", _NORMS, "scale"),
        **base.weight_and_bias("gpt_neox.layers", _LINEAR, "kernel"),
        "norm.scale": "gpt_neox.final_layer_norm.weight",
        "norm.bias": "gpt_neox.final_layer_norm.bias",
        "unembedding.kernel": "embed_out.weight",
    },
    parts=_parts,
    # Causal masks, and angles that follow from the config.
    ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    always={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
)
