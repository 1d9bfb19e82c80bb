"""What the family files share: the description of a tensor, and the reading of fields of a `config.json`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from specjax.models.config import DecoderConfig
from specjax.models.table import model_of
from specjax.runtime.errors import UserError


class Part(NamedTuple):
    """Where an array lies in a fused tensor of the file, along the axis of its outputs.

    That axis is `groups` runs of equal length; in each of them this array has the `size` entries from `start`.
    """

    start: int
    size: int
    groups: int = 1


class Tensor(NamedTuple):
    """One learned array: its name in the file, its path in our tree, and how it lies in the file.

    Attributes:
      name: several arrays have the same one where the file fuses them.
      path: in the tree of parameters.
      transposed: whether the file holds its transpose (kernels are [in, out] with us, mostly [out, in] in files).
      part: of a fused tensor; None where the tensor is this array alone.
    """

    name: str
    path: tuple[str | int, ...]
    transposed: bool = False
    part: Part | None = None


# From the name in the file, in which {} is the number of the layer, to the path below "blocks", number.
Names = Sequence[tuple[str, tuple[str, ...]]]


def list_tensors(
    config: DecoderConfig,
    *,
    first: Sequence[tuple[str, tuple[str, ...]]],
    layer: Names,
    last: Sequence[tuple[str, tuple[str, ...]]],
    transposed: bool = True,
    parts: Mapping[str, Part] | None = None,
) -> list[Tensor]:
    """The tensors of a decoder from tables of names, in the order of computation.

    The tables may name more than a model has (biases, a head of its own): what the config does not describe is
    left out. `Part` of an array is found in `parts` by its path joined with full stops.

    Raises:
      ValueError: if the tables leave out a parameter that the config describes.
    """
    entries = [*first, *numbered(layer, "blocks", config.layers), *last]
    return match_tensors(config, entries, transposed=transposed, parts=parts)


def numbered(names: Names, blocks: str, count: int) -> list[tuple[str, tuple[str | int, ...]]]:
    """The names of one layer for each of `count` layers, their paths below `blocks`."""
    return [(name.format(i), (blocks, i, *path)) for i in range(count) for name, path in names]


def match_tensors(
    config: DecoderConfig,
    entries: Sequence[tuple[str, tuple[str | int, ...]]],
    *,
    transposed: bool = True,
    parts: Mapping[str, Part] | None = None,
) -> list[Tensor]:
    """Those of the entries (name in the file, whole path) that the config describes; see `list_tensors`."""
    leaves = jax.tree_util.tree_leaves_with_path(model_of(config).abstract_params())
    known = {tuple(getattr(key, "key", None) for key in path) for path, _ in leaves}
    turned = lambda path: transposed and path[-1] == "kernel"
    in_layer = lambda path: path[2:] if len(path) > 2 and isinstance(path[1], int) else path
    key = lambda path: ".".join(in_layer(path))
    listed = [
        Tensor(name, path, turned(path) or path == ("unembedding", "kernel"), (parts or {}).get(key(path)))
        for name, path in entries
        if path in known
    ]
    missing = known - {tensor.path for tensor in listed}
    if missing:
        raise ValueError(f"No tensor is named for {sorted(map(str, missing))[0]}.")
    return listed


def fused_outputs(tensors: Sequence[Tensor]) -> dict[str, int]:
    """How many outputs each fused tensor of the file has, by its name."""
    outputs: dict[str, int] = {}
    for tensor in tensors:
        if tensor.part is not None:
            outputs[tensor.name] = outputs.get(tensor.name, 0) + tensor.part.size * tensor.part.groups
    return outputs


def output_axis(tensor: Tensor, dimensions: int) -> int:
    """The axis of the file's tensor along which it is fused: that of the outputs."""
    return 0 if tensor.transposed else dimensions - 1


def shape_in_file(tensor: Tensor, shape: tuple[int, ...], outputs: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the file's tensor that holds our array of this shape; `outputs` of `fused_outputs`."""
    turned = tuple(reversed(shape)) if tensor.transposed else shape
    if tensor.part is None:
        return turned
    axis = output_axis(tensor, len(shape))
    return (*turned[:axis], outputs[tensor.name], *turned[axis + 1 :])


def runs_in_file(tensor: Tensor, wanted: slice, outputs: int) -> list[slice]:
    """Where the entries `wanted` of our outputs lie among the file's; one run unless the parts are interleaved."""
    if tensor.part is None:
        return [wanted]
    start, size, groups = tensor.part
    if groups == 1:
        return [slice(start + wanted.start, start + wanted.stop)]
    runs = []
    for group in range(wanted.start // size, -(-wanted.stop // size)):
        low, high = max(wanted.start - group * size, 0), min(wanted.stop - group * size, size)
        offset = group * (outputs // groups) + start
        runs.append(slice(offset + low, offset + high))
    return runs


def number(fields: Mapping[str, Any], name: str, kind: type, *, absent: Any = None) -> Any:
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


def flag(fields: Mapping[str, Any], name: str, *, absent: bool) -> bool:
    """`fields[name]` as a bool; `absent` where it is missing or null."""
    value = fields.get(name)
    if value is None:
        return absent
    if not isinstance(value, bool):
        raise UserError(f'"{name}" must be true or false, not {value!r}')
    return value


# Fields that change what any model computes, with the values for which our arithmetic is the right one. Each may be
# absent. Dropout rates and initialiser scales are recipes of training, not of the model, and are not looked at.
_ONLY_EVERYWHERE = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "auto_map": (None,),
    "logit_scale": (1, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
}


def refuse_other_arithmetic(fields: Mapping[str, Any], architecture: str, only: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UserError, by its name, for a field whose value asks for arithmetic that the family here lacks.

    Args:
      architecture: the one entry that "architectures" may have.
      only: field -> the values that are right; a field that is absent is right.
    """
    architectures = fields.get("architectures")
    if architectures is not None and architectures != [architecture]:
        raise UserError(f'"architectures" is {architectures!r}, but only ["{architecture}"] is supported')
    for name, allowed in {**_ONLY_EVERYWHERE, **only}.items():
        value = fields.get(name)
        if name in fields and value not in allowed:
            raise UserError(f'"{name}" is {value!r}, which is not supported; only {_listed(allowed)} can be loaded')


def _listed(allowed):
    return " or ".join("null" if value is None else repr(value) for value in allowed)


# Names of activations in config.json that mean the same function.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation(fields: Mapping[str, Any], name: str, *, absent: str) -> str:
    """Our name for the activation that a field names."""
    value = fields.get(name, absent)
    if value not in _ACTIVATIONS:
        raise UserError(f'"{name}" is {value!r}, which is not supported; only {", ".join(_ACTIVATIONS)} can be loaded')
    return _ACTIVATIONS[value]


def written_activation(config: DecoderConfig) -> str:
    """The name of the config's activation in config.json."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)


def head_size(fields: Mapping[str, Any], width: int, heads: int) -> int:
    """H: "head_dim", or the width over the heads."""
    if fields.get("head_dim") is None and width % heads:
        raise UserError(f'"hidden_size" {width} is no multiple of "num_attention_heads" {heads}; give "head_dim"')
    return number(fields, "head_dim", int, absent=width // heads)


def build(family: str, config_type: type[DecoderConfig] = DecoderConfig, **values: Any) -> DecoderConfig:
    """The config, or a UserError for what no model can have."""
    try:
        return config_type(family=family, **values)
    except ValueError as error:
        raise UserError(f"no such decoder can be built: {str(error).rstrip('.')}; correct that field") from None
