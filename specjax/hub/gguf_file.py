"""Reads GGUF files: their metadata, and tensors that are dequantised where they are sliced.

The format is little-endian: a header, metadata (typed key-value pairs), the description of each tensor, and aligned
data (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). `gguf.GGUFReader` reads it too, but it takes 16 s for
a vocabulary of 151,936 tokens; this takes 0.2 s. Values are dequantised by `gguf.quants`.
"""

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax.hub.json_files import reading
from specjax.hub.weights import covering
from specjax.runtime.errors import UserError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # the same layout; 3 also allows big-endian files
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
# Types of metadata values by their number in the format; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufTensor(NamedTuple):
    """A tensor in a GGUF file; it is read like `weights.Stored`.

    Attributes:
      name: name of the tensor in the file.
      file: path of the file.
      shape: shape, outputs first.
      dtype: name of the type in the format, such as "Q4_K".
      offset: position of its first byte.
      heads: if not 0, the rows of each of so many heads are stored with their halves interleaved; slices undo it.
      shift: is added to each value.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    heads: int = 0
    shift: float = 0.0

    def raw(self) -> np.ndarray:
        """The bytes of each row, mapped into memory."""
        _, row_bytes = _type(self.dtype, self.shape[-1])
        shape = (math.prod(self.shape[:-1]), row_bytes)
        return np.memmap(self.file, np.uint8, "r", self.offset, shape)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The float32 values of a slice; only its blocks are dequantised."""
        import gguf

        kind = gguf.GGMLQuantizationType[self.dtype]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        is_vector = len(self.shape) == 1  # small, so it is read as a whole
        rows, columns = (slice(0, 1), slice(0, self.shape[0])) if is_vector else index
        order = None
        if self.heads:
            order = np.arange(self.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
            rows = rows if is_vector else order[rows]
        covered, within = covering(columns, block)
        blocks = self.raw()[rows, covered.start * block_bytes : covered.stop * block_bytes]
        values = gguf.quants.dequantize(np.ascontiguousarray(blocks), kind)[:, within]
        if is_vector:
            values = values[0] if order is None else values[0][order]
            values = values[index]
        return values + np.float32(self.shift) if self.shift else values


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The metadata of a GGUF file by key, and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read(path: Path) -> GgufFile:
    """Reads everything but the values of the tensors.

    Raises:
      UserError: for a file that is missing, damaged, cut short, of another format or version, or one of several parts.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; name a GGUF file or the directory of a checkpoint")
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # config, tensors and tokenizer come from the same bytes
def _read(path: Path, size: int, changed: int) -> GgufFile:
    del changed  # part of the key
    with reading(str(path)), open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()}; copy it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data, size)


def _parse(path: Path, data: mmap.mmap, size: int) -> GgufFile:
    cursor = _Cursor(path, data, len(_MAGIC))
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        is_big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "is big-endian" if is_big_endian else f"has version {version} of the GGUF format"
        raise UserError(f"{path} {what}; versions 2 and 3 in little-endian are supported, so convert the model again")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.check_count(num_tensors, 24), cursor.check_count(num_values, 13)
    metadata = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise UserError(
            f"{path} is one of {parts} parts of a model; join them (llama-gguf-split --merge FIRST.gguf ALL.gguf) and "
            "name the result"
        )
    described = [cursor.tensor() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f'{path}: "general.alignment" must be a positive integer, not {alignment!r}; copy it again')
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in described:
        kind = _type_name(number)
        _, row_bytes = _type(kind, shape[-1]) if kind else (0, 0)
        if not row_bytes:
            raise UserError(
                f"{path}: {name} has type {kind or number} and rows of {shape[-1]}, which is not supported; "
                "convert the model to another type, such as Q8_0"
            )
        if name in tensors:
            raise UserError(f"{path}: {name} is stored twice; copy the file again")
        if start + offset + math.prod(shape[:-1]) * row_bytes > size:
            raise cursor.cut_short()
        tensors[name] = GgufTensor(name, path, shape, kind, start + offset)
    return GgufFile(path, metadata, tensors)


@functools.cache
def _type_name(number: int) -> str:
    """The name of a tensor type that can be dequantised; "" if it is unknown."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError):
        return ""
    return kind.name


@functools.cache
def _type(name: str, columns: int) -> tuple[int, int]:
    """The values in a block of this type, and the bytes of a row; 0 bytes if a row is no whole number of blocks."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return block, 0 if columns % block else columns // block * block_bytes


class _Cursor:
    """A position in a file; every method reads what is there and moves past it. Raises UserError at the end."""

    def __init__(self, path: Path, data: mmap.mmap, at: int):
        self._path, self._data, self.at = path, data, at

    def cut_short(self) -> UserError:
        return UserError(f"{self._path} is damaged or cut short; copy it again")

    def check_count(self, count: int, least_bytes: int) -> None:
        """Raises UserError if `count` items of at least so many bytes go beyond the end of the file."""
        if count * least_bytes > len(self._data) - self.at:
            raise self.cut_short()

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        self.check_count(1, size)
        (value,) = struct.unpack_from(f"<{code}", self._data, self.at)
        self.at += size
        # A float32 as the decimal number that it was written from: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if code == "f" else value

    def string(self) -> str:
        size = self.scalar("Q")
        self.check_count(1, size)
        self.at += size
        return self._data[self.at - size : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A metadata value of this type: a number, a bool, a text, or an array or list of them."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.cut_short()
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
            self.check_count(count, dtype.itemsize)
            self.at += count * dtype.itemsize
            return np.frombuffer(self._data[self.at - count * dtype.itemsize : self.at], dtype)
        self.check_count(count, 8)
        if kind != _STRING:
            return [self.value(kind) for _ in range(count)]
        # Vocabularies have many strings, so the loop is kept short.
        data, at, end, texts = self._data, self.at, len(self._data), []
        for _ in range(count):
            stop = at + 8 + int.from_bytes(data[at : at + 8], "little")
            if stop > end:
                raise self.cut_short()
            texts.append(data[at + 8 : stop].decode("utf-8"))
            at = stop
        self.at = at
        return texts

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """The name, the shape with outputs first, the number of the type, and the offset in the data of a tensor."""
        name, dimensions = self.string(), self.scalar("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.cut_short()
        shape = tuple(reversed([self.scalar("Q") for _ in range(dimensions)]))
        if not all(shape):
            raise self.cut_short()
        return name, shape, self.scalar("I"), self.scalar("Q")
