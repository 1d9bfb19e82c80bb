"""The Qwen2 and Qwen2.5 family: Llama's layout with biases of query, key and value, and windows in some layers."""

from collections.abc import Sequence
from typing import Any

from specjax.hub.families import base, llama
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
HEAD, EMBEDDING, IGNORED, tensors = llama.HEAD, llama.EMBEDDING, llama.IGNORED, llama.tensors

# What the format gives to absent fields.
ABSENT = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_ONLY = {**llama.ONLY, "mlp_bias": (False, None), "use_mrope": (False, None)}

_KINDS = ("full_attention", "sliding_attention")


def windows_of(fields: dict[str, Any], windowed: Sequence[bool]) -> tuple[int, ...]:
    """The window of each layer, () where none has one.

    Args:
      windowed: which layers have the window where "layer_types" does not say.

    Raises:
      UserError: naming the field that is wrong.
    """
    window = 0
    if base.flag(fields, "use_sliding_window", absent=False):
        window = base.number(fields, "sliding_window", int, absent=0)
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [_KINDS[bool(window) and layer] for layer in windowed]
    if not isinstance(kinds, list) or len(kinds) != len(windowed) or any(kind not in _KINDS for kind in kinds):
        raise UserError(f'"layer_types" must have one of {", ".join(_KINDS)} for each layer, not {kinds!r}')
    if "sliding_attention" in kinds and not window:
        raise UserError(
            '"layer_types" names layers with a window, but there is none; '
            'give "sliding_window" and "use_sliding_window", or take the complete config.json'
        )
    return tuple(window * (kind == "sliding_attention") for kind in kinds) if "sliding_attention" in kinds else ()


def written_windows(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `windows_of`."""
    windows = [config.window(layer) for layer in range(config.layers)]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "layer_types": [_KINDS[bool(window)] for window in windows],
    }


def late_windows(fields: dict[str, Any], layers: int) -> tuple[int, ...]:
    """`windows_of` where the layers from "max_window_layers" on have one, unless "layer_types" says otherwise."""
    first = fields.get("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise UserError(f'"max_window_layers" must be a number of layers, not {first!r}')
    return windows_of(fields, [layer >= first for layer in range(layers)])


def written_late_windows(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `late_windows`; readers without "layer_types" get the first layer that has a window."""
    firsts = [layer for layer in range(config.layers) if config.window(layer)]
    return {**written_windows(config), "max_window_layers": firsts[0] if firsts else config.layers}


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic(fields, ARCHITECTURE, _ONLY)
    fields = {**ABSENT, **fields}
    shape = llama.shape_of(fields)
    return base.build(
        MODEL_TYPE,
        **shape,
        attention_bias=True,
        windows=late_windows(fields, shape["layers"]),
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
        **written_late_windows(config),
    }
