"""Quantised safetensors checkpoints: tensors that are dequantised where they are sliced, while a model is loaded.

To read another method, write a `Method` and add it to `METHODS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax.hub import fp8, int4, mxfp4, weights
from specjax.hub.json_files import read_json
from specjax.hub.weights import Stored
from specjax.runtime.errors import UserError

CONFIG_FILE = "config.json"
# Fields of `config.json` that describe the quantisation.
_FIELDS = ("quantization_config", "compression_config")


class Method(NamedTuple):
    """How a method stores a weight.

    Attributes:
      endings: part of a weight -> how the name of its tensor ends; the name is the weight's up to there.
      ending: how the name of the weight itself ends, which the unquantised checkpoint has.
      shape: function from the parts and the settings in `config.json` to the shape of the weight in an unquantised
        checkpoint. Raises UserError if the parts do not fit each other.
      values: function from the parts, the index of a slice of the weight, and the settings, to the float32 values of
        that slice.
    """

    endings: Mapping[str, str]
    ending: str
    shape: Callable[[Mapping[str, Stored], Mapping[str, Any]], tuple[int, ...]]
    values: Callable[[Mapping[str, Stored], tuple[slice, ...], Mapping[str, Any]], np.ndarray]


# By "quant_method" in `config.json`.
_PACKED = {"weight": ".qweight", "zeros": ".qzeros", "scales": ".scales"}
METHODS = {
    "mxfp4": Method({"blocks": "_blocks", "scales": "_scales"}, "", mxfp4.shape, mxfp4.values),
    "fp8": Method({"weight": ".weight", "scales": ".weight_scale_inv"}, ".weight", fp8.shape, fp8.values),
    "compressed-tensors": Method({"weight": ".weight", "scales": ".weight_scale"}, ".weight", fp8.shape, fp8.values),
    "gptq": Method({**_PACKED, "groups": ".g_idx"}, ".weight", int4.gptq_shape, int4.gptq_values),
    "awq": Method(_PACKED, ".weight", int4.awq_shape, int4.awq_values),
}
# Endings of tensors that only quantised activations or caches need, and zero points, which are 0 for floats.
_UNUSED = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".weight_zero_point")


@dataclasses.dataclass(frozen=True)
class Dequantised:
    """A quantised weight; it is read like `weights.Stored`.

    Attributes:
      name: name of the weight in an unquantised checkpoint.
      shape: its shape there.
      parts: the tensors that store it.
      method: how they do.
      settings: of the method, in `config.json`.
      dtype: the dtype that `param_dtype="auto"` takes it for; bfloat16 holds MXFP4's values exactly.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Stored]
    method: Method
    settings: Mapping[str, Any]
    dtype: str = "BF16"

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The float32 values of a slice."""
        return self.method.values(self.parts, index, self.settings)


def method_of(fields: Mapping[str, Any]) -> tuple[Method | None, Mapping[str, Any]]:
    """The method and the settings in a `config.json`; None for an unquantised model. Raises UserError if unknown."""
    for name in _FIELDS:
        settings = fields.get(name)
        if settings is None:
            continue
        method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
        if not isinstance(method, str) or method not in METHODS:
            raise UserError(
                f'"{name}" says that the weights are quantised (method {method!r}), which is not supported; take the '
                f"checkpoint in float32, bfloat16 or float16, as a GGUF file, or quantised by {', '.join(METHODS)}"
            )
        return METHODS[method], settings
    return None, {}


def stored_in(directory: Path) -> dict[str, Stored | Dequantised]:
    """Every tensor of the directory's weights, with quantised weights as `Dequantised`; no values are read.

    Raises:
      UserError: see `weights.stored_in`, and for parts that are missing or do not fit each other.
    """
    stored = weights.stored_in(directory)
    method, settings = method_of(read_json(directory / CONFIG_FILE))
    if method is None:
        return stored
    result: dict[str, Stored | Dequantised] = {}
    grouped: dict[str, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        if name.endswith(_UNUSED):
            continue
        part = next((part for part, ending in method.endings.items() if name.endswith(ending)), None)
        if part is None:
            result[name] = tensor
        else:
            grouped.setdefault(name.removesuffix(method.endings[part]) + method.ending, {})[part] = tensor
    for name, parts in grouped.items():
        if list(parts) == ["weight"] and name in stored and stored[name].dtype in weights.FLOATS:
            result[name] = stored[name]  # a weight that is not quantised, such as a norm's
            continue
        for part, ending in method.endings.items():
            if part not in parts:
                raise UserError(
                    f"{name} in {directory} lacks its {part} ({name.removesuffix(method.ending)}{ending}); copy the "
                    "checkpoint again"
                )
        result[name] = Dequantised(name, method.shape(parts, settings), parts, method, settings)
    return result
