"""Reads text and JSON files of a checkpoint, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from specjax.runtime.errors import UserError


def text(name: str, data: bytes) -> str:
    """Decodes the bytes of a UTF-8 file. Raises UserError, naming the file, for invalid UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} cannot be read ({error}); copy it again") from None


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """Parses the bytes of a file that holds a JSON object. Raises UserError, naming the file, for other content."""
    try:
        content = json.loads(text(name, data))
    except ValueError as error:
        raise UserError(f"{name} cannot be read ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no JSON object; copy it again")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object. Raises UserError, naming the file, if it is missing or not an object."""
    try:
        return parse_json(str(path), path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no {path}; name the directory of a Hugging Face checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from None
