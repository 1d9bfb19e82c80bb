"""Lists the tensors in a directory's safetensors files, and reads slices of their values."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax.hub.json_files import read_json, reading
from specjax.runtime.errors import UserError

FILE = "model.safetensors"
# Names of float dtypes in the format, from which models are loaded as they are.
FLOATS = ("F64", "F32", "F16", "BF16")
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
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """A context with an object whose slices are numpy arrays of the values.

        Within it the file is mapped into memory. Pages that were read count as memory of the process, although the
        system can reclaim them at any time.
        """
        from safetensors import safe_open

        if self.dtype == "F8_E4M3":
            yield self._mapped()
            return
        with safe_open(self.file, framework="numpy") as handle:
            yield handle.get_slice(self.name)

    def _mapped(self) -> np.ndarray:
        """The values of 8-bit floats, which `safetensors` does not read as NumPy arrays."""
        import ml_dtypes

        with open(self.file, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            start, _ = json.loads(file.read(size))[self.name]["data_offsets"]
        values = np.memmap(self.file, np.uint8, "r", 8 + size + start, self.shape)
        return values.view(ml_dtypes.float8_e4m3fn)


def stored_in(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory's weights, by name; no values are read.

    Raises:
      UserError: if there are no safetensors files, or one of them is missing or damaged.
    """
    from safetensors import safe_open

    stored: dict[str, Stored] = {}
    for path in _files(directory):
        if not path.is_file():
            raise UserError(f"{path} is missing, though {INDEX_FILE} names it; copy it again")
        with reading(str(path), "is damaged or cut short"), safe_open(path, framework="numpy") as handle:
            slices = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118
            tensors = [Stored(name, path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices]
        for tensor in tensors:
            if tensor.name in stored:
                twice = f"{stored[tensor.name].file.name} and {path.name}"
                raise UserError(f"{tensor.name} is stored twice in {directory}, in {twice}; copy the checkpoint again")
            stored[tensor.name] = tensor
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
