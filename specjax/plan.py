"""The cost of a config on chips that need not be present: memory, whether it fits, work and least time of each step.

    python -m specjax.main --config=configs/plan/pairs.py:llama_65b --plan
    python -m specjax.main --config=configs/quickstart.py --plan=v5e --config.distilled.mesh.data=4

`--plan` without a value uses the config's `chip`. Steps are the functions that a run compiles, traced with shapes: no
weights are read, and a checkpoint needs only its `config.json`. For TPUs the TPU compiler decides what fits; for GPUs
the CPU compiler is used, whose temporary memory is only an estimate.
"""

import dataclasses
import gc
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax.planning import account, chips, executables, smallest, tables
from specjax.planning.models import ModelCatalog
from specjax.reporting import records
from specjax.runtime import cli
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# Binaries whose steps can be planned; stages of others are skipped.
_PLANNED = ("distill", "evaluate")


def launch(argv: Sequence[str]) -> int:
    """Prints the cost report that the command line asks for; returns the exit code, 2 for a mistake of the user."""
    requests = [argument for argument in argv if cli.asks_for_plan(argument)]
    chips.compile_only()
    try:
        config, workdir = cli.parse([argument for argument in argv if argument not in requests], needs_workdir=False)
        record = run(config, requests[-1].partition("=")[2])
        print(tables.terminal(record))
        if workdir:
            records.write_results(Path(workdir) / "plan.json", **record)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: ConfigDict, name: str = "") -> dict:
    """Compiles every stage that trains or evaluates and returns its cost report.

    Args:
      name: the slice, such as "v5e:4x4"; "v5e" is the listed slice of the mesh's size, "" the config's `chip`.

    Returns:
      The record: a row for each executable in `rows`, and for each stage in `stages`, with the smallest slice it fits.

    Raises:
      UserError: for an unknown chip, a mesh that is no slice, a model that does not divide over the mesh, and a config
        without a stage that can be planned.
    """
    if not name and "chip" not in config:
        raise UserError("the config names no chip to plan for; name one, as in --plan=v5e or --plan=v5p:2x2x4")
    name = name or config.chip
    sections = [(stage, config[stage]) for stage in config.stages] if "stages" in config else [("", config)]
    planned = [(stage, section) for stage, section in sections if section.binary in _PLANNED]
    if not planned:
        raise UserError(f"the config has nothing to plan; planning needs a stage of {' or '.join(_PLANNED)}")
    parts = [chips.slice_named(name, math.prod(meshes.sizes_of(section.mesh))) for _, section in planned]
    catalog = ModelCatalog()
    gc.disable()  # tracing creates next to no cyclic garbage, and looking for it would take a third of the time
    try:
        stages = [_stage(name, section, catalog, part) for (name, section), part in zip(planned, parts, strict=True)]
        compiled = _compile_all(stages)
    finally:
        gc.enable()
    summaries = [
        smallest.summary(of.name, of.section, of.resident_on, rows, of.part, dict(of.mesh.shape))
        for of, rows in zip(stages, compiled, strict=True)
    ]
    rows = [row for rows in compiled for row in rows]
    return {"binary": "plan", "config": configs.to_plain(config), "rows": rows, "stages": summaries}


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A stage to compile.

    Attributes:
      executables: pairs of an executable and further fields for its row.
      resident_on: function from a mesh to resident bytes on one chip, by what they are.
    """

    name: str
    section: ConfigDict
    part: chips.Slice
    mesh: Any
    executables: Sequence[tuple[executables.Executable, Mapping]]
    resident_on: Callable[[Any], Mapping[str, int]]


def _stage(name: str, section: ConfigDict, catalog: ModelCatalog, part: chips.Slice) -> _Stage:
    """Describes a stage, and adds the model that it trains to the catalog."""
    mesh = chips.make_mesh(part, {axis: section.mesh[axis] for axis in meshes.AXES})
    if section.binary == "distill":
        training = executables.training(section, catalog, mesh)
        catalog.made[name] = training.draft
        resident_on = lambda other: executables.training(section, catalog, other).resident
        steps = [(step, {}) for step in executables.training_executables(training)]
        return _Stage(name, section, part, mesh, steps, resident_on)
    decodings, steps = list(executables.decodings(section, catalog, mesh)), []
    for of in decodings:
        fields = {"drafter": of.name, "gamma": of.plan.gamma, "batch_size": of.batch, "capacity": of.plan.capacity}
        steps += [(step, fields) for step in executables.decoding_executables(of)]

    def largest(other: Any) -> Mapping[str, int]:
        return max((of.resident_on(other) for of in decodings), key=lambda resident: sum(resident.values()))

    return _Stage(name, section, part, mesh, steps, largest)


def _compile_all(stages: Sequence[_Stage]) -> list[list[dict]]:
    """Compiles all executables in parallel threads (the compiler releases the GIL). Returns the rows of each stage."""
    jobs = [(stage, *step) for stage in stages for step in stage.executables]
    longest_first = sorted(range(len(jobs)), key=lambda i: executables.LONGEST_FIRST.index(jobs[i][1].name))
    # One job per core; more would not be faster.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        futures = {i: pool.submit(_row, *jobs[i]) for i in longest_first}
    rows = (futures[i].result() for i in range(len(jobs)))
    return [list(itertools.islice(rows, len(stage.executables))) for stage in stages]


def _row(stage: _Stage, executable: executables.Executable, fields: Mapping) -> dict:
    print(f"{stage.name or 'plan'}: {executable.name} for {stage.part.name}", file=sys.stderr, flush=True)
    compiled, seconds, reason = account.compiled_on(stage.mesh, executable)
    return {**account.row(stage.name, executable, stage.part, stage.mesh, compiled, seconds, reason), **fields}
