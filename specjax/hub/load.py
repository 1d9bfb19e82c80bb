"""Loads a model, tensor by tensor, from `config.json` and safetensors files or from a GGUF file."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from specjax.hub import draft_config, file_layout, gguf_file, gguf_models, json_files, quantised, weights
from specjax.hub.families import base, experts, gemma, gpt2, gpt_neox, gpt_oss, llama, opt, phi3, qwen, smollm3
from specjax.hub.families.t5 import FAMILY as T5
from specjax.hub.gguf_file import GgufTensor
from specjax.hub.location import is_gguf, locate
from specjax.hub.quantised import CONFIG_FILE, Dequantised
from specjax.hub.weights import Stored
from specjax.models import vocabulary
from specjax.models.config import DecoderConfig
from specjax.models.language_model import LanguageModel, Params
from specjax.models.quantised import Quantised, quantise
from specjax.models.table import model_of
from specjax.runtime import dtypes
from specjax.runtime.errors import UserError, prefixed

# The field of PARD's authors, which vLLM reads too, for the id of `DecoderConfig.mask_id`.
MASK_FIELD = "pard_token"

# All families. A new family needs a file with a `base.Family`, and an entry here.
_ALL = (
    *(llama.FAMILY, llama.MISTRAL, qwen.QWEN2, qwen.QWEN3, phi3.FAMILY, smollm3.FAMILY, llama.OLMO2, llama.GRANITE),
    *(experts.MIXTRAL, experts.QWEN2_MOE, experts.QWEN3_MOE, gpt_oss.FAMILY),
    *(gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, opt.FAMILY, gpt2.FAMILY, gpt_neox.FAMILY, T5),
)
FAMILIES = {family.model_type: family for family in _ALL}

# Endings of tensor names in files of GPTQ, AWQ, compressed-tensors, bitsandbytes and 8-bit floats.
_QUANTISED = (
    *(".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".input_scale"),
    *(".SCB", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
)
# What describes the tensors of a safetensors and of a GGUF file, and what to do if they do not match.
_DESCRIBED = {False: (CONFIG_FILE, "take the config of these weights"), True: ("its metadata", "convert it again")}
AnyStored = Stored | GgufTensor | Dequantised
# Bytes read and converted at a time: much less than a tensor, and small enough for the processor's cache.
_PIECE_BYTES = 1 << 20
# Bytes of floats that are read and quantised at a time, if the parameters are kept in integers.
_QUANTISED_BYTES = 1 << 26


class Loaded(NamedTuple):
    """A loaded parameter.

    Attributes:
      path: its path in the parameter tree.
      array: the parameter, on its devices.
      file_bytes: for each of this process's devices, bytes read from the file for its part (of a quantised weight:
        bytes of the dequantised values). A part that several devices hold is read once and counted for each of them.
    """

    path: tuple[str | int, ...]
    array: jax.Array
    file_bytes: dict[jax.Device, int]


def load(
    directory: str | Path,
    *,
    param_dtype: str = "auto",
    compute_dtype: str = "auto",
    shardings: Params | None = None,
) -> tuple[LanguageModel, Params]:
    """Reads a model.

    Args:
      directory: holds `config.json` and `model.safetensors`, or shards and their index; or a GGUF file, or a name on
        the Hugging Face hub (see `location.locate`).
      param_dtype: dtype of the parameters in memory; stored values are converted, see `hub.model.load`.
      compute_dtype: dtype of activations; "auto" is float32 on CPU and bfloat16 on accelerators; see `runtime.dtypes`.
      shardings: a tree like the parameters with a `jax.sharding.Sharding` for each; every process then reads only its
        own part of each tensor. None puts everything on the default device.

    Raises:
      UserError: if a file is missing or damaged, the config has an unsupported feature, or the tensors do not match the
        config.
    """
    decoder, arriving = stream(directory, param_dtype=param_dtype, compute_dtype=compute_dtype, shardings=shardings)
    return decoder, traverse_util.unflatten_dict({loaded.path: loaded.array for loaded in arriving})


def stream(
    directory: str | Path, *, param_dtype: str, compute_dtype: str, shardings: Params | None
) -> tuple[LanguageModel, Iterator[Loaded]]:
    """Like `load`, but yields the parameters one by one; the host holds one device's part of one parameter at a time.

    Wrong names, shapes and dtypes raise UserError before any value is read.
    """
    directory = locate(directory)
    family, config = read_config(directory, param_dtype=param_dtype, compute_dtype=compute_dtype)
    decoder = model_of(config)
    wanted = family.tensors(config.unquantised)
    floats, expected = model_of(config.unquantised).abstract_params(), decoder.abstract_params()
    names = {tensor.name for tensor in wanted}
    stored = _full_names(_stored_at(directory), family, names)
    _check_names(directory, family, config, names, stored)
    for tensor in wanted:
        shape = tensor.shape_in_file(at(floats, tensor.path).shape)
        _check_tensor(stored[tensor.name], shape, *_DESCRIBED[is_gguf(directory)])
        if shardings is not None:
            _check_sharding(at(shardings, tensor.path), at(expected, tensor.path).shape, tensor.name)

    def arriving():
        for path, tensors in itertools.groupby(wanted, lambda tensor: tensor.path):
            read = functools.partial(_part, stored, list(tensors))
            placed = lambda path: (path, at(expected, path).shape, None if shardings is None else at(shardings, path))
            if (dtype := at(expected, path).dtype).kind in "iu":
                integers = _Integers(path, at(floats, path).shape[-1], config.param_dtype, read)
                yield _read(*placed(path), integers.values)
                yield _read(*placed((*path[:-1], "scales")), integers.scales)
            else:
                yield _read(*placed(path), lambda index, dtype=dtype, read=read: read(index, dtype))

    return decoder, arriving()


def read_config(directory: str | Path, *, param_dtype: str, compute_dtype: str) -> tuple[base.Family, DecoderConfig]:
    """The family and the config of the model at a path that `location.locate` accepts; of a GGUF file, the family has
    the file's names of tensors. Raises UserError if the model is not supported."""
    path = locate(directory)
    compute_dtype = dtypes.compute_dtype(compute_dtype)
    known = "float32" if param_dtype == "auto" else param_dtype
    dtypes.check_param_dtype(known)
    if is_gguf(path):
        file = gguf_file.read(path)
        with prefixed(f"{path}: "), json_files.reading("its metadata"):
            family, fields = gguf_models.family_and_fields(file)
    else:
        weights.refuse_adapter(path)
        path = path / CONFIG_FILE
        fields = json_files.read_json(path)
        if draft_config.is_draft(fields):
            raise UserError(f"{path.parent} holds a draft on another model's states; {weights.ATTACH}")
        family = _family(path, fields)
    with prefixed(f"{path}: "), json_files.reading("the description"):
        config = family.read_config(fields, param_dtype=known, compute_dtype=compute_dtype)
        if (size := fields.get("draft_vocab_size")) is not None:
            config = _with_vocabulary(config, size, path.parent)
        if (mask := fields.get(MASK_FIELD)) is not None:
            if type(mask) is not int or not 0 <= mask < config.vocab_size:
                raise UserError(
                    f'"{MASK_FIELD}" is {mask!r}, and the model has the ids 0 .. {config.vocab_size - 1}; take the '
                    "complete checkpoint of the draft"
                )
            config = dataclasses.replace(config, mask_id=mask)
    if param_dtype == "auto":
        config = dataclasses.replace(config, param_dtype=_auto_dtype(path if is_gguf(path) else path.parent))
    return family, config


# Names of stored dtypes -> ours; anything else is quantised, or float64.
_STORED = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}


def _auto_dtype(path: Path) -> str:
    """The dtype of parameters for "auto", from the types and sizes of the tensors at this path."""
    sizes: dict[str, int] = {}
    for tensor in _stored_at(path).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    stored = _STORED.get(max(sizes, key=sizes.get))
    return dtypes.auto_param_dtype(stored or "bfloat16", sum(sizes.values()), rounds=stored is None)


def _family(path: Path, fields: dict[str, Any]) -> base.Family:
    """The family of the model in a `config.json`."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise UserError(f"{path}: models of type {model_type!r} are not supported; the supported are {supported}")
    with prefixed(f"{path}: "):
        quantised.method_of(fields)
    if fields.get("auto_map") is not None:
        logging.warning('%s: "auto_map" is ignored, because models of type %s are built in', path, model_type)
    return FAMILIES[model_type]


def _with_vocabulary(config: DecoderConfig, size: Any, folder: Path) -> DecoderConfig:
    """The config of a draft with a reduced head. Raises UserError unless its file in the folder has `size` ids."""
    ids = vocabulary.draft_vocabulary(folder / vocabulary.FILE)
    if len(ids) != size:
        raise UserError(
            f'"draft_vocab_size" is {size!r}, and {vocabulary.FILE} has {len(ids)} ids; copy both files again'
        )
    return model_of(config).reduced(ids).config


def describe(directory: str | Path, *, param_dtype: str, compute_dtype: str) -> LanguageModel:
    """The model at a path that `load` accepts, without weights. Raises UserError if it is not supported."""
    return model_of(read_config(directory, param_dtype=param_dtype, compute_dtype=compute_dtype)[1])


def _stored_at(path: Path) -> dict[str, AnyStored]:
    return gguf_models.tensors(gguf_file.read(path)) if is_gguf(path) else quantised.stored_in(path)


def at(tree: Params, path: tuple[str | int, ...]) -> Any:
    """The leaf of a nested dict at this path."""
    for key in path:
        tree = tree[key]
    return tree


def _full_names(stored: dict[str, AnyStored], family: base.Family, wanted: set[str]) -> dict[str, AnyStored]:
    """The tensors by full names; adds the leading "transformer." that some files, such as GPT-2's, omit.

    Some files of a model with a tied head have the embedding only under the name of the head.
    """
    inner = family.embedding.partition(".")[0]
    rest = set(stored) - {family.head}
    if not rest & wanted and {f"{inner}.{name}" for name in rest} & wanted:
        stored = {name if name == family.head else f"{inner}.{name}": tensor for name, tensor in stored.items()}
    copies = [name for name in (family.head, *family.ignored) if name in stored and name not in wanted]
    return {family.embedding: stored[copies[0]], **stored} if copies else stored


def _check_names(directory, family, config, wanted: set[str], stored: dict[str, AnyStored]) -> None:
    """Raises UserError unless the file has exactly the wanted tensors, apart from those that are ignored."""
    quantised = sorted(name for name in set(stored) - wanted if name.endswith(_QUANTISED))
    if quantised:
        raise UserError(
            f"the weights in {directory} are quantised ({_some(quantised[:1])}), which is not supported; "
            "take the checkpoint in float32, bfloat16 or float16"
        )
    description, remedy = _DESCRIBED[is_gguf(directory)]
    missing = sorted(wanted - set(stored))
    if missing:
        hint = ""
        if missing == [family.head]:
            hint = f'; if its head is the embedding, {CONFIG_FILE} must say "tie_word_embeddings": true'
        raise UserError(
            f"the weights in {directory} lack {_some(missing)}{hint or f'; {description} describes others'}"
        )
    extra = {name for name in stored if name not in wanted and not name.endswith(family.ignored)}
    if config.tied_head and family.head in extra:  # some writers store the tied head too
        if not _same(stored[family.head], stored[family.embedding]):
            raise UserError(
                f"{family.head} in {directory} differs from the embedding, though {CONFIG_FILE} says "
                '"tie_word_embeddings": true; correct whichever is wrong'
            )
        extra.remove(family.head)
    if extra:
        raise UserError(
            f"the weights in {directory} hold {_some(sorted(extra))}, unknown to the model of {description}; {remedy}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more tensors" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _same(one: AnyStored, other: AnyStored) -> bool:
    """Whether two stored tensors have the same values, compared piece by piece."""
    if one == other:
        return True
    if one.shape != other.shape:
        return False
    index = tuple(slice(0, size) for size in one.shape)
    return all(np.array_equal(one.read(piece), other.read(piece)) for piece in _pieces(index))


def _check_tensor(stored: AnyStored, shape: tuple[int, ...], description: str, remedy: str) -> None:
    """Raises UserError unless the stored tensor has this shape and a supported float dtype."""
    if stored.shape != shape:
        raise UserError(
            f"{stored.name} has shape {list(stored.shape)} where {description} describes {list(shape)}; {remedy}"
        )
    if isinstance(stored, Stored) and stored.dtype not in weights.FLOATS:
        raise UserError(
            f"{stored.name} is stored as {stored.dtype}; quantised weights are not supported, "
            "take the checkpoint in float32, bfloat16 or float16"
        )


def _check_sharding(sharding: jax.sharding.Sharding, shape: tuple[int, ...], name: str) -> None:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        raise UserError(
            f"{name}, of shape {list(shape)} as a parameter, does not split evenly over the mesh; "
            "choose sizes of the mesh that divide it"
        ) from None


def _read(path: tuple[str | int, ...], shape: tuple[int, ...], sharding, part_of: Callable) -> Loaded:
    """Loads one parameter onto its devices; reads only the parts on this process's devices, each once.

    Args:
      part_of: function from an index of the parameter to a NumPy array, and the number of bytes read from the file.
    """
    if sharding is None:
        part, count = part_of(tuple(slice(0, size) for size in shape))
        array = jnp.asarray(part)
        return Loaded(path, array, dict.fromkeys(array.devices(), count))
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards, file_bytes = [], {}
    for bounds, devices in holders.items():
        part, count = part_of(tuple(slice(*b) for b in bounds))
        file_bytes.update(dict.fromkeys(devices, count))
        # Wait for the copy, so that the host does not hold several parts at a time.
        shards += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    array = jax.make_array_from_single_device_arrays(shape, sharding, shards)
    return Loaded(path, array, file_bytes)


class _Integers:
    """A kernel that is quantised while it is read, some rows at a time; its scales need all inputs of a row.

    Args of the constructor:
      inputs: I, the number of inputs.
      dtype: see `quantise`.
      read: function from an index [.., O, I] and a dtype to floats, and the number of bytes read from the file.
    """

    def __init__(self, path: tuple[str | int, ...], inputs: int, dtype: str, read: Callable):
        self._path, self._inputs, self._dtype, self._read = path, inputs, dtype, read
        self._last: tuple[Any, Quantised, int] | None = None  # values and scales of the same rows are asked for in turn

    def values(self, index: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        rows, count = self._rows(index[:-1])
        return rows.values[..., index[-1]], count

    def scales(self, index: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        return self._rows(index[:-1])[0].scales[..., index[-1]], 0

    def _rows(self, index: tuple[slice, ...]) -> tuple[Quantised, int]:
        if self._last is None or self._last[0] != index:
            pieces, count = [], 0
            for piece in _pieces((*index, slice(0, self._inputs)), _QUANTISED_BYTES):
                part, read = self._read(piece, np.dtype(np.float32))
                if not np.isfinite(part).all():
                    name = ".".join(map(str, self._path))
                    raise UserError(f"{name} has values that are not finite; copy the checkpoint again")
                pieces.append(quantise(part, self._dtype))
                count += read
            rows = jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
            self._last = index, rows, count
        return self._last[1:]


def _part(stored, tensors, index: tuple[slice, ...], dtype) -> tuple[np.ndarray, int]:
    """The part of a parameter at `index` in our layout and dtype, and the number of bytes read from the file."""
    part = np.empty([i.stop - i.start for i in index], dtype)
    if tensors[0].expert is None:
        return part, _fill(part, stored[tensors[0].name], tensors[0], index)
    pairs = zip(part, tensors[index[0]], strict=True)
    return part, sum(_fill(rows, stored[tensor.name], tensor, index[1:]) for rows, tensor in pairs)


def _fill(part: np.ndarray, stored: AnyStored, tensor: file_layout.Tensor, index: tuple[slice, ...]) -> int:
    """Reads into `part` what is at `index` of what the tensor holds, in our layout. Returns the bytes read."""
    axis = tensor.output_axis(part.ndim)
    in_file, index = part.transpose(tensor.swapped(tuple(range(part.ndim)))), tensor.swapped(index)
    count = 0
    for ours, run in tensor.runs(index[axis]):
        into = in_file[(slice(None),) * axis + (ours,)]
        first = index[0].start if axis else run.start
        for piece in _pieces((*index[:axis], run, *index[axis + 1 :])):
            count += _copy(stored, stored.read(piece), into[piece[0].start - first : piece[0].stop - first])
    return count


def _copy(stored: AnyStored, read: np.ndarray, into: np.ndarray) -> int:
    """Copies and converts values into an array. Returns the bytes read; raises UserError for a float16 overflow."""
    with np.errstate(over="ignore"):  # checked below
        into[...] = read
    if not np.can_cast(read.dtype, into.dtype) and not np.array_equal(np.isfinite(into), np.isfinite(read)):
        raise UserError(
            f"{stored.name} has values that {into.dtype.name} cannot hold; choose bfloat16 or float32 as param_dtype"
        )
    return read.nbytes


def _pieces(index: tuple[slice, ...], size: int = _PIECE_BYTES) -> Iterator[tuple[slice, ...]]:
    """Splits a slice of an array by rows into pieces of about `size` bytes."""
    rows, *rest = index
    row_bytes = 4 * math.prod(i.stop - i.start for i in rest)
    step = max(size // max(row_bytes, 1), 1)
    for start in range(rows.start, rows.stop, step):
        yield (slice(start, min(start + step, rows.stop)), *rest)
