"""The Llama family (Llama 1 to 3, Vicuna, SmolLM): `config.json` and tensor names as `LlamaForCausalLM` has them.

A family is: `MODEL_TYPE` and `ARCHITECTURE` (its names in config.json), `read_config`/`write_config` and `tensors`,
`HEAD` and `EMBEDDING` (names that may hold the same tied array), and `IGNORED`, endings of the names of tensors in old
checkpoints that hold nothing learned. Families whose files look alike use the tables and functions of this one.
"""

from typing import Any

from specjax.hub.families import base, rotary_fields
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
IGNORED = ("rotary_emb.inv_freq",)

_PROJECTIONS = {
    "self_attn.q_proj": ("attention", "query"),
    "self_attn.k_proj": ("attention", "key"),
    "self_attn.v_proj": ("attention", "value"),
    "self_attn.o_proj": ("attention", "output"),
    "mlp.gate_proj": ("mlp", "gate"),
    "mlp.up_proj": ("mlp", "up"),
    "mlp.down_proj": ("mlp", "down"),
}
# Layers whose norms have Llama's names.
NORMS = (
    ("model.layers.{}.input_layernorm.weight", ("attention_norm", "scale")),
    ("model.layers.{}.post_attention_layernorm.weight", ("mlp_norm", "scale")),
)
LAYER = (
    *((f"model.layers.{{}}.{name}.weight", (*path, "kernel")) for name, path in _PROJECTIONS.items()),
    *((f"model.layers.{{}}.{name}.bias", (*path, "bias")) for name, path in _PROJECTIONS.items()),
    ("model.layers.{}.self_attn.q_norm.weight", ("attention", "query_norm", "scale")),
    ("model.layers.{}.self_attn.k_norm.weight", ("attention", "key_norm", "scale")),
)
FIRST = ((EMBEDDING, ("embedding",)),)
LAST = (("model.norm.weight", ("norm", "scale")), (HEAD, ("unembedding", "kernel")))

# What is right in every family of this manner.
ONLY = {
    "hidden_act": ("silu", "swish", None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}
_ONLY = {**ONLY, "sliding_window": (None,), "use_sliding_window": (False, None), "layer_types": (None,)}


def tensors(config: DecoderConfig) -> list[base.Tensor]:
    """Every learned array of such a model, in the order of computation; without the head where it is tied."""
    return base.list_tensors(config, first=FIRST, layer=(*NORMS, *LAYER), last=LAST)


def shape_of(
    fields: dict[str, Any], *, theta: float = 10000.0, tied: bool = False, partial: bool = False
) -> dict[str, Any]:
    """The values of a DecoderConfig that files in Llama's manner name alike, family and dtypes apart.

    Absent optional fields have the values that the format gives them (those of `LlamaConfig`).

    Args:
      theta: the family's own rotary base where the file gives none.
      tied: whether the head is the embedding where the file does not say.
      partial: whether the family may leave some channels of each head unturned.

    Raises:
      UserError: for a field that is missing or wrong, or a partial rotary factor where there is none.
    """
    width = base.number(fields, "hidden_size", int)
    heads = base.number(fields, "num_attention_heads", int)
    size = base.head_size(fields, width, heads)
    positions = base.number(fields, "max_position_embeddings", int, absent=2048)
    rotary = rotary_fields.rotary_of(fields, size, positions, theta=theta)
    if rotary.size != size and not partial:
        raise UserError(
            f'"partial_rotary_factor" turns {rotary.size} of {size} channels, which this family does not; remove it'
        )
    return dict(
        vocab_size=base.number(fields, "vocab_size", int),
        width=width,
        layers=base.number(fields, "num_hidden_layers", int),
        heads=heads,
        kv_heads=base.number(fields, "num_key_value_heads", int, absent=heads),
        head_size=size,
        mlp_width=base.number(fields, "intermediate_size", int),
        max_positions=positions,
        rotary=rotary,
        norm_epsilon=base.number(fields, "rms_norm_eps", float, absent=1e-6),
        tied_head=base.flag(fields, "tie_word_embeddings", absent=tied),
    )


def written_shape(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `shape_of`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        **rotary_fields.written_rotary(config.rotary, config.head_size),
        "tie_word_embeddings": config.tied_head,
    }


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    bias = base.flag(fields, "attention_bias", absent=False)
    return base.build(
        MODEL_TYPE,
        **shape_of(fields),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=base.flag(fields, "mlp_bias", absent=False),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **written_shape(config),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
