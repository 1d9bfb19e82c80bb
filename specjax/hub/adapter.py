"""Reads and writes adapters: trained attachments of a target (see `models.attachment`), each in its own directory."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr
from jaxtyping import Array, Float

from specjax.hub import dflash_config, draft_config, draft_files, weights
from specjax.hub import load as hub_load
from specjax.hub import save as hub_save
from specjax.hub.json_files import read_json, reading
from specjax.hub.location import locate
from specjax.models.attachment import Attachment
from specjax.models.block_parallel import BlockParallel
from specjax.models.language_model import LanguageModel, Params
from specjax.models.table import ATTACHMENTS, make_attachment
from specjax.runtime import processes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError, prefixed
from specjax.runtime.extensions import place_of

CONFIG_FILE = "adapter_config.json"
_FORMAT = "specjax-adapter-1"
# Fields of the file that are not options of the attachment.
_FIELDS = ("format", "type", "param_dtype", "target")
# Number of values of each parameter that are hashed for the fingerprint.
_SAMPLE = 64
# Fields of a model's config that are always hashed. Others came later, and are hashed if they differ from the default,
# so that new fields leave the fingerprints in existing files valid.
_HASHED = """
vocab_size width layers heads kv_heads head_size mlp_width max_positions rotary norm_epsilon tied_head family norm
activation gated_mlp order final_norm attention_bias output_bias mlp_bias qk_norm learned_positions position_offset
local_rotary rotary_layers windows query_scale attention_softcap final_softcap embedding_scale embedding_width
"""


def fingerprint(decoder: LanguageModel, params: Params) -> str:
    """A hash of a model's config and of some values of each parameter, by which an attachment identifies its target.

    Values are rounded to bfloat16 first, so that a checkpoint has the same fingerprint in float32 and bfloat16. Its
    fingerprint in float16 may differ.
    """
    fields, hashed = dataclasses.asdict(decoder.config), _HASHED.split()
    for field in dataclasses.fields(decoder.config):
        is_new_default = field.name not in hashed and getattr(decoder.config, field.name) == field.default
        if is_new_default or field.name in ("param_dtype", "compute_dtype", "remat"):
            del fields[field.name]
    if "draft_vocabulary" in fields:
        fields["draft_vocabulary"] = decoder.vocabulary.ids.tolist()
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    samples = processes.fetch(_samples(params))  # collective: every process calls this
    for path, values in jax.tree_util.tree_leaves_with_path(samples):
        digest.update(_name(path).encode())
        digest.update(np.asarray(values).tobytes())
    return digest.hexdigest()[:32]


@jax.jit
def _samples(params: Params) -> Params:
    middle = lambda leaf: leaf[tuple(size // 2 for size in leaf.shape[:-1])]
    sample = lambda path, leaf: middle(_in_file(path, leaf))[:_SAMPLE].astype(jnp.bfloat16)
    return jax.tree_util.tree_map_with_path(sample, params)


def _in_file(path, leaf: Any) -> Any:
    """The array as the files have it, or the inverse: there, kernels are [in, out]."""
    return leaf.T if path[-1].key == "kernel" else leaf


@dataclasses.dataclass(frozen=True)
class LoadedAttachment:
    """An attachment (an adapter or heads) with its parameters.

    Attributes:
      network: the attachment without parameters; `hub.model.Model` has this attribute too.
      params: its parameters.
      target: fingerprint of the target that it was trained with; "" for a draft from other tools, which has none.
    """

    network: Attachment
    params: Any
    target: str

    def check(self, target: str) -> None:
        """Raises UserError if the fingerprint is known and `target` is another one."""
        if self.target and target != self.target:
            raise UserError(
                f"this adapter belongs to another target (fingerprint {self.target[:8]}, this model's is "
                f"{target[:8]}); load the target with which it was trained, as float32 or bfloat16"
            )


def save(directory: str | Path, loaded: LoadedAttachment, *, target_name: str | None = None) -> None:
    """Writes an EAGLE-3 or block-parallel draft as vLLM reads it (see `save_for_engines`, also for `target_name`), and
    other attachments to `adapter.safetensors` and `adapter_config.json`; replaces what an earlier call wrote.

    A block-parallel draft that vLLM's files cannot hold is written as other attachments are; the log says why.

    Raises:
      UserError: if the directory holds other files or cannot be written.
    """
    network = loaded.network
    if draft_files.format_of(network) is None:
        return _save_ours(directory, loaded)
    ours = type(network) is BlockParallel and network.config.layer is None  # it has a file of ours too
    if ours and (reason := dflash_config.obstacle(network.config)):
        logging.warning("%s is written for specjax alone: %s", directory, reason)
        return _save_ours(directory, loaded)
    save_for_engines(directory, loaded, target_name=target_name)


def _save_ours(directory: str | Path, loaded: LoadedAttachment) -> None:
    network, config = type(loaded.network), loaded.network.config
    leaves = jax.tree_util.tree_leaves_with_path(loaded.params)
    fields = {
        "format": _FORMAT,
        "type": {network: name for name, network in ATTACHMENTS.items()}.get(network, "") or place_of(network),
        **{name: getattr(config, name) for name in config.options() if name != "vocabulary"},
        **({} if config.vocabulary is None else {"vocabulary": config.vocabulary.ids.tolist()}),
        "param_dtype": str(leaves[0][1].dtype),
        "target": _about_target(loaded),
    }
    arrays = {_name(path): np.ascontiguousarray(_in_file(path, np.asarray(leaf))) for path, leaf in leaves}
    _write(directory, {CONFIG_FILE: fields}, weights.SPECJAX_ADAPTER_FILE, arrays)


def _about_target(loaded: LoadedAttachment) -> dict[str, Any]:
    target = loaded.network.config.target
    return {"fingerprint": loaded.target, "family": target.family, "layers": target.layers}


def _write(
    directory: str | Path, contents: Mapping[str, Any], tensors_file: str, tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes JSON files and one file of tensors in place of those of an earlier call."""
    from safetensors.numpy import save_file

    with hub_save.replacing(directory, (*contents, tensors_file).__contains__) as new:
        save_file(dict(tensors), new / tensors_file, metadata={"format": "pt"})
        for name, content in contents.items():
            hub_save.write_json(new / name, content)


def save_for_engines(
    directory: str | Path,
    loaded: LoadedAttachment,
    *,
    layout: str = "",
    target_name: str | None = None,
    embedding: Float[Array, "V D"] | None = None,
) -> None:
    """Writes an EAGLE-3 or block-parallel draft as other programs load it, with `speculative_config.json` for vLLM.

    Args:
      layout: for EAGLE-3 "speculators" (the default) for vLLM, or "sglang" for SGLang, SpecForge and vLLM; for a
        block-parallel draft "z-lab", the layout of DFlash.
      target_name: path or hub name of the target, which readers of the layout "speculators" may look up.
      embedding: the target's, to be stored with the draft, as the package `speculators` expects EAGLE-3 drafts; engines
        do without.

    Raises:
      UserError: for other attachments, if the layout cannot hold the draft, or if the directory holds other files or
        cannot be written.
    """
    directory, network = Path(directory).absolute(), loaded.network
    config, form = network.config, draft_files.format_of(network)
    if form is None:
        raise UserError(
            "other programs load EAGLE-3 and block-parallel drafts only; save this adapter with api.save_adapter"
        )
    layout = layout or form.layouts[0]
    if layout not in form.layouts:
        raise UserError(f'the layout of this draft must be one of {", ".join(form.layouts)}, not "{layout}"')
    arrays = {_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.params)}
    if embedding is not None:
        if type(network) is BlockParallel:
            raise UserError("the layout of DFlash holds no embedding; leave embedding out")
        arrays.setdefault("embedding", np.asarray(embedding))
    verifier = {"name_or_path": target_name, "architectures": [hub_load.FAMILIES[config.target.family].architecture]}
    with prefixed("the draft cannot be exported: "):
        fields = form.write(config, layout, verifier)
    fields[draft_config.OURS] = {**fields.get(draft_config.OURS, {}), "target": _about_target(loaded)}
    with reading("its description"):
        if form.read(fields, layout, config.target, vocabulary=config.vocabulary).inner != config.inner:
            raise RuntimeError(f"The export of {config} reads back differently.")
    tensors = {form.tensor_name(path, layout): np.ascontiguousarray(values) for path, values in arrays.items()}
    if config.vocabulary is not None:
        ids = config.vocabulary.ids.astype(np.int64)
        tensors |= {"d2t": ids - np.arange(len(ids)), "t2d": np.isin(np.arange(config.target.vocab_size), ids)}
    engine = {"method": form.method, "model": str(directory), "num_speculative_tokens": form.most(config)}
    _write(directory, {hub_load.CONFIG_FILE: fields, hub_save.ENGINE_FILE: engine}, weights.FILE, tensors)


def holds_one(directory: str | Path) -> bool:
    """Whether the directory, here or on the hub (see `locate`), holds an adapter of specjax or a published draft that
    attaches to a target."""
    directory = locate(directory)
    return (directory / weights.SPECJAX_ADAPTER_FILE).is_file() or draft_files.holds_one(directory)


def load(
    directory: str | Path,
    target: LanguageModel,
    target_params: Params | None = None,
    *,
    states_after: Sequence[int] = (),
    shardings=None,
) -> LoadedAttachment:
    """Reads an adapter and checks that its sizes match the target's; the caller checks the fingerprint.

    Args:
      directory: what `save` wrote, or a published EAGLE-3 or DFlash draft, in a directory or on the Hugging Face hub.
      target_params: with them, a draft that stores a copy of the target's embedding shares it with the target.
      states_after: of an EAGLE-3 draft, the numbers of layers after which it reads the target's states, where its files
        do not say it; () where they do.
      shardings: a function from the attachment to a tree of shardings; None puts it on the default device.

    Raises:
      UserError: for a missing or damaged file, and for an adapter whose sizes differ from the target's.
    """
    directory = locate(directory)
    if draft_files.holds_one(directory):
        adapter, trained_with, stored = draft_files.describe(directory, target.config, target_params, states_after)
        form, in_file = draft_files.format_of(adapter), lambda path, leaf: leaf
    else:
        adapter, trained_with = describe(directory, target, states_after)
        stored, form, in_file = weights.tensors_in(directory / weights.SPECJAX_ADAPTER_FILE), None, _in_file
    abstract = adapter.abstract_params()
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    shapes = {_name(path): in_file(path, np.empty(leaf.shape)).shape for path, leaf in leaves}
    values = draft_files.read_arrays(directory, form, stored, shapes)
    dtype = dtype_named(adapter.config.target.float_dtype)
    in_memory = lambda path, _: jnp.asarray(in_file(path, values[_name(path)])).astype(dtype)
    params = jax.tree_util.tree_map_with_path(in_memory, abstract)
    params = params if shardings is None else jax.device_put(params, shardings(adapter))
    return LoadedAttachment(adapter, params, trained_with)


def describe(directory: str | Path, target: LanguageModel, states_after: Sequence[int] = ()) -> tuple[Attachment, str]:
    """The attachment in a directory for this target, and the fingerprint of the target it belongs to, "" if unknown.

    In `adapter_config.json`, `type` is a key of `ATTACHMENTS`, or "path/to/file.py:Name" of a user's own class; without
    it, the type is "adapter".

    Raises:
      UserError: for a file that is missing, damaged or not from specjax, or whose class cannot be found.
    """
    directory = locate(directory)
    if draft_files.holds_one(directory):
        return draft_files.describe(directory, target.config, states_after=states_after)[:2]
    path, fields = directory / CONFIG_FILE, read_json(directory / CONFIG_FILE)
    if fields.get("format") != _FORMAT:
        raise UserError(f'{path} has no "format": "{_FORMAT}"; name a directory that specjax wrote an adapter to')
    options = {name: value for name, value in fields.items() if name not in _FIELDS}
    with prefixed(f"{path}: "), reading("the description"):
        attachment = make_attachment(fields.get("type", "adapter"), target.config, options)
        attachment.abstract_params()  # damaged values of the description that are no sizes
        if states_after and tuple(states_after) != attachment.taps:
            raise UserError(f"states_after is {tuple(states_after)}, and the file says {attachment.taps}; leave it out")
        return attachment, fields["target"]["fingerprint"]


def _name(path) -> str:
    return keystr(path, simple=True, separator=".")
