"""Tables of plans: what each step takes of a chip, in the terminal and from committed records."""

from collections.abc import Callable, Mapping, Sequence

from specjax.reporting import tables

_GIB = 2**30
_FIRST = ("stage", "step", "slice", "mesh")
# Collectives by the letters that tables have room for.
_SHORT = {
    "all-gather": "gather",
    "all-reduce": "reduce",
    "all-to-all": "to all",
    "collective-permute": "permute",
    "reduce-scatter": "scatter",
}


def _gib(size: int | float | None) -> str | None:
    return None if size is None else f"{size / _GIB:.2f}"


def _seconds(seconds: int | float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _named(row: Mapping) -> str:
    """The step, and whose it is where an evaluation has several drafters."""
    about = f" ({row['drafter']}, gamma {row['gamma']}, batch {row['batch_size']})" if "drafter" in row else ""
    return row["step"] + about


def step_line(row: Mapping) -> dict:
    """A step as a line: GiB on one chip, work of one call, and the least time on the chip that it is planned for."""
    resident, memory = row["resident_bytes"], row.get("memory")
    sizes = row["mesh"]
    line = {
        "stage": row["stage"],
        "step": _named(row),
        "slice": row["slice"],
        "mesh": "x".join(str(sizes[axis]) for axis in ("data", "fsdp", "tensor")),
        "parameters": _gib(resident["parameters"]),
        "target": _gib(resident["target parameters"]),
        "optimizer": _gib(resident.get("optimizer", 0)),
        "cache": _gib(resident.get("cache", 0)),
        "temporary": None if memory is None else _gib(memory["temporary"]),
        "peak": _gib(row.get("peak_bytes")),
        "fits": "yes" if row["fits"] else "no",
    }
    if memory is not None:
        sent = {kind: of["sent"] for kind, of in row["collectives"].items()}
        line |= {
            "TFLOP": f"{row['flops'] / 1e12:.3g}",
            "GB moved": f"{row['bytes'] / 1e9:.3g}",
            "GB sent": f"{sum(sent.values()) / 1e9:.3g}",
            "at least": _seconds(row["roofline"][row["slice"].split(":")[0]]["seconds"]),
        }
    return line | {"compile s": f"{row['compile_seconds']:.0f}"}


def collective_lines(row: Mapping) -> list[dict]:
    """Collectives of a step, by kind."""
    return [
        {
            "stage": row["stage"],
            "step": _named(row),
            "collective": kind,
            "times": of["count"],
            "MB together": f"{of['bytes'] / 1e6:.4g}",
            "MB sent by a chip": f"{of['sent'] / 1e6:.4g}",
        }
        for kind, of in row.get("collectives", {}).items()
    ]


def roofline_line(row: Mapping) -> dict:
    """The least time of a step on each chip that is listed, with the same work a chip."""
    times = {name: _seconds(of["seconds"]) for name, of in row["roofline"].items()}
    return {"stage": row["stage"], "step": _named(row), **times}


def stage_line(summary: Mapping) -> str:
    """What a stage comes to, and the smallest slice that holds it."""
    stage, peak, smallest = summary["stage"] or "the run", summary["peak_bytes"], summary["smallest"]
    said = f"{stage} fits {summary['slice']}" if summary["fits"] else f"{stage} does not fit {summary['slice']}"
    if peak is not None:
        said += f" ({_gib(peak)} GiB on each chip)"
    if smallest is None:
        return f"{said}; no smaller slice was looked for" if peak is None else f"{said}; no listed slice holds it"
    shape = ", ".join(f"{axis} {size}" for axis, size in smallest["mesh"].items())
    return f"{said}; the smallest listed slice that holds it is {smallest['slice']} (mesh {shape})"


def terminal(record: Mapping) -> str:
    """The plan for the terminal."""
    rows = record["rows"]
    collectives = [line for row in rows for line in collective_lines(row)]
    compiled = [roofline_line(row) for row in rows if "roofline" in row]
    parts = ["What lies on each chip in GiB, and what one call of a step does on it", _table(map(step_line, rows))]
    if collectives:
        parts += ["Collectives of one call", _table(collectives)]
    if compiled:
        parts += ["The least time of one call on chips of each kind, this mesh and work", _table(compiled)]
    estimates = {row["compiler"] for row in rows} == {"CPU"}
    parts += ["Temporary memory is an estimate: compiled for CPUs in the GPUs' place."] if estimates else []
    for row in rows:
        parts += [f"{row['stage']}: {row['step']} is refused: {row['refusal']}"] if row["refusal"] else []
        for shape in row.get("gathered_weights", []) if row["step"] == "decode block" else []:
            parts.append(f"{row['stage']}: {row['step']} gathers weights of shape {shape} in its loop")
    return "\n\n".join([*parts, "\n".join(map(stage_line, record["stages"]))])


def _table(lines: Sequence[Mapping] | map, write: Callable = tables.aligned_table) -> str:
    lines = list(lines)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    return write([{key: line.get(key) for key in columns} for line in lines], columns)


def plan(record: Mapping) -> str:
    """A plan's steps, the least times elsewhere, and its smallest slices."""
    rows = record["rows"]
    steps = _table(map(step_line, rows), tables.markdown_table)
    times = _table([roofline_line(row) for row in rows if "roofline" in row], tables.markdown_table)
    return "\n\n".join([steps, times, "\n".join(f"- {stage_line(of)}" for of in record["stages"])])


def scaling(record: Mapping) -> str:
    """On-policy distillation at equal rows a chip: communication against compute of a step, by the number of chips."""
    stages: dict[str, list[Mapping]] = {}
    for row in record["rows"]:
        stages.setdefault(row["stage"], []).append(row)
    lines = []
    for rows in stages.values():
        chip = rows[0]["slice"].split(":")[0]
        total = lambda part, rows=rows, chip=chip: sum(row["roofline"][chip][part] for row in rows)
        sizes, busy = rows[0]["mesh"], max(total("compute"), total("memory"))
        lines.append(
            {
                "chips": rows[0]["chips"],
                "mesh": "x".join(str(sizes[axis]) for axis in ("data", "fsdp", "tensor")),
                "peak GiB": _gib(max(row["peak_bytes"] for row in rows)),
                "compute": _seconds(total("compute")),
                "memory": _seconds(total("memory")),
                "communication": _seconds(total("communication")),
                "communication / the larger of the two": f"{total('communication') / busy:.3f}",
            }
        )
    return tables.markdown_table(lines, list(lines[0]))
