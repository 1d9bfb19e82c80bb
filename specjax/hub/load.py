"""Reads a Hugging Face directory: `config.json` and safetensors, tensor by tensor."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.hub.families import (
    base,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    opt,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    t5,
)
from specjax.models.language_model import LanguageModel, Params
from specjax.models.table import model_of
from specjax.runtime import dtypes
from specjax.runtime.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# By `model_type`. A new family is one file with the members that llama.py has, and one entry here.
_ALL = (llama, mistral, qwen2, qwen3, phi3, smollm3, gemma, gemma2, gemma3, opt, gpt2, gpt_neox, t5)
FAMILIES = {family.MODEL_TYPE: family for family in _ALL}

_FLOATS = ("F64", "F32", "F16", "BF16")


def load(
    directory: str | Path,
    *,
    param_dtype: str = "float32",
    compute_dtype: str = "auto",
    shardings: Params | None = None,
) -> tuple[LanguageModel, Params]:
    """Reads the model in a Hugging Face directory.

    Args:
      directory: holds `config.json` and either `model.safetensors` or the shards that its index names.
      param_dtype: dtype in which the parameters are kept; what is stored otherwise is converted.
      compute_dtype: dtype of activations; "auto" is float32 on CPU and bfloat16 on accelerators.
      shardings: a tree like the parameters with a `jax.sharding.Sharding` for each; every process then reads only
        its own part of each tensor. None puts everything on the default device.

    Raises:
      UserError: if a file is missing or damaged, the config asks for what is not implemented, or the tensors are
        not those that the config describes.
    """
    directory = Path(directory)
    family, config = read_config(directory, param_dtype=param_dtype, compute_dtype=compute_dtype)
    decoder = model_of(config)
    wanted = family.tensors(config)
    outputs = base.fused_outputs(wanted)
    expected = decoder.abstract_params()
    with _open(directory) as stored:
        stored = _whole_names(stored, family)
        _check_names(directory, family, config, {tensor.name for tensor in wanted}, stored)
        params: Params = {}
        for tensor in wanted:
            shape = at(expected, tensor.path).shape
            sharding = None if shardings is None else at(shardings, tensor.path)
            file_shape = base.shape_in_file(tensor, shape, outputs)
            _check_tensor(stored[tensor.name], tensor.name, file_shape)
            array = _read(stored[tensor.name], tensor, shape, file_shape, dtypes.dtype_named(param_dtype), sharding)
            _put(params, tensor.path, array)
    return decoder, params


def read_config(directory: Path, *, param_dtype: str, compute_dtype: str):
    """The family of a directory and the DecoderConfig of its `config.json`. Raises UserError, naming the file."""
    path = directory / CONFIG_FILE
    fields = _read_json(path)
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise UserError(f"{path}: models of type {model_type!r} are not supported; the supported are {supported}")
    compute_dtype = dtypes.compute_dtype(compute_dtype)
    dtypes.dtype_named(param_dtype)
    try:
        config = FAMILIES[model_type].read_config(fields, param_dtype=param_dtype, compute_dtype=compute_dtype)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return FAMILIES[model_type], config


def at(tree: Params, path: tuple[str | int, ...]) -> Any:
    """The leaf of a nested dict at this path."""
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Params, path: tuple[str | int, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no {path}; name the directory of a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy or export it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; copy or export it again")
    return content


def _weight_files(directory: Path) -> list[Path]:
    """The one weights file, or the shards that the index names."""
    if (directory / WEIGHTS_FILE).exists():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.exists():
        raise UserError(
            f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE} in {directory}; "
            "weights are read in the safetensors format only, so convert other formats first"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise UserError(f'{index} has no "weight_map" from tensors to files beside it; copy it again')
    return [directory / name for name in sorted(set(weight_map.values()))]


@contextlib.contextmanager
def _open(directory: Path) -> Iterator[dict[str, Any]]:
    """Handles on the stored tensors by name: shape and dtype are known, the values are read when sliced."""
    from safetensors import SafetensorError, safe_open

    slices: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for path in _weight_files(directory):
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except FileNotFoundError:
                raise UserError(f"{path} is missing, though {INDEX_FILE} names it; copy it again") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged or cut short ({error}); copy or export it again") from None
            names = handle.keys()
            slices.update({name: handle.get_slice(name) for name in names})
        yield slices


def _whole_names(stored: dict[str, Any], family) -> dict[str, Any]:
    """The tensors by their whole names; some files, GPT-2's own among them, leave out the leading "transformer."."""
    inner, _, rest = family.EMBEDDING.partition(".")
    if family.EMBEDDING in stored or rest not in stored:
        return stored
    return {name if name == family.HEAD else f"{inner}.{name}": tensor for name, tensor in stored.items()}


def _check_names(directory, family, config, wanted: set[str], stored: dict[str, Any]) -> None:
    """Raises UserError unless the stored tensors are the wanted ones."""
    missing = sorted(wanted - set(stored))
    if missing:
        hint = ""
        if missing == [family.HEAD]:
            hint = f'; if its head is the embedding, {CONFIG_FILE} must say "tie_word_embeddings": true'
        raise UserError(
            f"the weights in {directory} lack {_some(missing)}{hint or f'; {CONFIG_FILE} describes others'}"
        )
    extra = {name for name in stored if name not in wanted and not name.endswith(family.IGNORED)}
    if config.tied_head and family.HEAD in extra:  # some writers store the tied head all the same
        head, embedding = stored[family.HEAD], stored[family.EMBEDDING]
        if head.get_shape() != embedding.get_shape() or not np.array_equal(head[:], embedding[:]):
            raise UserError(
                f"{family.HEAD} in {directory} differs from the embedding, though {CONFIG_FILE} says "
                '"tie_word_embeddings": true; correct whichever is wrong'
            )
        extra.remove(family.HEAD)
    if extra:
        raise UserError(
            f"the weights in {directory} hold {_some(sorted(extra))}, unknown to the model of {CONFIG_FILE}; "
            "take the config of these weights"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more tensors"


def _check_tensor(stored, name: str, shape: tuple[int, ...]) -> None:
    """Raises UserError unless the stored tensor has this shape and floats of a width that we read."""
    if tuple(stored.get_shape()) != shape:
        raise UserError(
            f"{name} has shape {stored.get_shape()} where {CONFIG_FILE} describes {list(shape)}; "
            "take the config of these weights"
        )
    if stored.get_dtype() not in _FLOATS:
        raise UserError(
            f"{name} is stored as {stored.get_dtype()}; quantised weights are not supported, "
            "take the checkpoint in float32, bfloat16 or float16"
        )


def _read(stored, tensor, shape: tuple[int, ...], file_shape: tuple[int, ...], dtype, sharding) -> jax.Array:
    """One parameter, turned and converted; only the parts that this process holds are read."""
    axis = base.output_axis(tensor, len(shape))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*i.indices(size)[:2]) for i, size in zip(index, shape, strict=True))
        index = tuple(reversed(index)) if tensor.transposed else index
        runs = base.runs_in_file(tensor, index[axis], file_shape[axis])
        values = [stored[(*index[:axis], run, *index[axis + 1 :])] for run in runs]
        values = values[0] if len(values) == 1 else np.concatenate(values, axis=axis)
        return np.ascontiguousarray(values.T if tensor.transposed else values).astype(dtype)

    if sharding is None:
        return jnp.asarray(part(tuple(slice(0, size) for size in shape)))
    return jax.make_array_from_callback(shape, sharding, part)
