"""Text that a target wrote once, on disk with all that it depends on; training reads it back instead of writing anew.

A folder holds about.json and one `rows-NNNNN.npz` a batch, each of the layout of `data.batches` with the seconds that
writing it took. about.json is there before the first row, so that a folder is never filled from two sources.
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
# Sets these random numbers apart from others that are drawn from the same seed.
_STREAM = 0x7E87
# What each part of `provenance` is called in an error.
_PARTS = {
    "target": "of another target",
    "tokenizer": "of another tokenizer",
    "generation": "written with other settings",
    "prompts": "of other prompts",
}


def provenance(target: str, tokenizer: str, task: Any, data: Any) -> dict[str, Any]:
    """What text of a target depends on, as JSON has it, but for the seed and how much of it there is.

    Args:
      target: the model's fingerprint.
      tokenizer: its tokenizer's.
      task: a config's `task` section.
      data: a config's `data` section.
    """
    generation = {name: data.generation[name] for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
    lengths = {name: data[name] for name in ("sequence_length", "prompt_length_min", "prompt_length_max")}
    prompts = {f"task.{name}": task[name] for name in ("name", "path", "seed", "size")} | lengths
    return {"target": target, "tokenizer": tokenizer, "generation": generation, "prompts": prompts}


def begin(directory: Path, about: Mapping[str, Any]) -> None:
    """Makes the folder, or goes on with one that says the same.

    Raises:
      UserError: where the folder holds other text.
    """
    about = {"format": _FORMAT, **about}
    if (directory / ABOUT_FILE).exists():
        if _read_about(directory) != about:
            raise UserError(f"{directory} holds text that was written otherwise; choose another --workdir")
        return
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / ABOUT_FILE, lambda file: file.write(json.dumps(about, indent=1).encode() + b"\n"))


def rows_file(directory: Path, number: int) -> Path:
    """Where batch `number` lies once it is whole."""
    return directory / f"rows-{number:05d}.npz"


def write_rows(directory: Path, number: int, rows: Mapping[str, np.ndarray]) -> None:
    """Writes one batch at once: after a kill there is the whole file or none."""
    _replace(rows_file(directory, number), lambda file: np.savez(file, **rows))


@dataclasses.dataclass(frozen=True)
class CachedText:
    """Rows that a target wrote.

    Attributes:
      directory: where they lie.
      about: what they depend on.
      rows: arrays `[N, ...]` of the layout of `data.batches`.
      seconds: what writing them took.
    """

    directory: Path
    about: Mapping[str, Any]
    rows: Mapping[str, np.ndarray]
    seconds: float

    def __len__(self) -> int:
        return len(self.rows["lengths"])

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Refuses text that is not what `wanted`, a `provenance`, describes.

        Raises:
          UserError: naming what differs.
        """
        for part, said in _PARTS.items():
            if self.about[part] == wanted[part]:
                continue
            differing = ""
            if isinstance(wanted[part], dict):
                keys = [key for key in wanted[part] if wanted[part][key] != self.about[part].get(key)]
                differing = ": " + ", ".join(
                    f"{key} {self.about[part].get(key)!r} there, {wanted[part][key]!r} here" for key in keys
                )
            raise UserError(
                f"the text in {self.directory} is {said} than this run's{differing}; write it again, or set "
                'data.target_path to ""'
            )

    def batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
        """The rows of a step, by (seed, step) alone; every pass over all rows has an order of its own."""
        passes, places = np.divmod(step * batch_size + np.arange(batch_size), len(self))
        orders = {
            one: np.random.default_rng([seed, _STREAM, one]).permutation(len(self)) for one in set(passes.tolist())
        }
        chosen = np.asarray([orders[one][place] for one, place in zip(passes.tolist(), places.tolist(), strict=True)])
        return {name: array[chosen] for name, array in self.rows.items()}


def load(directory: str | Path) -> CachedText:
    """Reads a folder of text.

    Raises:
      UserError: for one that is missing, damaged or not finished.
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
    # Columns that no row reaches would only cost time in training.
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
