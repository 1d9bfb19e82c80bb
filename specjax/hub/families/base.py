"""Describes a family of checkpoints: its `config.json` fields and its tensors. Also reads and checks such fields."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from specjax.hub import file_layout
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

REQUIRED = object()  # in place of a default value


class Group(NamedTuple):
    """Attributes of our config that depend on several fields of `config.json`.

    Attributes:
      read: function from the fields, and the attributes read before, to attributes.
      write: its inverse: function from our config to fields.
      names: those of its fields that families without the group refuse.
    """

    read: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    names: tuple[str, ...] = ()


class Field(NamedTuple):
    """An attribute of our config and the field of `config.json` that holds its value.

    Attributes:
      attribute: name of the attribute of our config.
      name: name of the field; several attributes may have the same field.
      kind: see `value_of`.
      absent: the attribute's value if the field is missing or null, or a function that computes it from the attributes
        read before; a positive number of 0 is written as null.
    """

    attribute: str
    name: str
    kind: type | Mapping[Any, Any] = int
    absent: Any = REQUIRED

    def read(self, fields: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """The attribute's value. Raises UserError, naming the field, if it is missing or of the wrong type."""
        lazy = callable(self.absent) and fields.get(self.name) is None
        absent = self.absent(values) if lazy else self.absent
        return {self.attribute: value_of(fields, self.name, self.kind, absent=absent)}

    def write(self, config: Any) -> dict[str, Any]:
        """The inverse of `read`; of several names of a value, the first is written."""
        value = getattr(config, self.attribute)
        if isinstance(self.kind, Mapping):
            value = next((name for name, meaning in self.kind.items() if meaning == value), value)
        elif self.kind is tuple:
            value = list(value)
        return {self.name: (value or None) if self.kind in (int, float) else value}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints: how its `config.json` maps to our config, and its tensors to our parameter tree.

    Attributes:
      model_type: `model_type` in `config.json`.
      architecture: the only entry that "architectures" may have.
      fields: the fields and groups of fields of its `config.json`, in the order in which they are read and written.
      names: path of each array, with {} for the layer number -> tensor name in the file, see `file_layout.tensors`.
      groups: function from a config to the number of groups in fused tensors, see `file_layout.Part`.
      transposed: whether the file has kernels as [in, out], except the head's.
      ignored: name endings of tensors in old checkpoints that are not parameters, such as causal masks.
      only: field -> its supported values; any other value is an error (see also `_ONLY`).
      absent: values for missing fields, if they differ from those in `fields`. Null values are kept.
      always: attributes of our config that are the same for all models of the family.
      written: fields that are written with the same value for all models of the family.
      config_type: the class of our config.
    """

    model_type: str
    architecture: str
    fields: tuple[Field | Group, ...]
    names: Mapping[str, str]
    groups: Callable[[Any], int] = lambda config: 1
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

    def tensors(self, config: DecoderConfig) -> list[file_layout.Tensor]:
        """Every parameter array of a model with this config, see `file_layout.tensors`."""
        return file_layout.tensors(config, self.names, transposed=self.transposed, groups=self.groups(config))

    def read_config(self, fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> DecoderConfig:
        """Converts the fields of a `config.json` to our config.

        Raises:
          UserError: for a field that is missing, of the wrong type, or has an unsupported value.
        """
        architectures = fields.get("architectures")
        if architectures is not None and architectures != [self.architecture]:
            raise UserError(f'"architectures" is {architectures!r}, but only ["{self.architecture}"] is supported')
        known = {name for field in self.fields for name in ([field.name] if isinstance(field, Field) else field.names)}
        only = {name: allowed for name, allowed in _ONLY.items() if name not in known} | dict(self.only)
        for name, allowed in only.items():
            if name in fields and fields[name] not in allowed:
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


_LARGEST = 2**31 - 1  # of any number in a config.json
_MOST_LAYERS = 1000  # real models have fewer; a damaged number must not make us describe millions
# Names of activations in config.json -> our names. Of several for one activation, the first is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
    "relu": "relu",
}
QUERY_KEY_VALUE = ("attention.query", "attention.key", "attention.value")

# Fields that change what a model computes, and their supported values in families without such a field. Each may be
# absent. Dropout rates and initialiser scales are ignored, because they matter only in training.
_ONLY = {
    **dict.fromkeys(
        ("is_encoder_decoder", "add_cross_attention", "mlp_bias", "lm_head_bias", "use_mrope", "use_sliding_window"),
        (False, None),
    ),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1, None)),
    **dict.fromkeys(("attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping"), (None,)),
    **dict.fromkeys(("sliding_window", "layer_types", "clip_qkv"), (None,)),
    "use_bidirectional_attention": (False, None),
    # Of other routers of experts.
    "scoring_func": ("softmax", None),
    "topk_method": ("greedy", None),
    "norm_topk_prob": (True, None),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_layer_freq"), (1, None)),
    "routed_scaling_factor": (1, None),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "router_jitter_noise"), (0, None)),
}


def _is_positive(value: Any, types: Any) -> bool:
    return isinstance(value, types) and not isinstance(value, bool) and 0 < value <= _LARGEST


def value_of(fields: Mapping[str, Any], name: str, kind: type | Mapping[Any, Any], *, absent: Any = REQUIRED) -> Any:
    """The value of a field.

    Args:
      kind: int or float for a positive number, bool for true or false, tuple for a list of positive numbers, or a
        mapping from the values that are supported to their meanings.
      absent: what is returned if the field is missing or null.

    Raises:
      UserError: for a value of another kind, and if the field is missing without `absent`.
    """
    value = fields.get(name)
    if value is None and absent is not REQUIRED:
        return absent
    if value is None:
        raise UserError(f'"{name}" is missing; take the complete config.json of the checkpoint')
    if isinstance(kind, Mapping):
        if type(value) not in (str, bool) or value not in kind:
            listed = ", ".join(map(str, kind))
            raise UserError(f'"{name}" is {value!r}, which is not supported; only {listed} can be loaded')
        return kind[value]
    expected, fits = {
        int: ("a positive integer", _is_positive(value, int)),
        float: ("a positive number", _is_positive(value, (int, float))),
        bool: ("true or false", isinstance(value, bool)),
        tuple: (
            "a list of positive numbers",
            isinstance(value, list) and all(_is_positive(item, (int, float)) for item in value),
        ),
    }[kind]
    if not fits:
        raise UserError(f'"{name}" must be {expected}, not {value!r}')
    return tuple(map(float, value)) if kind is tuple else kind(value)


def agreed(places: Sequence[tuple[Mapping[str, Any], str]], kind: type, absent: Any = None) -> Any:
    """A number that may be at several places, each a dict and a key; `absent` if it is at none.

    Raises UserError if two places have different values.
    """
    values = {value_of(place, name, kind): name for place, name in reversed(places) if place.get(name) is not None}
    if len(values) > 1:
        (second, other), (first, name) = list(values.items())[-2:]
        where = "twice" if name == other else f'also as "{other}"'
        raise UserError(f'"{name}" is given {where} and differently, {first:g} and {second:g}; keep the right one')
    return next(iter(values), absent)
