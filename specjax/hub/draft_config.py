"""What the `config.json` files of published drafts, which attach to a target, have in common."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from specjax.hub.families import base, llama, qwen
from specjax.models.attachment import Attachment, AttachmentConfig
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError

# The key under which our exports hold what no other program reads.
OURS = "specjax"
# The key that names the architecture in the files of the package `speculators`.
TYPE = "speculators_model_type"
FAMILIES = {"llama": llama.FAMILY, "qwen3": qwen.QWEN3}
OTHER_TARGET = "load the target that it was trained for"
# Why drafts of some targets are not exported.
EMBEDDINGS = "other programs read token embeddings without learned positions; take another target"
# Parts of the class names of drafts that attach to a target.
_DRAFTS = re.compile("Eagle|EAGLE|DFlash|DSpark|Medusa|MTP|Speculator|DraftModel")


class Format(NamedTuple):
    """An architecture of published drafts.

    Attributes:
      method: vLLM's name of it; `TYPE` has the same value.
      network: our class of it.
      classes: its class names in "architectures", each with the name of the layout.
      layouts: names of the layouts that are written, the default first.
      read: (fields, layout, target, *, vocab_size, vocabulary, own_embedding, states_after) -> our config.
      write: (config, layout, verifier) -> fields, see `eagle3_config.write`.
      tensor_name: (path, layout) -> the name of the tensor that holds our array at this path, keys joined by dots.
      most: (config) -> the number of tokens that engines are to draft.
    """

    method: str
    network: type[Attachment]
    classes: Mapping[str, str]
    layouts: tuple[str, ...]
    read: Callable[..., AttachmentConfig]
    write: Callable[..., dict[str, Any]]
    tensor_name: Callable[[str, str], str]
    most: Callable[[Any], int]


def is_draft(fields: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a draft that attaches to a target, of a known or another architecture."""
    names = fields.get("architectures")
    return TYPE in fields or (isinstance(names, list) and any(_DRAFTS.search(str(name)) for name in names))


def check_target(
    target: DecoderConfig, fields: Mapping[str, Any], *, width: int, vocab_size: int, layers: int | None = None
) -> None:
    """Raises UserError if a draft is for another target, by what differs: hidden size, tokenizer or number of layers.

    Args:
      layers: the target's number of layers, if the layout says it.
    """
    if width != target.width:
        raise UserError(
            f"the draft reads hidden states of size {width}, this target's have {target.width}; {OTHER_TARGET}"
        )
    if vocab_size != target.vocab_size:
        raise UserError(
            f"the draft is for a tokenizer of {vocab_size} ids, and this target has {target.vocab_size}; {OTHER_TARGET}"
        )
    layers = layers or (fields.get(OURS) or {}).get("target", {}).get("layers", target.layers)
    if layers != target.layers:
        raise UserError(
            f"the draft is for a target of {layers} layers, and this one has {target.layers}; {OTHER_TARGET}"
        )


def read_layers(described: Any) -> DecoderConfig:
    """The draft's layers as a decoder, in arbitrary dtypes, from its own fields or "transformer_layer_config"."""
    if not isinstance(described, Mapping) or described.get("model_type") not in FAMILIES:
        kind = described.get("model_type") if isinstance(described, Mapping) else described
        raise UserError(f"a draft's layer of type {kind!r} is not supported; the supported are {', '.join(FAMILIES)}")
    family: base.Family = FAMILIES[described["model_type"]]
    described = {name: value for name, value in described.items() if name != "architectures"}
    return family.read_config(
        {**described, "tie_word_embeddings": False}, param_dtype="float32", compute_dtype="float32"
    )


def with_layer(config: Any, layer: DecoderConfig) -> Any:
    """A draft's config with these sizes of its layers, None if they are the default."""
    same = {name: getattr(config.inner, name) for name in ("vocab_size", "family")}
    layer = config.computed_as_target(dataclasses.replace(layer, **same))
    return config if layer == config.inner else dataclasses.replace(config, layer=layer)
