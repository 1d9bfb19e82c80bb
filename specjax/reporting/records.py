"""Reads and writes the JSON files of a run: results.json with its environment, and metrics.jsonl."""

import contextlib
import json
import math
import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from specjax.runtime import processes
from specjax.runtime.errors import UserError
from specjax.runtime.files import write_atomically

SCHEMA = 1
_ROOT = Path(__file__).resolve().parents[2]
REQUIRED_KEYS = ("schema", "binary", "config", "environment", "rows")


def environment(seed: int) -> dict:
    """Versions, commit and devices of this run. The commit of a checkout with uncommitted changes ends in `-dirty`."""
    import jax

    device = jax.devices()[0]
    return {
        "git_commit": _git_commit(),
        "specjax": _own_version(),
        "jax": jax.__version__,
        "flax": metadata.version("flax"),
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "seed": seed,
    }


def write_results(path: str | Path, *, binary: str, config: Mapping, rows: Sequence[Mapping], **extra: Any) -> dict:
    """Writes results.json atomically and returns the record in JSON types, as `read_results` would.

    All processes of a run must call this: process 0 writes, and the others wait for it. Each returns its own record,
    which can differ from the file in seconds measured by its own clock.

    Args:
      extra: further top-level keys; "environment" replaces the default, `environment(config's seed)`.
    """
    if "environment" not in extra:
        extra["environment"] = environment(config["seed"])
    record = json_clean({"schema": SCHEMA, "binary": binary, "config": config, **extra, "rows": rows})
    if processes.first():
        write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    processes.meet(f"results of {binary}")
    return record


def read_results(path: str | Path) -> dict:
    """Reads a results.json. Raises UserError if it is missing, damaged, or has another schema."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the stage that writes it first")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the stage again") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; run the stage again to rewrite it")
    missing = [key for key in REQUIRED_KEYS if key not in record]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; run the stage again to rewrite it")
    return record


def chosen(workdir: str | Path) -> dict:
    """The row that `choose_layers` marked as chosen. Raises UserError if there is none."""
    path = Path(workdir) / "results.json"
    for row in read_results(path)["rows"]:
        if row.get("chosen"):
            return row
    raise UserError(f"{path} holds no choice; name the workdir of a run that makes one, such as choose_layers")


class MetricsLog(contextlib.AbstractContextManager):
    """Writes metrics.jsonl, with one line per logged step, and a TensorBoard event file next to it.

    With `resume_step=None` a run starts, and lines of an earlier attempt are removed. With `resume_step=s` a run
    resumes from the checkpoint of step s, and lines after s are removed, because they will be written again. In a run
    of several processes only process 0 may open a log.
    """

    def __init__(self, workdir: str | Path, *, resume_step: int | None = None):
        from tensorboardX import SummaryWriter

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        lines = []
        if resume_step is not None and path.is_file():
            lines = [line for line in read_metrics(path) if line["step"] <= resume_step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._lines = path.open("a", encoding="utf-8")
        # The names of event files contain the second; without a suffix a quick restart would overwrite the last one.
        suffix = f".{os.getpid()}.{sum(1 for _ in workdir.glob('events.out.tfevents.*'))}"
        purge_step = 0 if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(workdir), purge_step=purge_step, filename_suffix=suffix)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line, and numbers (or 0-d arrays) to TensorBoard. Numbers that are not finite become null."""
        if "step" in values:
            raise ValueError("the step is a separate argument, not one of the values")
        step, values = int(step), json_clean(values)
        self._lines.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict]:
    """Reads the lines of a metrics.jsonl; skips an incomplete last line, which a killed run leaves.

    Raises UserError if the file is missing or another line is damaged, with its number.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the training stage that writes it first")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            valid = isinstance(record, dict) and isinstance(record["step"], int)
        except (json.JSONDecodeError, KeyError):
            valid = False
        if not valid:
            raise UserError(f"{path}, line {number}, is no metrics record; delete the line, or the file, and run again")
        records.append(record)
    return records


def json_clean(value: Any) -> Any:
    """Converts a value to JSON types: arrays to lists, 0-d arrays to numbers, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): json_clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_clean(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "dtype"):
        array = np.asarray(value)
        # bfloat16 is not a subtype of np.floating, but can be converted to one.
        return json_clean(array.tolist() if array.dtype.kind in "biuf" else array.astype(np.float64).tolist())
    raise TypeError(f"{type(value).__name__} has no place in a JSON record: {value!r}")


def _git_commit() -> str:
    """The git commit of this checkout; "unknown" if the package is installed elsewhere or git is not available."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may be inside the checkout of another repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _ROOT:
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _own_version() -> str:
    """The version in the pyproject.toml of this checkout, else that of the installed distribution."""
    pyproject = _ROOT / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {}) if pyproject.is_file() else {}
    if project.get("name") == "specjax" and "version" in project:
        return project["version"]
    try:
        return metadata.version("specjax")
    except metadata.PackageNotFoundError:
        return "unknown"
