"""Runs a config: one binary, or several stages in order, skipping finished stages.

    python -m specjax.main --config=configs/quickstart.py --workdir=runs/quickstart

A config has either a `binary`, or `stages`: names of its sections, which have a `binary` each.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax.runtime import cli, processes, stopping
from specjax.runtime import config as configs
from specjax.runtime.errors import InexactText, UserError, nearest


def run(config: ConfigDict, workdir: str | Path) -> dict:
    """Runs the config and returns the content of `workdir/results.json`.

    Raises:
      UserError: for an unknown binary or stage, and for invalid input of a binary.
    """
    if "stages" not in config:
        return binary(config)(config, workdir)
    _check_stages(config)
    with configs.claimed(config, workdir):
        return _run_stages(config, Path(workdir))


def _run_stages(config: ConfigDict, workdir: Path) -> dict:
    from specjax.reporting import metrics, records

    results = workdir / "results.json"
    rows, comparisons = [], []
    for number, name in enumerate(config.stages):
        finished = workdir / name / "results.json"
        stopping.stop_if_asked()
        # Process 0 decides for all, because on shared file systems others may see the file later.
        if not processes.from_first(finished.exists()):
            if processes.first():
                print(f"[{number + 1}/{len(config.stages)}] {name}", file=sys.stderr, flush=True)
                results.unlink(missing_ok=True)
            with configs.typed_keys(config, name), configs.claimed(config[name], workdir / name):
                section = configs.resolve(config[name], workdir, config.stages[:number])
                with contextlib.suppress(InexactText):  # raised below, after the records of all stages are written
                    binary(section)(section, workdir / name)
        outcome = records.read_results(finished)
        rows += [{"stage": name, **row} for row in outcome["rows"]]
        comparisons += outcome.get("comparisons", [])
    if processes.from_first(results.exists()):
        record = records.read_results(results)
    else:
        plain = configs.to_plain(config)
        record = records.write_results(results, binary="main", config=plain, rows=rows, comparisons=comparisons)
    if processes.first():
        if "report" in config:  # a module that writes another page
            importlib.import_module(config.report).write_report(workdir, config)
        elif config[config.stages[-1]].binary == "evaluate":
            from specjax.reporting import page

            page.write_run_report(workdir, config)
    metrics.check_exact(record["rows"])
    return record


# Modules of this package with a `run(config, workdir)`; only the one that runs is imported.
BINARIES = ("distill", "choose_layers", "questions", "target_text", "evaluate", "spec_bench", "design", "generate")


def binary(config: ConfigDict) -> Callable[[ConfigDict, str | Path], Any]:
    """The `run` function of the config's binary: one of `BINARIES`, or a module "configs.NAME"."""
    if config.binary.startswith("configs."):
        return importlib.import_module(config.binary).run
    if config.binary not in BINARIES:
        raise UserError(f'there is no binary "{config.binary}"{nearest(config.binary, BINARIES)}')
    return importlib.import_module(f"specjax.{config.binary}").run


def _check_stages(config: ConfigDict) -> None:
    """Checks the binary and references of every stage before the first one runs. Raises UserError."""
    for number, name in enumerate(config.stages):
        if name not in config:
            raise UserError(f'stage "{name}" has no section in the config{nearest(name, config.keys())}')
        binary(config[name])
        configs.resolve(config[name], ".", config.stages[:number])


def launch(argv: Sequence[str]) -> int:
    """Runs the command line, or plans it with `--plan`; returns the exit code."""
    if not any(map(cli.asks_for_plan, argv)):
        return cli.launch(run, "specjax.main", argv)
    from specjax import plan

    return plan.launch(argv)


if __name__ == "__main__":
    cli.leave(launch(sys.argv[1:]))
