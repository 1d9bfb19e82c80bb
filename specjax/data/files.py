"""Reads the files that users bring: one place that knows encodings, line ends, compression, JSON and tables."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import reprlib
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specjax.runtime.errors import UserError, first_line

Record = dict[str, Any]
# Records with their locations, for error messages ("FILE, line 3").
Located = list[tuple[str, Record]]

_COMPRESSION = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\0": lzma.decompress}
_COMPRESSED = (".gz", ".bz2", ".xz")
# A byte order mark of UTF-32 begins with that of UTF-16.
_ENCODINGS = {
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
}
_JSON_LINES = (".jsonl", ".ndjson")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def suffix(path: Path) -> str:
    """The last suffix of a name in lower case, without that of a compression: ".jsonl" of "a.JSONL.gz"."""
    suffixes = [part.lower() for part in path.suffixes]
    return next((part for part in reversed(suffixes) if part not in _COMPRESSED), "")


def read(path: Path, *, trust_suffix: bool = True) -> str | Located:
    """Returns the records in a file, with their locations, or its text if it holds none.

    Records are JSON lines, the objects of a JSON array, the rows of a Parquet file, or those of a table (`.csv`,
    `.tsv`) with a header. Fields that are null (in a table: empty) are left out. JSON is recognised by its content,
    under any name. Text and records may be compressed (gzip, bzip2, xz). Text is UTF-8, or UTF-16 or UTF-32 with a byte
    order mark; it has no byte order marks, and its lines end with "\\n".

    Args:
      trust_suffix: whether a `.json` file has to hold records, rather than text if these are not recognised.

    Raises:
      UserError: for a file that is missing, unreadable, damaged or empty, and for text in another encoding.
    """
    data = _bytes(path)
    if data.startswith(b"PAR1"):
        records = _parquet(path, data)
    else:
        text = _text(path, data)
        if suffix(path) in _SEPARATORS:
            records = list(_table(path, text))
        else:
            records = _json(path, text, (*_JSON_LINES, *([".json"] if trust_suffix else [])))
        if records is None:
            return text
    if not records:
        raise UserError(f"{path} holds no records; correct task.path")
    return [(where, {key: value for key, value in record.items() if value is not None}) for where, record in records]


def read_records(path: Path) -> Located:
    """Returns the records of `read`. Raises UserError also for plain text, with the line that is no JSON object."""
    content = read(path)
    return list(_lines(path, content)) if isinstance(content, str) else content


def fields_of(record: Record) -> str:
    """The names of a record's fields, for an error message."""
    return ", ".join(map(reprlib.repr, list(record)[:12])) or "none"


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        for magic, decompress in _COMPRESSION.items():
            if data.startswith(magic):
                return decompress(data)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; correct task.path") from None
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read ({reason}); correct task.path or copy the file again") from None
    return data


def _text(path: Path, data: bytes) -> str:
    encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), "UTF-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {encoding} text (byte {error.start}); convert it or leave it out") from None
    if "\0" in text:
        raise UserError(f"{path} has zero bytes, so it is binary, or UTF-16 without a byte order mark; convert it")
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path} is empty; correct task.path")
    return text


def _json(path: Path, text: str, suffixes: tuple[str, ...]) -> Located | None:
    """The JSON objects in a text; None if there are none and the file's suffix is not one of `suffixes`."""
    start = text.lstrip()[0]
    if start == "[" or (start == "{" and suffix(path) not in _JSON_LINES):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return [(f"{path}, item {number}", item) for number, item in enumerate(value, 1)]
        if isinstance(value, dict) and suffix(path) in suffixes:
            return [(str(path), value)]
    first = [line for line in text[:1_000_000].split("\n") if line.strip()][:2]
    if suffix(path) in suffixes or (start == "{" and len(first) == 2 and all(map(_is_object, first))):
        return list(_lines(path, text))
    return None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(path: Path, text: str) -> Iterator[tuple[str, Record]]:
    # Not splitlines(): it also breaks at characters that JSON strings may contain, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({first_line(error)}); correct or remove the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object; correct or remove the line")
        yield where, record


def _table(path: Path, text: str) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_SEPARATORS[suffix(path)], strict=True)
    header: list[str] = []
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if header and row and len(row) != len(header):
                raise UserError(f"{where} has {len(row)} columns and the header {len(header)}; correct the row")
            if header and row:
                yield where, {name: cell or None for name, cell in zip(header, row, strict=True)}
            header = header or row
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num} is not a row of a table ({error}); correct it") from None


def _parquet(path: Path, data: bytes) -> Located:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({first_line(error)}); copy it again") from None
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]
