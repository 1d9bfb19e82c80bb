"""Describes a family of checkpoints: its `config.json` fields and its tensors. Also reads and checks such fields."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from specjax.models.config import DecoderConfig
from specjax.models.table import model_of
from specjax.runtime.errors import UserError


class Part(NamedTuple):
    """The location of one of our arrays in a fused tensor of the file, along the tensor's output axis.

    The axis consists of `groups` runs of `length` entries; this array is entries `start .. start + size - 1` of each.
    """

    start: int
    size: int
    length: int
    groups: int = 1


class Tensor(NamedTuple):
    """One of our parameter arrays, and where and how the file stores it.

    Attributes:
      name: name of the tensor in the file; arrays that the file fuses share a name.
      path: path of the array in our parameter tree.
      transposed: whether the file has the last two axes swapped (our kernels are [out, in], as in most files).
      part: location in a fused tensor; None if the tensor in the file holds only this array.
      expert: the index of the tensor's expert on the first axis of our array; None if the array is not split so.
      stacked: whether the file's tensor has the experts on its first axis, as our array.
    """

    name: str
    path: tuple[str | int, ...]
    transposed: bool = False
    part: Part | None = None
    expert: int | None = None
    stacked: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape, in our layout, of what this tensor holds of our array of shape `shape`."""
        return shape if self.expert is None else shape[1:]

    def output_axis(self, dimensions: int) -> int:
        """The index of the output axis, along which tensors are fused, in the file's layout."""
        return dimensions - 1 if self.transposed else int(self.stacked)

    def swapped(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """What belongs to each axis of our layout, in the order of the file's, and the reverse."""
        return (*axes[:-2], axes[-1], axes[-2]) if self.transposed else axes

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the file's tensor that holds our array of shape `shape`."""
        lengths = self.swapped(self.shape(shape))
        if self.part is None:
            return lengths
        axis = self.output_axis(len(lengths))
        return (*lengths[:axis], self.part.length * self.part.groups, *lengths[axis + 1 :])

    def runs(self, wanted: slice) -> list[tuple[slice, slice]]:
        """Where the file's output axis holds slice `wanted` of our outputs; several runs if there are groups.

        Each run is a slice of the wanted outputs, counted from `wanted.start`, and the slice of the file.
        """
        if self.part is None:
            return [(slice(0, wanted.stop - wanted.start), wanted)]
        start, size, length, _ = self.part
        if size == 1:  # as many groups as outputs
            every = slice(wanted.start * length + start, wanted.stop * length, length)
            return [(slice(0, wanted.stop - wanted.start), every)]
        runs = []
        for group in range(wanted.start // size, -(-wanted.stop // size)):
            low, high = max(wanted.start, group * size), min(wanted.stop, (group + 1) * size)
            shift = group * (length - size) + start
            runs.append((slice(low - wanted.start, high - wanted.start), slice(low + shift, high + shift)))
        return runs


class Group(NamedTuple):
    """Attributes of our config that depend on several fields of `config.json`.

    Attributes:
      read: function from the fields, and the attributes read before, to attributes.
      write: its inverse: function from our config to fields.
    """

    read: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


class Field(NamedTuple):
    """An attribute of our config and the field of `config.json` that holds its value.

    Attributes:
      attribute: name of the attribute of our config.
      name: name of the field; several attributes may have the same field.
      kind: int and float stand for positive numbers, bool for true or false, str for a key of `values`.
      absent: the value if the field is missing or null, or a function that computes it from the attributes read before;
        None if the field is required. For str, a key of `values`, and null is an error.
      values: value of the field -> value of the attribute, if they differ; of several for one attribute, the first is
        written. By default, for str, the names of activations.
      null: the attribute's value for a field that is null, if that is not `absent`.
    """

    attribute: str
    name: str
    kind: type = int
    absent: Any = None
    values: Mapping[Any, Any] | None = None
    null: Any = None

    def read(self, fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """The attribute's value. Raises UserError, naming the field, if it is missing or of the wrong type."""
        if self.null is not None and fields.get(self.name, self) is None:
            return {self.attribute: self.null}
        if self.kind is str:
            return {self.attribute: choice(fields, self.name, self.absent, self.values or ACTIVATIONS)}
        lazy = callable(self.absent) and fields.get(self.name) is None
        read = value_of(fields, self.name, self.kind, absent=self.absent(values) if lazy else self.absent)
        return {self.attribute: self.values[read] if self.values else read}

    def write(self, config: Any) -> dict[str, Any]:
        """The inverse of `read`."""
        value = getattr(config, self.attribute)
        names = self.values or (ACTIVATIONS if self.kind is str else {})
        written = next((name for name, meaning in names.items() if meaning == value), value)
        return {self.name: None if self.null is not None and value == self.null else written}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints: how its `config.json` maps to our config, and its tensors to our parameter tree.

    Attributes:
      model_type: `model_type` in `config.json`.
      architecture: the only entry that "architectures" may have.
      fields: the fields and groups of fields of its `config.json`, in the order in which they are read and written.
      names: path of each array, with {} for the layer number -> tensor name in the file, with a second {} if there is
        one tensor for each expert. Entries for arrays that a model lacks (biases, an untied head) are ignored.
      parts: function from a config to the `Part` of each array in a fused tensor, by path as in `names`.
      transposed: whether the file has kernels as [in, out], except the head's. Kernels of all experts in one tensor are
        always so.
      ignored: name endings of tensors in old checkpoints that are not parameters, such as causal masks.
      only: field -> its supported values; any other value is an error.
      absent: values for missing fields, if they differ from those in `fields`. Null values are kept.
      always: attributes of our config that are the same for all models of the family.
      written: fields that are written with the same value for all models of the family.
      config_type: the class of our config.
    """

    model_type: str
    architecture: str
    fields: tuple[Field | Group, ...]
    names: Mapping[str, str]
    parts: Callable[[Any], Mapping[str, Part]] = lambda config: {}
    transposed: bool = False
    ignored: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config_type: type[DecoderConfig] = DecoderConfig

    @property
    def embedding(self) -> str:
        """The name of the embedding in the file; in some files `head` is a copy of it."""
        return self.names["embedding"]

    @property
    def head(self) -> str:
        """The name of the output head in the file."""
        return self.names["unembedding.kernel"]

    def tensors(self, config: DecoderConfig) -> list[Tensor]:
        """Every parameter array of a model with this config, in the order of `names`, layer by layer.

        Raises:
          ValueError: if `names` lacks a parameter that the config describes.
        """
        params, parts = model_of(config).abstract_params(), self.parts(config)
        missing = {
            tuple(getattr(key, "key", None) for key in path): leaf.ndim
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        tensors = []
        # Consecutive entries whose paths have the same first component are the arrays of one layer.
        for root, entries in itertools.groupby(self.names.items(), lambda entry: entry[0].partition(".")[0]):
            layered = list(entries)
            count = len(params.get(root, ())) if "{}" in layered[0][0] else 1
            for layer, (template, name) in itertools.product(range(count), layered):
                path = tuple(int(key) if key.isdigit() else key for key in template.format(layer).split("."))
                if path in missing:
                    dimensions, is_kernel = missing.pop(path), path[-1] == "kernel"
                    experts = range(config.experts) if name.count("{}") == 2 else (None,)
                    stacked = experts == (None,) and dimensions == {"kernel": 3, "bias": 2}.get(path[-1])
                    swapped = is_kernel and (stacked or self.transposed) and root != "unembedding"
                    tensors += [
                        Tensor(name.format(layer, expert), path, swapped, parts.get(template), expert, stacked)
                        for expert in experts
                    ]
        if missing:
            raise ValueError(f"No tensor is named for {sorted(map(str, missing))[0]}.")
        return tensors

    def read_config(self, fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
        """Converts the fields of a `config.json` to our config.

        Raises:
          UserError: for a field that is missing, of the wrong type, or has an unsupported value.
        """
        architectures = fields.get("architectures")
        if architectures is not None and architectures != [self.architecture]:
            raise UserError(f'"architectures" is {architectures!r}, but only ["{self.architecture}"] is supported')
        known = {field.name for field in self.fields if isinstance(field, Field)}
        for name, allowed in {**_ONLY_EVERYWHERE, **self.only}.items():
            if name not in known and name in fields and fields[name] not in allowed:
                listed = " or ".join("null" if value is None else repr(value) for value in allowed)
                raise UserError(f'"{name}" is {fields[name]!r}, which is not supported; only {listed} can be loaded')
        fields = {**self.absent, **fields}
        values = dict(self.always)
        for field in self.fields:
            values |= field.read(fields, values)
            if max(values.get("layers", 0), values.get("encoder_layers", 0)) > _MOST_LAYERS:
                raise UserError(f'"{field.name}" {values[field.attribute]} is more than any model has; correct it')
        try:
            return self.config_type(
                family=self.model_type, **values, param_dtype=param_dtype, compute_dtype=compute_dtype
            )
        except ValueError as error:
            raise UserError(f"no such decoder can be built: {str(error).rstrip('.')}; correct that field") from None

    def write_config(self, config: DecoderConfig) -> dict[str, Any]:
        """The fields of `config.json` that describe this model, without dtypes; the inverse of `read_config`."""
        written = {"architectures": [self.architecture], "model_type": self.model_type}
        for field in self.fields:
            written |= field.write(config)
        return written | self.written


# --- parts of a family's table of fields ---------------------------------------------------------------------------


def derived(values: Callable[[dict[str, Any]], dict[str, Any]]) -> Group:
    """A group of attributes that follow from those read before, without fields of their own."""
    return Group(lambda fields, attributes: values(attributes), lambda config: {})


def sizes(
    width: str = "hidden_size",
    mlp: str = "intermediate_size",
    layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    **mlp_options: Any,
) -> tuple[Field, ...]:
    """The sizes that every decoder has; the arguments are their names in the file, and options of the MLP's field."""
    return (
        Field("vocab_size", "vocab_size"),
        Field("width", width),
        Field("mlp_width", mlp, **mlp_options),
        Field("layers", layers),
        Field("heads", heads),
    )


def head_size(values: dict[str, Any], width: str, heads: str, remedy: str = "correct either") -> int:
    """The head size, which is width / heads; `width` and `heads` are field names for the error message."""
    if values["width"] % values["heads"]:
        raise UserError(f'"{width}" {values["width"]} is no multiple of "{heads}" {values["heads"]}; {remedy}')
    return values["width"] // values["heads"]


def one_size_heads(width: str = "hidden_size", heads: str = "num_attention_heads") -> Group:
    """As many key/value heads as heads, which share the width; the arguments are field names for the error message."""
    return derived(lambda values: {"kv_heads": values["heads"], "head_size": head_size(values, width, heads)})


def biases(name: str, absent: bool, *attributes: str) -> tuple[Field, ...]:
    """Attributes that have the same field, whether there are biases."""
    return tuple(Field(attribute, name, bool, absent) for attribute in attributes)


# --- parts of a family's table of tensors --------------------------------------------------------------------------


def layer_names(layers: str, modules: Mapping[str, str], ours: str = "blocks") -> dict[str, str]:
    """Entries of `Family.names` for the weights and biases of a layer's modules.

    Args:
      layers: start of the names in the file, before the layer number.
      modules: path of each module in our layer -> its name in the file's layer.
      ours: start of our paths, before the layer number.
    """
    kinds = lambda path: (("scale" if path.endswith("norm") else "kernel", "weight"), ("bias", "bias"))
    return {
        f"{ours}.{{}}.{path}.{kind}": f"{layers}.{{}}.{module}.{theirs}"
        for path, module in modules.items()
        for kind, theirs in kinds(path)
    }


def tensor_names(
    embedding: str, layers: str, modules: Mapping[str, str], norm: str, head: str, **others: str
) -> dict[str, str]:
    """The `names` of a decoder's family.

    Args:
      embedding: the embedding in the file, like all these names without ".weight".
      layers, modules: see `layer_names`.
      norm: the last norm.
      head: the output head.
      others: our name -> name in the file, for "positions" and for projections of the embedding.
    """
    projections = {path: f"{name}.weight" for path, name in others.items() if path == "positions"}
    projections |= {f"{path}.kernel": f"{name}.weight" for path, name in others.items() if path != "positions"}
    return {
        "embedding": f"{embedding}.weight",
        **projections,
        **layer_names(layers, modules),
        "norm.scale": f"{norm}.weight",
        "norm.bias": f"{norm}.bias",
        "unembedding.kernel": f"{head}.weight",
    }


def fused(sizes: Mapping[str, int], groups: int = 1) -> dict[str, Part]:
    """The parts of a fused tensor that holds these arrays of a layer in this order.

    Args:
      sizes: path below "blocks.{}", without "kernel" or "bias" -> number of outputs in each group.
      groups: number of times that the sequence is repeated.
    """
    starts = itertools.accumulate(sizes.values(), initial=0)
    return {
        f"blocks.{{}}.{path}.{kind}": Part(start, size, sum(sizes.values()), groups)
        for (path, size), start in zip(sizes.items(), starts, strict=False)
        for kind in ("kernel", "bias")
    }


# --- values --------------------------------------------------------------------------------------------------------

_LARGEST = 2**31 - 1  # of any number in a config.json
_MOST_LAYERS = 1000  # real models have fewer; a damaged number must not make us describe millions
_EXPECTED = {int: "a positive integer", float: "a positive number", bool: "true or false"}

# Names of activations in config.json -> our names. Of several for one activation, the first is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
    "relu": "relu",
}
QUERY_KEY_VALUE = ("attention.query", "attention.key", "attention.value")

# Fields that change what a model of any family computes, and their supported values. Each may be absent. Dropout rates
# and initialiser scales are ignored, because they matter only in training.
_ONLY_EVERYWHERE = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "logit_scale": (1, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
}


def value_of(fields: Mapping[str, Any], name: str, kind: type, *, absent: Any = None) -> Any:
    """`fields[name]` as a positive int or float, or as a bool.

    If the field is missing or null, `absent`. Raises UserError if that is None, and for values of another kind.
    """
    value = fields.get(name)
    if value is None:
        if absent is None:
            raise UserError(f'"{name}" is missing; take the complete config.json of the checkpoint')
        return absent
    number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not (isinstance(value, bool) if kind is bool else number and 0 < value <= _LARGEST):
        raise UserError(f'"{name}" must be {_EXPECTED[kind]}, not {value!r}')
    return kind(value)


def choice(fields: Mapping[str, Any], name: str, absent: str, names: Mapping[str, Any]) -> Any:
    """The meaning in `names` of a field's value; `absent` is the value of a missing field, and null is an error."""
    value = fields.get(name, absent)
    if not isinstance(value, str) or value not in names:
        raise UserError(f'"{name}" is {value!r}, which is not supported; only {", ".join(names)} can be loaded')
    return names[value]
