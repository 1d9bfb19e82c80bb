"""Reads and writes the `config.json` of DFlash drafts.

"z-lab" is the layout of the authors, which vLLM and SGLang load. "dflash_config.target_layer_ids" in it lists layers,
counted from 0, whose output is read: id i is `states_after` i + 1. The layout "speculators", of the package of this
name, lists the layers whose input is read; it is read here, and not written.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from specjax.hub import draft_config
from specjax.hub.draft_config import OTHER_TARGET
from specjax.hub.families import base, llama
from specjax.models.block_parallel import BlockParallel, BlockParallelConfig
from specjax.models.config import DecoderConfig
from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime.errors import UserError

ARCHITECTURE = "DFlashDraftModel"
# Fields that are read from "dflash_config", and those whose only supported value is the default.
_READ = ("mask_token_id", "target_layer_ids", "block_size", "mask_token")
_ONLY = {"sample_from_anchor": False, "use_aux_hidden_state": True, "causal": False, "use_qk_norm": True}
_LAST = (
    "the draft reads the state after layer {}, the target's last, and programs do not agree whether that state is "
    "normed; train a draft on states after earlier layers"
)
_OTHERS = {
    "project.kernel": "fc.weight",
    "hidden_norm.scale": "hidden_norm.weight",
    "norm.scale": "norm.weight",
}


def tensor_name(path: str, layout: str) -> str:
    """See `draft_config.Format`."""
    del layout
    if path in _OTHERS:
        return _OTHERS[path]
    _, layer, inside = path.split(".", 2)
    module, _, kind = inside.rpartition(".")
    return f"layers.{layer}.{llama.MODULES[module]}.{'bias' if kind == 'bias' else 'weight'}"


def read(
    fields: Mapping[str, Any],
    layout: str,
    target: DecoderConfig,
    *,
    vocab_size: int | None = None,
    vocabulary: DraftVocabulary | None = None,
    own_embedding: bool = False,
    states_after: Sequence[int] = (),
) -> BlockParallelConfig:
    """The config of a draft for this target; see `eagle3_config.read` for the arguments.

    Raises:
      UserError: for a draft of another target or of an unsupported architecture.
    """
    described, drafting = fields, fields.get("dflash_config")
    if layout == "speculators":
        described, drafting = fields.get("transformer_layer_config"), _in_layout_of_authors(fields)
    if not isinstance(drafting, Mapping):
        raise UserError(f'"dflash_config" must be an object, not {drafting!r}')
    layer = draft_config.read_layers(described)
    if not layer.qk_norm or layer.windows:
        raise UserError("the draft has layers with a window or without norms of queries and keys, not supported here")
    count = base.value_of(fields, "num_target_layers", int, absent=target.layers)
    size = vocab_size or layer.vocab_size
    draft_config.check_target(target, fields, width=layer.width, vocab_size=size, layers=count)
    if vocabulary is not None or base.value_of(fields, "draft_vocab_size", int, absent=size) != size:
        raise UserError("the draft has a reduced vocabulary, which is not supported; DFlash shares the target's head")
    if reason := _of_target(target):
        raise UserError(reason)
    if own_embedding:
        raise UserError("the draft has another embedding than the target's; load the target that it was trained for")
    for name, value in drafting.items():
        if name not in _READ and not (name in _ONLY and value == _ONLY[name]):
            raise UserError(f'"dflash_config" has "{name}": {value!r}, which is not supported; take another draft')
    after = _states_after(drafting, target.layers)
    if states_after and tuple(states_after) != after:
        raise UserError(f"states_after is {tuple(states_after)}, and the draft's files say {after}; leave it out")
    mask = drafting.get("mask_token_id")
    if type(mask) is not int or not 0 <= mask < target.vocab_size:
        raise UserError(
            f'"mask_token_id" is {mask!r}, and the target has the ids 0 .. {target.vocab_size - 1}; {OTHER_TARGET}'
        )
    block_size = base.value_of({**fields, **drafting}, "block_size", int)
    if fields.get("block_size", block_size) != block_size:
        raise UserError(f'"block_size" is {fields["block_size"]} and {block_size}; one of them is wrong')
    sizes = {"layers": layer.layers, "block_size": block_size, "mask_id": mask}
    return draft_config.with_layer(BlockParallelConfig(target, states_after=after, **sizes), layer)


def _in_layout_of_authors(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The "dflash_config" of a file in the layout "speculators"."""
    named = {"mask_token_id": "mask_token_id", "target_layer_ids": "aux_hidden_state_layer_ids"}
    found = {name: fields.get(theirs) for name, theirs in named.items()}
    if isinstance(ids := found["target_layer_ids"], list):
        found["target_layer_ids"] = [index - 1 if type(index) is int else index for index in ids]
    return found | {"sample_from_anchor": fields.get("sample_from_anchor", False)}


def _states_after(drafting: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    ids = drafting.get("target_layer_ids")
    if not (isinstance(ids, list) and ids and all(type(index) is int for index in ids)):
        raise UserError(f'"target_layer_ids" must be a list of layers, not {ids!r}')
    after = tuple(index + 1 for index in ids)
    if max(after) > layers:
        raise UserError(f"the draft reads the state after layer {max(after)} of {layers}; {OTHER_TARGET}")
    if layers in after:
        raise UserError(_LAST.format(layers))
    return after


def _of_target(target: DecoderConfig) -> str:
    """Why programs draft differently for a target, "" if they do not."""
    if target.learned_positions or target.embedding_width:
        return draft_config.EMBEDDINGS
    if target.embedding_scale != 1 or target.final_softcap or target.logit_divisor != 1:
        return (
            "programs do not agree whether its embeddings and logits are scaled and capped as the target's; take "
            "another target"
        )
    return ""


def obstacle(config: BlockParallelConfig) -> str:
    """Why the layout cannot hold a draft, or why programs that read it would compute another; "" if they would not."""
    target = config.target
    if config.vocabulary is not None:
        return "it has a reduced vocabulary, and the layout has none; train without block_parallel.vocabulary"
    if config.confidence:
        return "it has a confidence head, and the layout has none; train without block_parallel.confidence"
    if reason := _of_target(target):
        return reason
    if config.inner.rotary.size != config.inner.head_size:
        return "DFlash rotates all channels of a head, and this target does not; take another target"
    return _LAST.format(target.layers) if target.layers in config.states_after else ""


def write(config: BlockParallelConfig, layout: str, verifier: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json`, the inverse of `read`. The layout names no target, so `verifier` is not used.

    Raises:
      UserError: for a draft that the layout cannot hold, or that programs reading it would compute differently.
    """
    del layout, verifier
    target, inner = config.target, config.inner
    if reason := obstacle(config):
        raise UserError(reason)
    return {
        **draft_config.FAMILIES["qwen3"].write_config(inner),
        "architectures": [ARCHITECTURE],
        "block_size": config.block_size,
        "num_target_layers": target.layers,
        "dflash_config": {
            "mask_token_id": config.mask_id % target.vocab_size,
            "target_layer_ids": [after - 1 for after in config.states_after],
        },
        "torch_dtype": inner.param_dtype,
    }


FORMAT = draft_config.Format(
    method="dflash",
    network=BlockParallel,
    classes={ARCHITECTURE: "z-lab"},
    layouts=("z-lab",),
    read=read,
    write=write,
    tensor_name=tensor_name,
    most=lambda config: config.drafted,
)
