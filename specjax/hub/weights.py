"""Lists the tensors in a directory's safetensors files, and reads slices of their values."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from specjax.hub.json_files import read_json, reading
from specjax.runtime.errors import UserError

FILE = "model.safetensors"
# Names of float dtypes in the format, from which models are loaded as they are.
FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
INDEX_FILE = "model.safetensors.index.json"

SPECJAX_ADAPTER_FILE = "adapter.safetensors"

# What to do with a directory that holds an adapter.
ATTACH = (
    "load that model, and give this directory to the drafter of kind kangaroo, medusa, eagle3 or block_parallel "
    "(api.load_adapter(DIRECTORY, target))"
)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PICKLES = ("*.bin", "*.pt", "*.pth")


class Stored(NamedTuple):
    """A tensor in a safetensors file.

    Attributes:
      name: name of the tensor in the file.
      file: path of the file.
      shape: shape in the file.
      dtype: name of the dtype in the format, such as "BF16".
      offset: position of its first byte.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def read(self, index: Any = ...) -> np.ndarray:
        """The values at an index, in the file, which is mapped into memory.

        Pages that were read count as memory of the process, although the system can reclaim them at any time.
        """
        if self.dtype not in _DTYPES:
            raise UserError(f"{self.name} is stored as {self.dtype}, which is not supported; take another checkpoint")
        return np.memmap(self.file, _DTYPES[self.dtype], "r", self.offset, self.shape)[index]


def covering(wanted: slice, size: int) -> tuple[slice, slice]:
    """The blocks of `size` entries that cover a slice of an axis, and the slice within these blocks."""
    first = wanted.start // size
    return slice(first, -(-wanted.stop // size)), slice(wanted.start - first * size, wanted.stop - first * size)


def check_dtype(tensor: Stored, dtype: str) -> None:
    """Raises UserError unless a part of a quantised weight has this dtype."""
    if tensor.dtype != dtype:
        raise UserError(f"{tensor.name} is stored as {tensor.dtype}, not as {dtype}; copy the checkpoint again")


def check_shape(tensor: Stored, fitting: Sequence[tuple[int, ...]], weight: str) -> None:
    """Raises UserError unless a part of a quantised weight, described by `weight`, has one of these shapes."""
    if tensor.shape not in fitting:
        listed = " or ".join(str(list(shape)) for shape in fitting)
        raise UserError(f"{tensor.name} has shape {list(tensor.shape)}, but {weight} needs {listed}; copy both again")


def tensors_in(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, by name; no values are read. Raises UserError if it is missing or damaged."""
    from safetensors import safe_open

    if not path.is_file():
        raise UserError(f"{path} is missing; copy it again")
    with reading(str(path), "is damaged or cut short"), safe_open(path, framework="numpy"), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        tensors = {name: about for name, about in json.loads(file.read(size)).items() if name != "__metadata__"}
    return {
        name: Stored(name, path, tuple(about["shape"]), about["dtype"], 8 + size + about["data_offsets"][0])
        for name, about in tensors.items()
    }


def stored_in(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory's weights, by name; no values are read.

    Raises:
      UserError: if there are no safetensors files, or one of them is missing or damaged.
    """
    stored: dict[str, Stored] = {}
    for path in _files(directory):
        for name, tensor in tensors_in(path).items():
            if name in stored:
                twice = f"{stored[name].file.name} and {path.name}"
                raise UserError(f"{name} is stored twice in {directory}, in {twice}; copy the checkpoint again")
            stored[name] = tensor
    return stored


def refuse_adapter(directory: Path) -> None:
    """Raises UserError if the directory holds an adapter, which is not a complete model."""
    if (directory / SPECJAX_ADAPTER_FILE).exists():
        raise UserError(
            f"{directory} holds an adapter ({SPECJAX_ADAPTER_FILE}) that drafts for another model; {ATTACH}"
        )
    for name in _ADAPTER_FILES:
        if (directory / name).exists():
            raise UserError(
                f"{directory} holds an adapter ({name}), which changes another model; merge it into that model "
                "(peft: `model.merge_and_unload().save_pretrained(DIR)`) and name the merged directory"
            )


def _files(directory: Path) -> list[Path]:
    """The paths of the single weights file, or of the shards in the index."""
    if (directory / FILE).exists():
        return [directory / FILE]
    index = directory / INDEX_FILE
    if not index.exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        if pickles:
            raise UserError(
                f"{directory} holds PyTorch files ({pickles[0]}), which can run any code when they are read; convert "
                "them once, where torch and transformers are installed: `model = transformers.AutoModelForCausalLM."
                "from_pretrained(DIR)`, then `model.save_pretrained(NEW_DIR)`, and copy the "
                "tokenizer's files"
            )
        raise UserError(
            f"there is neither {FILE} nor {INDEX_FILE} in {directory}; weights are read from safetensors and GGUF "
            "files, so convert other formats first"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise UserError(f'{index} has no "weight_map" from tensors to files in its folder; copy it again')
    return [directory / name for name in sorted(set(weight_map.values()))]
