"""GPT-2: learned positions, one fused projection for query, key and value, kernels stored [in, out]."""

from typing import Any

from specjax.hub.families import base
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"
HEAD = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"
IGNORED = (".attn.bias", ".attn.masked_bias")  # causal masks

_FIRST = ((EMBEDDING, ("embedding",)), ("transformer.wpe.weight", ("positions",)))
_NORMS = (("ln_1", ("attention_norm",)), ("ln_2", ("mlp_norm",)))
_LINEAR = (
    ("attn.c_attn", ("attention", "query")),
    ("attn.c_attn", ("attention", "key")),
    ("attn.c_attn", ("attention", "value")),
    ("attn.c_proj", ("attention", "output")),
    ("mlp.c_fc", ("mlp", "up")),
    ("mlp.c_proj", ("mlp", "down")),
)
_LAST = (
    ("transformer.ln_f.weight", ("norm", "scale")),
    ("transformer.ln_f.bias", ("norm", "bias")),
    (HEAD, ("unembedding", "kernel")),
)
# "reorder_and_upcast_attn" is about rounding alone: our scores are float32 anyway.
_ONLY = {"scale_attn_weights": (True, None), "scale_attn_by_inverse_layer_idx": (False, None)}


def layer_names(prefix: str, norms: base.Names, linear: base.Names) -> base.Names:
    """The names of a layer whose norms and projections all have a weight and a bias."""
    return [
        (f"{prefix}.{{}}.{name}.{kind}", (*path, ours))
        for table, weight in ((norms, "scale"), (linear, "kernel"))
        for name, path in table
        for kind, ours in (("weight", weight), ("bias", "bias"))
    ]


def head_size_of(width: int, heads: int, names: tuple[str, str]) -> int:
    """H of a family without a field for it; `names` are those of the fields of `width` and `heads`."""
    if width % heads:
        raise UserError(f'"{names[0]}" {width} is no multiple of "{names[1]}" {heads}; correct either')
    return width // heads


def tensors(config: DecoderConfig) -> list[base.Tensor]:
    """Every learned array of such a model, in the order of computation; without the head where it is tied."""
    parts = {
        f"attention.{name}.{kind}": base.Part(place * config.width, config.width)
        for place, name in enumerate(("query", "key", "value"))
        for kind in ("kernel", "bias")
    }
    layer = layer_names("transformer.h", _NORMS, _LINEAR)
    return base.list_tensors(config, first=_FIRST, layer=layer, last=_LAST, transposed=False, parts=parts)


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    width = base.number(fields, "n_embd", int)
    heads = base.number(fields, "n_head", int)
    positions = base.number(fields, "n_positions", int, absent=1024)
    return base.build(
        MODEL_TYPE,
        vocab_size=base.number(fields, "vocab_size", int),
        width=width,
        layers=base.number(fields, "n_layer", int),
        heads=heads,
        kv_heads=heads,
        head_size=head_size_of(width, heads, ("n_embd", "n_head")),
        mlp_width=base.number(fields, "n_inner", int, absent=4 * width),
        max_positions=positions,
        rotary=None,
        learned_positions=positions,
        norm_epsilon=base.number(fields, "layer_norm_epsilon", float, absent=1e-5),
        norm="layer",
        activation=base.activation(fields, "activation_function", absent="gelu_new"),
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_head=base.flag(fields, "tie_word_embeddings", absent=True),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_inner": config.mlp_width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": config.tied_head,
    }
