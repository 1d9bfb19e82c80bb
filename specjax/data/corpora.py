"""Plain text to learn from: the Python standard library's own sources, and text files by path.

A corpus is two tuples of (name, text), training and validation, split by whole files where there are several.
"""

import functools
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from specjax.runtime.errors import UserError

Files = tuple[tuple[str, str], ...]

# Folders beneath the standard library that are not the library: its tests, and what was installed beside it.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Character maps, help texts and grammar tables: a sixth of the bytes, near-copies of each other or no code.
_GENERATED = re.compile(r"generated (by|from|and)", re.IGNORECASE)


def stdlib_files() -> tuple[Files, Files]:
    """Returns the standard library's sources, (training, validation), each sorted by path.

    About one file in ten is for validation, chosen by a hash of its path: a file keeps its side on every
    machine and Python version. Left out by rule: tests, installed packages, files whose first 300 characters
    say that a program generated them, and files that cannot be opened, are not UTF-8 or are empty.

    Raises UserError if this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = _library(root)
    if len(files) < 2:
        raise UserError(f"no Python sources in {root}; use a task that reads a file, such as `text` with a path")
    return _split_files(files)


@functools.cache  # a run of many stages asks for it in each
def _library(root: Path) -> Files:
    files = []
    for name in sorted(_sources(root)):
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and not _GENERATED.search(text[:300]):
            files.append((name, text))
    return tuple(files)


def _sources(root: Path) -> Iterator[str]:
    """Paths of the Python files beneath the root, relative to it; what is installed there is not even walked."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        yield from ((Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py"))


def text_files(path: str) -> tuple[Files, Files]:
    """Returns the text of a file, or of all files beneath a directory, as (training, validation).

    A directory is split by file (hidden files and folders are left out); a single file gives its last tenth,
    from a line start on, to validation. Raises UserError for what is missing, empty, unreadable or not UTF-8.
    """
    root = Path(path)
    if not root.is_dir():
        text = read_text(root)
        cut = text.find("\n", len(text) * 9 // 10) + 1
        if not 0 < cut < len(text):
            cut = len(text) * 9 // 10
        if not (text[:cut].strip() and text[cut:].strip()):
            raise UserError(f"{root} is too short to split into training and validation; give it more text")
        return ((root.name, text[:cut]),), ((root.name, text[cut:]),)
    names = sorted(item.relative_to(root) for item in root.rglob("*") if item.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if len(names) < 2:
        raise UserError(f"{root} holds {len(names)} text files; put at least two there, or name a single file")
    return _split_files([(name.as_posix(), read_text(root / name)) for name in names])


def read_text(path: Path) -> str:
    """Returns a file's text, line ends untouched.

    Raises UserError if it is missing, unreadable, not UTF-8 or empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; correct the task's `path`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the task's `path`") from None
    if not text.strip():
        raise UserError(f"{path} is empty; correct the task's `path`")
    return text


def validation_mask(keys: Sequence[str]) -> list[bool]:
    """Says for each key whether it belongs to validation: about one in ten, by a hash of the key alone.

    So a key's side does not change as others come and go, and equal keys fall on the same side. Only where
    one side would be empty does the key with the smallest (largest) hash change over. Raises UserError if all
    keys are equal.
    """
    hashes = [stable_hash(key) for key in keys]
    if len(set(hashes)) < 2:
        raise UserError("the data cannot be split: training and validation need two different items at least")
    bound = max(2**64 // 10, min(hashes) + 1)
    bound = min(bound, max(hashes))
    return [value < bound for value in hashes]


def stable_hash(key: str) -> int:
    """Returns 64 bits of a hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def limit_bytes(files: Files, size: int) -> Files:
    """Keeps `size` bytes of text (0: all): files by their names' hashes, the last one cut at a line end.

    Raises UserError if that leaves nothing.
    """
    if size == 0:
        return files
    kept, left = [], size
    for name, text in sorted(files, key=lambda file: stable_hash(file[0])):
        data = text.encode()
        if len(data) > left:
            head = data[:left].decode("utf-8", errors="ignore")
            text = head[: head.rfind("\n") + 1]
        if text.strip():
            kept.append((name, text))
        left -= len(data)
        if left <= 0:
            break
    if not kept:
        raise UserError(f"`size` of {size} bytes leaves no line of training text; make it larger, or 0 for all")
    return tuple(sorted(kept))


def _split_files(files: Sequence[tuple[str, str]]) -> tuple[Files, Files]:
    held_out = validation_mask([name for name, _ in files])
    training = tuple(file for file, held in zip(files, held_out, strict=True) if not held)
    return training, tuple(file for file, held in zip(files, held_out, strict=True) if held)
