"""Reads text and JSON files of a checkpoint, with errors that name the file."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specjax.runtime.errors import UserError, first_line


@contextlib.contextmanager
def reading(name: str, problem: str = "cannot be read") -> Iterator[None]:
    """A context in which file `name` is parsed: any exception inside it means a damaged file, and raises UserError.

    The libraries that parse files have no common class of exceptions; `tokenizers` even raises BaseExceptions.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{name} {problem} ({first_line(error) or type(error).__name__}); copy it again") from None


def text(name: str, data: bytes) -> str:
    """Decodes the bytes of a UTF-8 file. Raises UserError, naming the file, for invalid UTF-8."""
    with reading(name):
        return data.decode("utf-8")


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """Parses the bytes of a file that holds a JSON object. Raises UserError, naming the file, for other content."""
    with reading(name):
        content = json.loads(text(name, data))
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no JSON object; copy it again")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object. Raises UserError, naming the file, if it is missing or not an object."""
    if not path.exists():
        raise UserError(f"there is no {path}; name the directory of a Hugging Face checkpoint, or a GGUF file")
    with reading(str(path)):
        return parse_json(str(path), path.read_bytes())
