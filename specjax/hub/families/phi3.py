"""The Phi-3 family (Phi-3, Phi-3.5, Phi-4): Llama's arithmetic, fused projections, partial and "longrope" positions."""

from typing import Any

from specjax.hub.families import base, llama
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

MODEL_TYPE = "phi3"
ARCHITECTURE = "Phi3ForCausalLM"
HEAD, EMBEDDING, IGNORED = llama.HEAD, llama.EMBEDDING, llama.IGNORED

_LAYER = (
    *llama.NORMS,
    ("model.layers.{}.self_attn.qkv_proj.weight", ("attention", "query", "kernel")),
    ("model.layers.{}.self_attn.qkv_proj.weight", ("attention", "key", "kernel")),
    ("model.layers.{}.self_attn.qkv_proj.weight", ("attention", "value", "kernel")),
    ("model.layers.{}.self_attn.o_proj.weight", ("attention", "output", "kernel")),
    ("model.layers.{}.mlp.gate_up_proj.weight", ("mlp", "gate", "kernel")),
    ("model.layers.{}.mlp.gate_up_proj.weight", ("mlp", "up", "kernel")),
    ("model.layers.{}.mlp.down_proj.weight", ("mlp", "down", "kernel")),
)
_ORIGINAL = "original_max_position_embeddings"
# What the format gives to absent fields.
_ABSENT = {"max_position_embeddings": 4096, _ORIGINAL: 4096, "rms_norm_eps": 1e-5}
_ONLY = {
    **llama.ONLY,
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "lm_head_bias": (False, None),
    "use_sliding_window": (None,),
    "layer_types": (None,),
}
# Checkpoints from before transformers had this family name code of their own, which computes the same.
_OWN_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}


def tensors(config: DecoderConfig) -> list[base.Tensor]:
    """Every learned array of such a model, in the order of computation; without the head where it is tied."""
    queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
    parts = {
        "attention.query.kernel": base.Part(0, queries),
        "attention.key.kernel": base.Part(queries, keys),
        "attention.value.kernel": base.Part(queries + keys, keys),
        "mlp.gate.kernel": base.Part(0, config.mlp_width),
        "mlp.up.kernel": base.Part(config.mlp_width, config.mlp_width),
    }
    return base.list_tensors(config, first=llama.FIRST, layer=_LAYER, last=llama.LAST, parts=parts)


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    code = fields.get("auto_map")
    if isinstance(code, dict) and all(code.get(key) == value for key, value in _OWN_CODE.items()):
        fields = {key: value for key, value in fields.items() if key != "auto_map"}
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    fields = {**_ABSENT, **fields}
    shape = llama.shape_of(fields, partial=True)
    if shape["rotary"].kind not in ("default", "longrope"):
        raise UserError(
            f'"rope_scaling" of type {shape["rotary"].kind!r} is unknown to this family; "longrope" is known'
        )
    window = base.number(fields, "sliding_window", int, absent=0)
    return base.build(
        MODEL_TYPE,
        **shape,
        windows=(window,) * shape["layers"] if window else (),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    fields = llama.written_shape(config)
    rotary = config.rotary
    if rotary.kind == "longrope" and rotary.factor == config.max_positions / rotary.original_positions:
        # Readers before transformers 5 take exactly these three, and the rest from the top level.
        scaling = {
            "type": "longrope",
            **{name: fields["rope_scaling"][name] for name in ("short_factor", "long_factor")},
        }
        fields["rope_scaling"] = (
            scaling if rotary.magnitude is None else {**scaling, "attention_factor": rotary.magnitude}
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **fields,
        _ORIGINAL: rotary.original_positions or config.max_positions,
        "hidden_act": "silu",
        "sliding_window": config.window(0) or None,
    }
