"""Writes a model as a Hugging Face directory that transformers and `hub.load` read."""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.hub import file_layout, tokenizer_files, weights
from specjax.hub import load as hub_load
from specjax.hub.tokenizer import Tokenizer
from specjax.models import vocabulary
from specjax.models.language_model import LanguageModel, Params
from specjax.runtime.dtypes import check_trained
from specjax.runtime.errors import UserError

# What `vllm serve --speculative-config` takes.
ENGINE_FILE = "speculative_config.json"
FILES = (
    hub_load.CONFIG_FILE,
    weights.FILE,
    tokenizer_files.GENERATION_FILE,
    ENGINE_FILE,
    vocabulary.FILE,
    *tokenizer_files.FILES,
)
# File names of the weights of a model with several shards.
_SHARDED = re.compile(re.escape(weights.INDEX_FILE) + r"|model-\d{5}-of-\d{5}\.safetensors")
# The usual limit of Hugging Face; common file systems and hubs accept such files.
MAX_SHARD_BYTES = 5 * 10**9


def save(
    directory: str | Path,
    decoder: LanguageModel,
    params: Params,
    tokenizer: Tokenizer,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the model and its tokenizer; parameters are stored exactly, in the dtype of `decoder.config`.

    Everything is written to a temporary folder next to `directory`, read back and compared, and only then moved there
    in place of an earlier export. The host holds one shard at a time, however the parameters are sharded.

    Args:
      max_shard_bytes: maximum size of a weights file. A larger model is split over several files with an index in
        Hugging Face's format; a single tensor that is larger gets its own file.

    Raises:
      UserError: if the directory holds other files or cannot be written, the tokenizer has more ids than the model, or
        the parameters are not those of the decoder.
    """
    config = decoder.config
    check_trained("param_dtype of the model to save", config.param_dtype)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only {config.vocab_size}; "
            "save the model with the tokenizer it was trained with"
        )
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    _check_params(decoder, params)
    with replacing(directory, lambda name: name in FILES or bool(_SHARDED.fullmatch(name))) as new:
        _write(new, config, tokenizer)
        if (drafted := len(decoder.predicts)) > 1:  # PARD
            engine = {"method": "draft_model", "model": str(Path(directory).absolute()), "parallel_drafting": True}
            write_json(new / ENGINE_FILE, engine | {"num_speculative_tokens": drafted})
        _write_weights(new, decoder, params, max_shard_bytes)


@contextlib.contextmanager
def replacing(directory: str | Path, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """A context with an empty folder to write to, which then takes the place of `directory`.

    Args:
      is_ours: whether a file of this name belongs to an earlier export.

    Raises:
      UserError: if the directory holds other files, or cannot be written.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        if not directory.is_dir():
            raise UserError(f"{directory} is a file; name a directory to export to")
        others = sorted(entry.name for entry in directory.iterdir() if not is_ours(entry.name))
        if others:
            raise UserError(f"{directory} holds files of another kind ({others[0]}); export to a directory of its own")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise UserError(f"{directory.parent} cannot be written ({error}); choose another place") from None
    try:
        (temporary / "new").mkdir()
        yield temporary / "new"
        _replace(directory, temporary)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error}); make room or choose another place") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_params(decoder: LanguageModel, params: Params) -> None:
    """Raises UserError unless the parameters are the decoder's."""
    leaves = lambda tree: {
        (jax.tree_util.keystr(path), leaf.shape, np.dtype(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    wrong = sorted(path for path, *_ in leaves(decoder.abstract_params()) ^ leaves(params))
    if wrong:
        raise UserError(
            f"the parameter at {wrong[0]} is not what the config describes; save a model with its own parameters"
        )


def _write_weights(directory: Path, decoder: LanguageModel, params: Params, max_shard_bytes: int) -> None:
    """Writes the tensors shard by shard, each read back and compared before the next is fetched."""
    listed = hub_load.FAMILIES[decoder.config.family].tensors(decoder.config)
    shapes = decoder.abstract_params()
    sizes: dict[str, int] = {}
    for tensor in listed:
        leaf = hub_load.at(shapes, tensor.path)
        size = math.prod(tensor.shape(leaf.shape)) * leaf.dtype.itemsize
        sizes[tensor.name] = sizes.get(tensor.name, 0) + size
    shards = _shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        alone = len(shards) == 1
        path = directory / (weights.FILE if alone else f"model-{number + 1:05}-of-{len(shards):05}.safetensors")
        _write_shard(path, [tensor for tensor in listed if tensor.name in names], params)
        weight_map.update(dict.fromkeys(names, path.name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / weights.INDEX_FILE, index)
    _check_description(directory, decoder.config, set(sizes))


def _write_shard(path: Path, listed: Sequence[file_layout.Tensor], params: Params) -> None:
    # A separate function, so that its tensors are freed before the next shard's are fetched.
    from safetensors.numpy import save_file

    tensors = _tensors(listed, params)
    save_file(tensors, path, metadata={"format": "pt"})
    _check_tensors(path, tensors)


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Splits tensor names, in order, into shards; a shard ends before the tensor that would exceed `limit` bytes."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _tensors(listed: Sequence[file_layout.Tensor], params: Params) -> dict[str, np.ndarray]:
    """The tensors as numpy arrays in the file's layout, by their names in the file."""
    tensors: dict[str, np.ndarray] = {}
    fetched: dict[tuple, np.ndarray] = {}
    for tensor in listed:
        if tensor.path not in fetched:
            fetched = {tensor.path: _on_host(hub_load.at(params, tensor.path))}
        values = fetched[tensor.path]
        values = values if tensor.expert is None else values[tensor.expert]
        # safetensors writes bytes in memory order, so a transposed view must be made contiguous first.
        laid_out = np.ascontiguousarray(values.transpose(tensor.swapped(tuple(range(values.ndim)))))
        if tensor.part is None:
            tensors[tensor.name] = laid_out
            continue
        axis = tensor.output_axis(values.ndim)
        fused = tensors.setdefault(tensor.name, np.empty(tensor.shape_in_file(values.shape), values.dtype))
        for ours, run in tensor.runs(slice(0, laid_out.shape[axis])):
            fused[(slice(None),) * axis + (run,)] = laid_out[(slice(None),) * axis + (ours,)]
    return tensors


def _on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The array as numpy, joined from this process's devices. Raises ValueError if these do not hold all of it."""
    if isinstance(array, np.ndarray):
        return array
    if not (array.is_fully_addressable or array.is_fully_replicated):
        raise ValueError("A part of the parameters is held by other processes; gather them first.")
    values, done = np.empty(array.shape, array.dtype), set()
    for shard in array.addressable_shards:
        bounds = tuple(i.indices(size) for i, size in zip(shard.index, array.shape, strict=True))
        if bounds not in done:
            # Fetch a copy, because JAX caches the fetched values of an array on the host until it is deleted.
            values[shard.index] = np.asarray(jnp.copy(shard.data))
            done.add(bounds)
    return values


def _write(directory: Path, config, tokenizer) -> None:
    tokenizer.save(directory)
    eos = list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else tokenizer.eos_ids[0]
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}
    fields = {**hub_load.FAMILIES[config.family].write_config(config), **special, "torch_dtype": config.param_dtype}
    if config.draft_vocabulary is not None:
        fields["draft_vocab_size"] = len(config.draft_vocabulary)
        config.draft_vocabulary.save(directory / vocabulary.FILE)
    if config.mask_id is not None:
        fields[hub_load.MASK_FIELD] = config.mask_id
    start = {key: fields[key] for key in ("decoder_start_token_id",) if key in fields}
    write_json(directory / hub_load.CONFIG_FILE, fields)
    write_json(directory / tokenizer_files.GENERATION_FILE, {**special, **start})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file as all files of an export are."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Raises RuntimeError unless the file holds exactly these bits; reads one tensor at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as stored:
        for name, values in tensors.items():
            again = stored.get_tensor(name)
            same = (again.dtype, again.shape) == (values.dtype, values.shape)
            if not same or not np.array_equal(_bytes(again), _bytes(values)):
                raise RuntimeError(f"The export of {name} does not read back bit for bit.")


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.uint8)


def _check_description(directory: Path, config, names: set[str]) -> None:
    """Raises RuntimeError unless the files describe this config and hold these tensors and no others."""
    _, described = hub_load.read_config(directory, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)
    if described != config:
        raise RuntimeError(f"The export reads back as {described}, not as {config}.")
    if set(weights.stored_in(directory)) != names:
        raise RuntimeError("The export's shards do not hold the model's tensors.")


def _replace(directory: Path, temporary: Path) -> None:
    """Moves `temporary/new` to `directory`; restores the previous content if that fails."""
    if directory.exists():
        os.rename(directory, temporary / "old")
    try:
        os.rename(temporary / "new", directory)
    except OSError:
        if (temporary / "old").exists():
            os.rename(temporary / "old", directory)
        raise
