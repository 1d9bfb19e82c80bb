"""The Llama family (Llama 1 to 3, Vicuna, SmolLM): `config.json` and tensor names as `LlamaForCausalLM` has them.

Families with similar files are defined as modified copies of this one.
"""

from typing import Any

from specjax.hub.families import base, rotary_fields
from specjax.hub.families.base import Field
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

_PROJECTIONS = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
FIRST = {
    "embedding": "model.embed_tokens.weight",
    "blocks.{}.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
}
NAMES = {
    **FIRST,
    "blocks.{}.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    **{f"blocks.{{}}.{path}.kernel": f"model.layers.{{}}.{name}.weight" for name, path in _PROJECTIONS.items()},
    **{f"blocks.{{}}.{path}.bias": f"model.layers.{{}}.{name}.bias" for name, path in _PROJECTIONS.items()},
    "blocks.{}.attention.query_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.key_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.kernel": "lm_head.weight",
}
# Missing optional fields get the defaults of `LlamaConfig`.
FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("width", "hidden_size"),
    Field("mlp_width", "intermediate_size"),
    Field("layers", "num_hidden_layers"),
    Field("heads", "num_attention_heads"),
    Field("kv_heads", "num_key_value_heads", absent=lambda values: values["heads"]),
    Field(
        "head_size",
        "head_dim",
        absent=lambda values: base.head_size(values, "hidden_size", "num_attention_heads", 'give "head_dim"'),
    ),
    Field("max_positions", "max_position_embeddings", absent=2048),
    Field("norm_epsilon", "rms_norm_eps", float, 1e-6),
    Field("tied_head", "tie_word_embeddings", bool, False),
)
TIED_FIELDS = (*FIELDS[:-1], Field("tied_head", "tie_word_embeddings", bool, True))
ATTENTION_BIAS = (
    Field("attention_bias", "attention_bias", bool, False),
    Field("output_bias", "attention_bias", bool, False),
)
MLP_BIAS = Field("mlp_bias", "mlp_bias", bool, False)
NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}

# Supported values of fields, shared by the families derived from Llama.
ONLY = {
    "hidden_act": ("silu", "swish", None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


def rotary(
    fields: dict[str, Any], values: dict[str, Any], *, theta: float = 10000.0, partial: bool = False
) -> dict[str, Any]:
    """The config attribute for rotary positions, in the form of `Family.read`.

    Args:
      theta: default rotary base of the family.
      partial: whether "partial_rotary_factor" may leave channels of each head unrotated.

    Raises:
      UserError: for an invalid field, or a partial rotary factor that is not allowed.
    """
    size = values["head_size"]
    positions = rotary_fields.rotary_of(fields, size, values["max_positions"], theta=theta)
    if positions.size != size and not partial:
        raise UserError(
            f'"partial_rotary_factor" turns {positions.size} of {size} channels, which this family does not; remove it'
        )
    return {"rotary": positions}


def written_rotary(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `rotary`."""
    return rotary_fields.written_rotary(config.rotary, config.head_size)


FAMILY = base.Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=(*FIELDS, *ATTENTION_BIAS, MLP_BIAS),
    names=NAMES,
    ignored=("rotary_emb.inv_freq",),
    only={**ONLY, "sliding_window": (None,), "use_sliding_window": (False, None), "layer_types": (None,)},
    written={"hidden_act": "silu"},
    read=rotary,
    write=written_rotary,
)
