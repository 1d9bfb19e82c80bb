"""Joins the results of several runs of one config into one small record, for `make tables`.

    python -m configs.records.condense configs/records/lossy.json runs/lossy_0 runs/lossy_1 runs/lossy_2

A record has the rows of every finished stage, each with its `stage`, the `run_seed` of its run, and the keys that the
tables and figures read; the export of a stage of the run is named "stage:NAME". A run that is not finished contributes
its finished stages.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from specjax.reporting import records
from specjax.runtime import files
from specjax.runtime.errors import UserError

# The keys of a row that a record holds: of training stages, of written target text, and of evaluations.
KEYS = (
    *("task", "seed", "divergence", "params", "steps", "train_seconds", "validation_loss", "validation_acceptance"),
    *("data", "last_quarter_improvement"),
    *("texts", "parameters", "over_lossless", "over_lossless_ci", "decoded", "decoded_tokens", "expected", "ratio"),
    *("rows", "tokens", "seconds", "plain_tokens_per_second", "drafted_tokens_per_second", "same_text"),
    *("prompts", "drafter", "rule", "lenience", "gamma", "temperature", "batch_size"),
    *("block_efficiency", "block_efficiency_ci", "acceptance_rate", "tokens_per_second", "speedup", "speedup_ci"),
    *("threshold", "drafted_tokens", "ctar", "confidence", "identical_to_baseline", "subtask", "questions"),
    *("draft_step_seconds", "target_step_seconds", "verify_seconds", "rule_seconds", "cost_ratio", "predicted_speedup"),
    *("target_layers_per_token", "target_layers_per_token_once", "target_layers_per_token_padded"),
    *("draft_layers_per_token", "block_costs"),
    *("quality", "quality_ci", "quality_difference", "quality_difference_ci"),
    *("table", "draft", "predicted", "measured", "predicted_speedup", "measured_speedup"),
    *("fastest_draft", "fastest_gamma", "share_of_fastest", "right"),
)


def condensed(workdirs: Sequence[str | Path]) -> dict:
    """The record of these runs, with the config and environment of the first.

    Raises:
      UserError: for a folder without a config.json, runs whose configs differ in more than their seeds, two runs of
        one seed, and runs without a finished stage.
    """
    rows, configs, environment = [], {}, None
    for workdir in map(Path, workdirs):
        config = _config(workdir)
        seed = config["seed"]
        if seed in configs:
            raise UserError(f"{workdir} is another run of seed {seed}; give one run of each seed")
        configs[seed] = config
        first = next(iter(configs.values()))
        if _without_seeds(config) != _without_seeds(first):
            raise UserError(f"{workdir} is of another config than {workdirs[0]}; join runs that differ in seed alone")
        for stage in config["stages"]:
            path = workdir / stage / "results.json"
            if path.exists():
                result = records.read_results(path)
                environment = environment or result["environment"]
                for row in result["rows"]:
                    kept = {key: _named(row[key], config["stages"]) for key in KEYS if key in row}
                    rows.append({"stage": stage, "run_seed": seed, **kept})
    if not rows:
        raise UserError(f"no stage of {', '.join(map(str, workdirs))} has finished; let one finish first")
    made = {"schema": records.SCHEMA, "binary": "condensed", "config": brief(first), "environment": environment}
    return {**made, "rows": rows}


def _named(value: Any, stages: Sequence[str]) -> Any:
    """ "stage:NAME" for the path of an export of one of the stages; any other value as it is."""
    parts = PurePath(value).parts[-2:] if isinstance(value, str) else ()
    return f"stage:{parts[0]}" if len(parts) == 2 and parts[0] in stages and parts[1] == "export" else value


def _config(workdir: Path) -> dict:
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"there is no {path}; name the workdir of a run")
    config = json.loads(path.read_text(encoding="utf-8"))
    if "stages" not in config:
        raise UserError(f"{path} is of a run without stages; its results.json is a record already")
    return config


def _without_seeds(config: object) -> object:
    if not isinstance(config, dict):
        return config
    return {key: _without_seeds(value) for key, value in config.items() if key != "seed"}


def brief(config: Mapping) -> dict:
    """The config, in which a stage similar to an earlier one names it as `like`, with only the keys that differ."""
    stages: dict[str, Mapping] = {}
    leaves: dict[str, dict] = {}
    for name in config["stages"]:
        mine = dict(_leaves(config[name]))
        differences = {
            other: {key: value for key, value in mine.items() if key not in theirs or theirs[key] != value}
            for other, theirs in leaves.items()
            if theirs.keys() <= mine.keys()
        }
        nearest = min(differences, key=lambda other: len(differences[other]), default=None)
        similar = nearest is not None and 3 * len(differences[nearest]) < len(mine)
        stages[name] = {"like": nearest, **differences[nearest]} if similar else config[name]
        leaves[name] = mine
    return {**config, **stages}


def _leaves(section: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def main(arguments: Sequence[str]) -> int:
    """Writes the record, one row per line; returns the exit code, 2 for a mistake of the user's."""
    if len(arguments) < 2:
        print("error: give the record to write and then the workdirs of its runs", file=sys.stderr)
        return 2
    try:
        record = condensed(arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = ",\n".join(map(json.dumps, record.pop("rows")))
    text = json.dumps(record, sort_keys=True)[:-1] + ', "rows": [\n' + rows + "\n]}\n"
    files.write_atomically(arguments[0], text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
