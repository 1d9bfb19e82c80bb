"""Plans a config for chips that need not be there: what each step takes of a chip, whether it fits, what it costs.

    python -m specjax.main --config=configs/plan/pairs.py:llama_65b --plan
    python -m specjax.main --config=configs/quickstart.py --plan=v5e:2x2 --config.distilled.mesh.tensor=4

`--plan` alone takes the config's own `chip`. The steps are those that a run compiles, made for the slice from shapes:
no weights are read, and of a checkpoint its `config.json` is enough. For a TPU the TPU compiler itself says what fits;
for GPUs the CPU compiler stands in, and what it says of temporary memory is an estimate.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax.planning import account, smallest, steps
from specjax.planning.models import Shelf
from specjax.reporting import plan_tables, records
from specjax.runtime import chips, cli
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
    parts = [chips.slice_named(name, _size(section)) for _, section in planned]
    shelf, rows, summary = Shelf(), [], []
    for (stage, section), part in zip(planned, parts, strict=True):
        sizes = {axis: section.mesh[axis] for axis in meshes.AXES}
        mesh = chips.make_mesh(part, sizes)
        found, needs = _planned(stage, section, shelf, part, mesh)
        rows += found
        summary.append(smallest.summary(stage, section, needs, found, part, sizes))
    return {"binary": "plan", "config": configs.to_plain(config), "rows": rows, "stages": summary}


def _size(section: ConfigDict) -> int:
    sizes = [section.mesh[axis] for axis in meshes.AXES]
    if min(sizes) < 1:
        raise UserError(f"every axis of a mesh needs at least 1, and mesh is {' x '.join(map(str, sizes))}")
    return sizes[0] * sizes[1] * sizes[2]


def _planned(stage: str, section: ConfigDict, shelf: Shelf, part: chips.Slice, mesh: Any) -> tuple[list[dict], Any]:
    """The rows of a stage, and a function that tells its resident bytes on another mesh."""
    if section.binary == "distill":
        described = steps.training(section, shelf, mesh)
        shelf.made[stage] = described.draft
        rows = list(_rows(stage, steps.training_steps(described), part, mesh))
        return rows, lambda other: steps.training(section, shelf, other).resident
    rows = []
    for decoding in steps.decodings(section, shelf, mesh):
        found = _rows(stage, steps.decoding_steps(decoding), part, mesh)
        about = {"drafter": decoding.name, "gamma": decoding.plan.gamma, "batch_size": decoding.batch}
        rows += [{**row, **about, "capacity": decoding.plan.capacity} for row in found]
    most = lambda every: max(every, key=lambda resident: sum(resident.values()))
    return rows, lambda other: most([decoding.resident for decoding in steps.decodings(section, shelf, other)])


def _rows(stage: str, planned: Iterator[steps.Step], part: chips.Slice, mesh: Any) -> Iterator[Mapping]:
    before = None
    for step in planned:
        if step.needs_before and before is None:
            return  # what it goes on from was refused
        print(f"{stage or 'plan'}: {step.name} for {part.name}", file=sys.stderr, flush=True)
        before, seconds, words = account.compiled_step(step, before, mesh)
        yield account.row(stage, step, part, mesh, before, seconds, words)


if __name__ == "__main__":
    sys.exit(launch())
