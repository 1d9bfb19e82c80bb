"""Plain-text corpora for language modelling: the Python standard library's sources, and text files by path.

A corpus is two tuples of (name, text), for training and validation. With several files, each is in one of the splits.
"""

import functools
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from specjax.data import files
from specjax.runtime.errors import UserError

Files = tuple[tuple[str, str], ...]
Item = TypeVar("Item")

# Folders inside the standard library's folder that are skipped: tests and installed packages.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Files that match are skipped: character maps, help texts and grammar tables, which are a sixth of the bytes.
_GENERATED = re.compile(r"generated (by|from|and)", re.IGNORECASE)


def stdlib_files() -> tuple[Files, Files]:
    """Returns the standard library's sources, (training, validation), each sorted by path.

    About one file in ten is for validation, chosen by a hash of its path, so a file is in the same split on every
    machine and Python version. Tests, installed packages, files whose first 300 characters say that they are
    generated, and files that cannot be opened, are not UTF-8 or are empty are skipped.

    Raises UserError if this Python is installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = _library(root)
    if len(sources) < 2:
        raise UserError(f"no Python sources in {root}; use a task that reads a file, such as `text` with a path")
    return split(sources, [name for name, _ in sources])


@functools.cache  # a run with several stages calls it in each
def _library(root: Path) -> Files:
    sources = []
    for name in sorted(_sources(root)):
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and not _GENERATED.search(text[:300]):
            sources.append((name, text))
    return tuple(sources)


def _sources(root: Path) -> Iterator[str]:
    """Paths of the Python files below the root, relative to it, without those in `_NOT_LIBRARY` folders."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        yield from ((Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py"))


def text_files(path: str) -> tuple[Files, Files]:
    """Returns the text of a file, or of all files below a directory, as (training, validation).

    A directory is split by file; hidden files and folders are skipped. Of a single text file, the last tenth, from the
    start of a line, is for validation. Records with a field "text" are documents, split by a hash of their text.

    Raises UserError as `files.read` does, for other records, and for text that cannot be split.
    """
    root = Path(path)
    if root.is_dir():
        names = sorted(item.relative_to(root) for item in root.rglob("*") if item.is_file())
        names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        if len(names) < 2:
            raise UserError(f"{root} holds {len(names)} text files; put at least two there, or name a single file")
        parts = [(name.as_posix(), files.read(root / name, trust_suffix=False)) for name in names]
        texts = [(name, *text) for name, content in parts for text in _documents(name, content)]
        return split([text[1:] for text in texts], [text[0] for text in texts])
    content = files.read(root)
    if not isinstance(content, str):
        documents = _documents(root.name, content)
        return split(documents, [text for _, text in documents])
    cut = content.find("\n", len(content) * 9 // 10) + 1
    if not 0 < cut < len(content):
        cut = len(content) * 9 // 10
    if not (content[:cut].strip() and content[cut:].strip()):
        raise UserError(f"{root} is too short to split into training and validation; give it more text")
    return ((root.name, content[:cut]),), ((root.name, content[cut:]),)


def _documents(name: str, content: str | files.Located) -> list[tuple[str, str]]:
    """The (name, text) of a file's documents: its text, or the field "text" of its records."""
    if isinstance(content, str):
        return [(name, content)]
    return [(where, text) for where, record in content if (text := document(record, where)).strip()]


def document(record: files.Record, where: str) -> str:
    """The text of a record for language modelling. Raises UserError if it has none, with the tasks that may fit it."""
    if not isinstance(record.get("text"), str):
        raise UserError(
            f'{where} has the fields {files.fields_of(record)}, and no "text" for the task `text`; '
            "use the task `prompt_completion` to train on prompts, and `prompts` to evaluate on them"
        )
    return record["text"]


def validation_mask(keys: Sequence[str]) -> list[bool]:
    """Returns for each key whether it belongs to validation: about one in ten, by a hash of the key alone.

    So a key's split does not depend on other keys, and equal keys are in the same split. But if a split would be empty,
    the key with the smallest or largest hash moves there. Raises UserError if all keys are equal.
    """
    hashes = [stable_hash(key) for key in keys]
    if len(set(hashes)) < 2:
        raise UserError("the data cannot be split: training and validation need two different items at least")
    bound = max(2**64 // 10, min(hashes) + 1)
    bound = min(bound, max(hashes))
    return [value < bound for value in hashes]


def stable_hash(key: str) -> int:
    """Returns a 64-bit hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def limit_bytes(files: Files, size: int) -> Files:
    """Returns at most `size` bytes of the files (0: all), chosen by a hash of their names; cuts the last at a line end.

    Raises UserError if nothing is left.
    """
    if size == 0:
        return files
    chosen, left = [], size
    for name, text in sorted(files, key=lambda file: stable_hash(file[0])):
        data = text.encode()
        if len(data) > left:
            head = data[:left].decode("utf-8", errors="ignore")
            text = head[: head.rfind("\n") + 1]
        if text.strip():
            chosen.append((name, text))
        left -= len(data)
        if left <= 0:
            break
    if not chosen:
        raise UserError(f"`size` of {size} bytes leaves no line of training text; make it larger, or 0 for all")
    return tuple(sorted(chosen))


def split(items: Sequence[Item], keys: Sequence[str]) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Splits items into (training, validation) by `validation_mask` of their keys."""
    held_out = validation_mask(keys)
    of = lambda side: tuple(item for item, held in zip(items, held_out, strict=True) if held == side)
    return of(False), of(True)
