"""Plans a config for chips that need not be there: what each step takes of a chip, whether it fits, what it costs.

    python -m specjax.main --config=configs/plan/pairs.py:llama_65b --plan
    python -m specjax.main --config=configs/quickstart.py --plan=v5e --config.distilled.mesh.data=4

`--plan` alone takes the config's own `chip`. The steps are those that a run compiles, made for the slice from shapes:
no weights are read, and of a checkpoint its `config.json` is enough. For a TPU the TPU compiler itself says what fits;
for GPUs the CPU compiler stands in, and what it says of temporary memory is an estimate.
"""

import contextlib
import dataclasses
import gc
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax.planning import account, chips, smallest, steps
from specjax.planning import tables as plan_tables
from specjax.planning.models import ModelCatalog
from specjax.reporting import records
from specjax.runtime import cli
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# Binaries of which steps are planned; others are passed over.
_PLANNED = ("distill", "evaluate")


def launch(argv: Sequence[str] | None = None) -> int:
    """Plans what the command line asks for, prints it, and returns the exit code; 2 for a mistake of the user's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = [argument for argument in argv if cli.asks_for_plan(argument)]
    chips.stand_apart()
    try:
        config, workdir = cli.parse([argument for argument in argv if argument not in asked], needs_workdir=False)
        record = run(config, asked[-1].partition("=")[2] if asked else "")
        print(plan_tables.terminal(record))
        if workdir:
            records.write_results(Path(workdir) / "plan.json", **record)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: ConfigDict, name: str = "") -> dict:
    """Plans every stage of the config that trains or evaluates.

    Args:
      name: of the slice, such as "v5e:4x4"; "v5e" is the listed one of the mesh's size, "" the config's `chip`.

    Returns:
      the record: a row a step, and a row a stage with the smallest slice that holds it.

    Raises:
      UserError: for an unknown chip, a mesh that is no slice, sizes that do not divide over it, and configs with
        nothing to plan.
    """
    if not name and "chip" not in config:
        raise UserError("the config names no chip to plan for; name one, as in --plan=v5e or --plan=v5p:2x2x4")
    name = name or config.chip
    stages = [(stage, config[stage]) for stage in config.stages] if "stages" in config else [("", config)]
    planned = [(stage, section) for stage, section in stages if section.binary in _PLANNED]
    if not planned:
        raise UserError(f"nothing here can be planned: that is for stages of {' and '.join(_PLANNED)}")
    parts = [chips.slice_named(name, math.prod(meshes.sizes_of(section.mesh))) for _, section in planned]
    shelf, described = ModelCatalog(), []
    with _uncollected():
        for (stage, section), part in zip(planned, parts, strict=True):
            mesh = chips.make_mesh(part, {axis: section.mesh[axis] for axis in meshes.AXES})
            described.append(_described(stage, section, shelf, part, mesh))
        compiled = _all_compiled(described)
    summary = [
        smallest.summary(of.stage, of.section, of.resident_on, rows, of.part, dict(of.mesh.shape))
        for of, rows in zip(described, compiled, strict=True)
    ]
    rows = [row for rows in compiled for row in rows]
    return {"binary": "plan", "config": configs.to_plain(config), "rows": rows, "stages": summary}


def _all_compiled(described: Sequence["_Stage"]) -> list[list[dict]]:
    """The rows of each stage's steps, compiled side by side: a compiler leaves the interpreter to others."""
    jobs = [(of, *each) for of in described for each in of.executables]
    longest_first = sorted(range(len(jobs)), key=lambda index: steps.LONGEST_FIRST.index(jobs[index][1].name))
    # No more at a time than cores, which together take a fifth more of their time.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        begun = {index: pool.submit(_compiled, *jobs[index]) for index in longest_first}
    rows = (begun[index].result() for index in range(len(jobs)))
    return [list(itertools.islice(rows, len(of.executables))) for of in described]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without looks for garbage in cycles, of which a trace has next to none: they are a third of its time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A stage that is described and not compiled yet.

    Attributes:
      executables: steps, each with what a row says of it besides.
      resident_on: bytes on one chip of another mesh, by what they are.
    """

    stage: str
    section: ConfigDict
    part: chips.Slice
    mesh: Any
    executables: Sequence[tuple[steps.Step, Mapping]]
    resident_on: Callable[[Any], Mapping[str, int]]


def _described(stage: str, section: ConfigDict, shelf: ModelCatalog, part: chips.Slice, mesh: Any) -> _Stage:
    """Puts what a training stage makes on the shelf. Raises UserError for what does not fit the mesh."""
    if section.binary == "distill":
        training = steps.training(section, shelf, mesh)
        shelf.made[stage] = training.draft
        on = lambda other: steps.training(section, shelf, other).resident
        return _Stage(stage, section, part, mesh, [(step, {}) for step in steps.training_steps(training)], on)
    decodings, executables = list(steps.decodings(section, shelf, mesh)), []
    for of in decodings:
        about = {"drafter": of.name, "gamma": of.plan.gamma, "batch_size": of.batch, "capacity": of.plan.capacity}
        executables += [(step, about) for step in steps.decoding_steps(of)]

    def most(other: Any) -> Mapping[str, int]:
        return max((of.resident_on(other) for of in decodings), key=lambda resident: sum(resident.values()))

    return _Stage(stage, section, part, mesh, executables, most)


def _compiled(stage: _Stage, step: steps.Step, about: Mapping) -> dict:
    """The row of a step."""
    print(f"{stage.stage or 'plan'}: {step.name} for {stage.part.name}", file=sys.stderr, flush=True)
    compiled, seconds, words = account.compiled_step(step, stage.mesh)
    return {**account.row(stage.stage, step, stage.part, stage.mesh, compiled, seconds, words), **about}


if __name__ == "__main__":
    sys.exit(launch())
