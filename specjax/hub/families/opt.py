"""OPT (arXiv 2205.01068), with the 350M model's projected embeddings and norms behind the sublayers."""

from typing import Any

from specjax.hub.families import base, gpt2
from specjax.models.config import DecoderConfig

MODEL_TYPE = "opt"
ARCHITECTURE = "OPTForCausalLM"
HEAD = "lm_head.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"
IGNORED = ()

# Of the table of positions, the first two rows stand for padding.
_OFFSET = 2
_EPSILON = 1e-5  # no field of the format
_FIRST = (
    (EMBEDDING, ("embedding",)),
    ("model.decoder.project_in.weight", ("project_in", "kernel")),
    ("model.decoder.embed_positions.weight", ("positions",)),
)
_LINEAR = (
    ("self_attn.q_proj", ("attention", "query")),
    ("self_attn.k_proj", ("attention", "key")),
    ("self_attn.v_proj", ("attention", "value")),
    ("self_attn.out_proj", ("attention", "output")),
    ("fc1", ("mlp", "up")),
    ("fc2", ("mlp", "down")),
)
_NORMS = (("self_attn_layer_norm", ("attention_norm",)), ("final_layer_norm", ("mlp_norm",)))
_LAST = (
    ("model.decoder.final_layer_norm.weight", ("norm", "scale")),
    ("model.decoder.final_layer_norm.bias", ("norm", "bias")),
    ("model.decoder.project_out.weight", ("project_out", "kernel")),
    (HEAD, ("unembedding", "kernel")),
)
_ONLY = {
    "layer_norm_elementwise_affine": (True, None),
    # Of Galactica's files.
    "learned_embeddings": (True, None),
    "scale_embeddings": (False, None),
}


def tensors(config: DecoderConfig) -> list[base.Tensor]:
    """Every learned array of such a model, in the order of computation; without the head where it is tied."""
    layer = gpt2.layer_names("model.decoder.layers", _NORMS, _LINEAR)
    return base.list_tensors(config, first=_FIRST, layer=layer, last=_LAST)


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    width = base.number(fields, "hidden_size", int)
    heads = base.number(fields, "num_attention_heads", int)
    inner = base.number(fields, "word_embed_proj_dim", int, absent=width)
    positions = base.number(fields, "max_position_embeddings", int, absent=2048)
    bias = base.flag(fields, "enable_bias", absent=True)
    before = base.flag(fields, "do_layer_norm_before", absent=True)
    return base.build(
        MODEL_TYPE,
        vocab_size=base.number(fields, "vocab_size", int),
        width=width,
        layers=base.number(fields, "num_hidden_layers", int),
        heads=heads,
        kv_heads=heads,
        head_size=gpt2.head_size_of(width, heads, ("hidden_size", "num_attention_heads")),
        mlp_width=base.number(fields, "ffn_dim", int),
        max_positions=positions,
        rotary=None,
        learned_positions=positions + _OFFSET,
        position_offset=_OFFSET,
        norm_epsilon=_EPSILON,
        norm="layer",
        order="pre" if before else "post",
        final_norm=before and not base.flag(fields, "_remove_final_layer_norm", absent=False),
        activation=base.activation(fields, "activation_function", absent="relu"),
        gated_mlp=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        embedding_width=0 if inner == width else inner,
        tied_head=base.flag(fields, "tie_word_embeddings", absent=True),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    before = config.order == "pre"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.embedding_width or config.width,
        "ffn_dim": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_positions,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "activation_function": base.written_activation(config),
        "enable_bias": config.attention_bias,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": config.tied_head,
    }
