"""Text that a target wrote, stored on disk for training, with a description of everything that it depends on.

A directory contains about.json and one `rows-NNNNN.npz` for each batch, in the layout of `data.batches`, with the
seconds that generating it took. about.json is written first, so that two sources never fill one directory.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specjax.runtime.errors import UserError

ABOUT_FILE = "about.json"
_FORMAT = "specjax-target-text-1"
# Separates these random numbers from others with the same seed.
_STREAM = 0x7E87
# How an error describes a difference in each part of `provenance`.
_PARTS = {
    "target": "of another target",
    "tokenizer": "of another tokenizer",
    "generation": "written with other settings",
    "prompts": "of other prompts",
}


def provenance(target: str, tokenizer: str, task: Any, data: Any) -> dict[str, Any]:
    """Everything that a target's text depends on, as JSON types, except its seed and amount.

    Args:
      target: fingerprint of the model.
      tokenizer: fingerprint of its tokenizer.
      task: a config's `task` section.
      data: a config's `data` section.
    """
    generation = {name: data.generation[name] for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
    lengths = {name: data[name] for name in ("sequence_length", "prompt_length_min", "prompt_length_max")}
    prompts = {f"task.{name}": task[name] for name in ("name", "path", "seed", "size")} | lengths
    return {"target": target, "tokenizer": tokenizer, "generation": generation, "prompts": prompts}


def begin(directory: Path, about: Mapping[str, Any]) -> None:
    """Creates the directory, or continues in one with the same description.

    Raises:
      UserError: if the directory contains other text.
    """
    about = {"format": _FORMAT, **about}
    if (directory / ABOUT_FILE).exists():
        if _read_about(directory) != about:
            raise UserError(f"{directory} contains text written with other settings; choose another --workdir")
        return
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / ABOUT_FILE, lambda file: file.write(json.dumps(about, indent=1).encode() + b"\n"))


def rows_file(directory: Path, number: int) -> Path:
    """Path of the complete batch `number`."""
    return directory / f"rows-{number:05d}.npz"


def write_rows(directory: Path, number: int, rows: Mapping[str, np.ndarray]) -> None:
    """Writes one batch atomically: after a kill, the file is complete or absent."""
    _replace(rows_file(directory, number), lambda file: np.savez(file, **rows))


@dataclasses.dataclass(frozen=True)
class CachedText:
    """Rows that a target wrote.

    Attributes:
      directory: where they are stored.
      about: what they depend on, see `provenance`.
      rows: arrays `[N, ...]` in the layout of `data.batches`.
      seconds: that generating them took.
    """

    directory: Path
    about: Mapping[str, Any]
    rows: Mapping[str, np.ndarray]
    seconds: float

    def __len__(self) -> int:
        return len(self.rows["lengths"])

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Checks that the text is what `wanted`, a `provenance`, describes.

        Raises:
          UserError: naming what differs.
        """
        for part, difference in _PARTS.items():
            if self.about[part] == wanted[part]:
                continue
            differing = ""
            if isinstance(wanted[part], dict):
                keys = [key for key in wanted[part] if wanted[part][key] != self.about[part].get(key)]
                differing = ": " + ", ".join(
                    f"{key} {self.about[part].get(key)!r} there, {wanted[part][key]!r} here" for key in keys
                )
            raise UserError(
                f"the text in {self.directory} is {difference} than this run's{differing}; write it again, or set "
                'data.target_path to ""'
            )

    def batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
        """The rows of a step, a function of (seed, step); every pass over all rows has another order."""
        passes, places = np.divmod(step * batch_size + np.arange(batch_size), len(self))
        orders = {
            one: np.random.default_rng([seed, _STREAM, one]).permutation(len(self)) for one in set(passes.tolist())
        }
        chosen = np.asarray([orders[one][place] for one, place in zip(passes.tolist(), places.tolist(), strict=True)])
        return {name: array[chosen] for name, array in self.rows.items()}


def load(directory: str | Path) -> CachedText:
    """Reads a directory of text.

    Raises:
      UserError: if it is missing, damaged or incomplete.
    """
    directory = Path(directory)
    about = _read_about(directory)
    parts = []
    for number in range(-(-about["count"] // about["batch_size"])):
        path = rows_file(directory, number)
        if not path.is_file():
            raise UserError(f"the text in {directory} is not finished ({path.name} is missing); run its stage again")
        try:
            with np.load(path) as stored:
                parts.append({name: stored[name] for name in stored})
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run its stage again") from None
    seconds = sum(float(part.pop("seconds")) for part in parts)
    rows = {name: np.concatenate([part[name] for part in parts])[: about["count"]] for name in parts[0]}
    # Columns past the longest row would only cost time in training.
    rows["tokens"] = rows["tokens"][:, : rows["lengths"].max()]
    return CachedText(directory, about, rows, seconds)


def _read_about(directory: Path) -> dict[str, Any]:
    path = directory / ABOUT_FILE
    if not path.is_file():
        raise UserError(f"there is no {path}; name a folder that the binary target_text wrote")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); write the text again") from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise UserError(f'{path} has no "format": "{_FORMAT}"; name a folder that the binary target_text wrote')
    return about


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
