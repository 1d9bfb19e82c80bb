"""The Llama family: its `config.json` and its tensor names, as `LlamaForCausalLM` of Hugging Face writes them.

A family is four things: `MODEL_TYPE` and `ARCHITECTURE` (its names in config.json), `read_config`/`write_config`
and `tensors`. `IGNORED` names tensors of old checkpoints that hold nothing learned.
"""

from typing import Any, NamedTuple

from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
IGNORED = ("rotary_emb.inv_freq",)


class Tensor(NamedTuple):
    """One learned array: its name in the file, its path in our tree, and whether the file holds its transpose."""

    name: str
    path: tuple[str | int, ...]
    transposed: bool


# The one table of names. Kernels lie [out, in] in the file and [in, out] with us; embedding and gains are the same.
_LAYER = (
    ("input_layernorm.weight", ("attention_norm", "scale"), False),
    ("self_attn.q_proj.weight", ("attention", "query", "kernel"), True),
    ("self_attn.k_proj.weight", ("attention", "key", "kernel"), True),
    ("self_attn.v_proj.weight", ("attention", "value", "kernel"), True),
    ("self_attn.o_proj.weight", ("attention", "output", "kernel"), True),
    ("post_attention_layernorm.weight", ("mlp_norm", "scale"), False),
    ("mlp.gate_proj.weight", ("mlp", "gate", "kernel"), True),
    ("mlp.up_proj.weight", ("mlp", "up", "kernel"), True),
    ("mlp.down_proj.weight", ("mlp", "down", "kernel"), True),
)

# Fields that change what the model computes, with the values for which our arithmetic is the right one. Each may be
# absent. Dropout rates and initialiser scales are recipes of training, not of the model, and are not looked at.
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": (None,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "auto_map": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (1, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
}


def tensors(config: DecoderConfig) -> list[Tensor]:
    """Every learned array of such a model, in the order of computation; without the head where it is tied."""
    listed = [Tensor(EMBEDDING, ("embedding",), False)]
    for layer in range(config.layers):
        for name, path, transposed in _LAYER:
            listed.append(Tensor(f"model.layers.{layer}.{name}", ("blocks", layer, *path), transposed))
    listed.append(Tensor("model.norm.weight", ("norm", "scale"), False))
    if not config.tied_head:
        listed.append(Tensor(HEAD, ("unembedding", "kernel"), True))
    return listed


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Absent optional fields have the values that the file format gives them (those of `LlamaConfig`).

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    _refuse_other_arithmetic(fields)
    width = _number(fields, "hidden_size", int)
    heads = _number(fields, "num_attention_heads", int)
    if fields.get("head_dim") is None and width % max(heads, 1):
        raise UserError(f'"hidden_size" {width} is no multiple of "num_attention_heads" {heads}; give "head_dim"')
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f'"tie_word_embeddings" must be true or false, not {tied!r}')
    try:
        return DecoderConfig(
            vocab_size=_number(fields, "vocab_size", int),
            width=width,
            layers=_number(fields, "num_hidden_layers", int),
            heads=heads,
            kv_heads=_number(fields, "num_key_value_heads", int, absent=heads),
            head_size=_number(fields, "head_dim", int, absent=width // max(heads, 1)),
            mlp_width=_number(fields, "intermediate_size", int),
            max_positions=_number(fields, "max_position_embeddings", int, absent=2048),
            rope_theta=_rope_theta(fields),
            norm_epsilon=_number(fields, "rms_norm_eps", float, absent=1e-6),
            tied_head=tied,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
    except ValueError as error:
        raise UserError(f"no such decoder can be built: {str(error).rstrip('.')}; correct that field") from None


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        # Readers before transformers 5 look for the first, later ones for the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _number(fields, name, kind, *, absent=None):
    """`fields[name]` as a positive int or float; `absent` where it is missing or null."""
    value = fields.get(name)
    if value is None:
        if absent is None:
            raise UserError(f'"{name}" is missing; take the complete config.json of the checkpoint')
        return absent
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or not value > 0:
        raise UserError(f'"{name}" must be a positive {"number" if kind is float else "integer"}, not {value!r}')
    return kind(value)


def _refuse_other_arithmetic(fields):
    architectures = fields.get("architectures")
    if architectures is not None and architectures != [ARCHITECTURE]:
        raise UserError(f'"architectures" is {architectures!r}, but only ["{ARCHITECTURE}"] is supported')
    for name, allowed in _ONLY.items():
        value = fields.get(name)
        if name in fields and value not in allowed:
            raise UserError(f'"{name}" is {value!r}, which is not supported; only {_listed(allowed)} can be loaded')


def _listed(allowed):
    return " or ".join("null" if value is None else repr(value) for value in allowed)


def _refuse_rope(name, value):
    """Raises UserError unless this field describes plain rotary positions."""
    if not isinstance(value, dict):
        raise UserError(f'"{name}" must be an object, not {value!r}')
    kind = value.get("rope_type", value.get("type", "default"))
    if kind != "default":
        raise UserError(f'"{name}" is of type {kind!r}, which is not supported; only "default" can be loaded')
    for key, setting in value.items():
        plain = key in ("rope_type", "type", "rope_theta") or (key == "partial_rotary_factor" and setting == 1)
        if not plain:
            raise UserError(f'"{name}" sets {key!r} to {setting!r}, which is not supported by plain rotary positions')


def _rope_theta(fields) -> float:
    """The rotary base: at the top level in older files, inside "rope_parameters" in newer ones."""
    places = [fields]
    for name in ("rope_parameters", "rope_scaling"):
        nested = fields.get(name)
        if nested is not None:
            _refuse_rope(name, nested)
            places.append(nested)
    given = [_number(place, "rope_theta", float) for place in places if place.get("rope_theta") is not None]
    if len(set(given)) > 1:
        raise UserError(
            f'"rope_theta" is given twice and differently, {given[0]:g} and {given[1]:g}; keep the right one'
        )
    return given[0] if given else 10000.0
