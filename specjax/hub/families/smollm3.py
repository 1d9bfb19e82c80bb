"""The SmolLM3 family: Llama's layout, of whose layers some do not turn queries and keys (arXiv 2501.18795)."""

from typing import Any

from specjax.hub.families import base, llama, qwen2
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

MODEL_TYPE = "smollm3"
ARCHITECTURE = "SmolLM3ForCausalLM"
HEAD, EMBEDDING, IGNORED, tensors = llama.HEAD, llama.EMBEDDING, llama.IGNORED, llama.tensors

# What the format gives to absent fields.
_ABSENT = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "no_rope_layer_interval": 4}


def _rotary_layers(fields: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers turn. The field's name misleads: 1 is a layer that does."""
    turned = fields.get("no_rope_layers")
    if turned is None:
        interval = base.number(fields, "no_rope_layer_interval", int)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(turned, list) or len(turned) < layers or any(entry not in (0, 1) for entry in turned):
        raise UserError(f'"no_rope_layers" must have a 0 or a 1 for each layer, not {turned!r}')
    return tuple(map(bool, turned[:layers]))


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, llama.ONLY)
    fields = {**_ABSENT, **fields}
    shape = llama.shape_of(fields, theta=2e6, tied=True)
    bias = base.flag(fields, "attention_bias", absent=False)
    turned = _rotary_layers(fields, shape["layers"])
    return base.build(
        MODEL_TYPE,
        **shape,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=base.flag(fields, "mlp_bias", absent=False),
        rotary_layers=() if all(turned) else turned,
        windows=qwen2.windows_of(fields, [not turns for turns in turned]),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this decoder; the inverse of `read_config`, dtypes apart."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **llama.written_shape(config),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(config.turns(layer)) for layer in range(config.layers)],
        **qwen2.written_windows(config),
    }
