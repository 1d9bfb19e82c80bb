"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373): parallel residual, partly turned heads, fused by heads."""

from typing import Any

from specjax.hub.families import base, gpt2, rotary_fields
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

MODEL_TYPE = "gpt_neox"
ARCHITECTURE = "GPTNeoXForCausalLM"
HEAD = "embed_out.weight"
EMBEDDING = "gpt_neox.embed_in.weight"
# Causal masks, and angles that follow from the config.
IGNORED = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")

_NORMS = (("input_layernorm", ("attention_norm",)), ("post_attention_layernorm", ("mlp_norm",)))
_LINEAR = (
    ("attention.query_key_value", ("attention", "query")),
    ("attention.query_key_value", ("attention", "key")),
    ("attention.query_key_value", ("attention", "value")),
    ("attention.dense", ("attention", "output")),
    ("mlp.dense_h_to_4h", ("mlp", "up")),
    ("mlp.dense_4h_to_h", ("mlp", "down")),
)
_LAST = (
    ("gpt_neox.final_layer_norm.weight", ("norm", "scale")),
    ("gpt_neox.final_layer_norm.bias", ("norm", "bias")),
    (HEAD, ("unembedding", "kernel")),
)
_OLDER = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def tensors(config: DecoderConfig) -> list[base.Tensor]:
    """Every learned array of such a model, in the order of computation; without the head where it is tied.

    The outputs of the fused projection are query, key and value of the first head, then of the second, and so on.
    """
    size = config.head_size
    parts = {
        f"attention.{name}.{kind}": base.Part(place * size, size, config.heads)
        for place, name in enumerate(("query", "key", "value"))
        for kind in ("kernel", "bias")
    }
    layer = gpt2.layer_names("gpt_neox.layers", _NORMS, _LINEAR)
    first = ((EMBEDDING, ("embedding",)),)
    return base.list_tensors(config, first=first, layer=layer, last=_LAST, parts=parts)


def _rotary(fields, size, positions):
    """The family has two fields under names of its own, and turns a quarter of a head where the file says nothing."""
    named = {name: fields.get(name) for name in ("rope_parameters", "rope_scaling")}
    for name, older in _OLDER.items():
        given = {fields[key] for key in (name, older) if fields.get(key) is not None}
        if len(given) > 1:
            raise UserError(f'"{name}" and "{older}" differ; keep the right one')
        named[name] = given.pop() if given else None
    places = [named, *(named[name] for name in ("rope_parameters", "rope_scaling") if isinstance(named[name], dict))]
    if all(place.get("partial_rotary_factor") is None for place in places):
        named["partial_rotary_factor"] = 0.25
    return rotary_fields.rotary_of(named, size, positions)


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, {})
    width = base.number(fields, "hidden_size", int)
    heads = base.number(fields, "num_attention_heads", int)
    size = gpt2.head_size_of(width, heads, ("hidden_size", "num_attention_heads"))
    positions = base.number(fields, "max_position_embeddings", int, absent=2048)
    bias = base.flag(fields, "attention_bias", absent=True)
    return base.build(
        MODEL_TYPE,
        vocab_size=base.number(fields, "vocab_size", int),
        width=width,
        layers=base.number(fields, "num_hidden_layers", int),
        heads=heads,
        kv_heads=heads,
        head_size=size,
        mlp_width=base.number(fields, "intermediate_size", int),
        max_positions=positions,
        rotary=_rotary(fields, size, positions),
        norm_epsilon=base.number(fields, "layer_norm_eps", float, absent=1e-5),
        norm="layer",
        order="parallel" if base.flag(fields, "use_parallel_residual", absent=True) else "pre",
        activation=base.activation(fields, "hidden_act", absent="gelu"),
        gated_mlp=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        tied_head=base.flag(fields, "tie_word_embeddings", absent=False),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    rotary = rotary_fields.written_rotary(config.rotary, config.head_size)
    turned = rotary.pop("partial_rotary_factor", 1.0)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.norm_epsilon,
        "rotary_emb_base": rotary.pop("rope_theta"),
        "rotary_pct": turned,
        **rotary,
        "rope_parameters": {**rotary["rope_parameters"], "partial_rotary_factor": turned},
        "use_parallel_residual": config.order == "parallel",
        "hidden_act": base.written_activation(config),
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tied_head,
    }
