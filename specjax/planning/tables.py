"""Makes the tables of a cost report: memory, work and least time of each step on a chip."""

from collections.abc import Callable, Iterable, Mapping

from specjax.reporting import tables

_GIB = 2**30


def gib(size: int | float | None) -> str | None:
    """A number of bytes as text in GiB; None for None."""
    return None if size is None else f"{size / _GIB:.2f}"


def seconds(x: int | float) -> str:
    """A duration as text, in milliseconds if it is below one second."""
    return f"{1e3 * x:.3g} ms" if x < 1 else f"{x:.3g} s"


def _named(row: Mapping) -> str:
    """The name of a row's step, with its drafter, gamma and batch size in an evaluation."""
    drafter = f" ({row['drafter']}, gamma {row['gamma']}, batch {row['batch_size']})" if "drafter" in row else ""
    return row["step"] + drafter


def mesh_text(row: Mapping) -> str:
    """The sizes of a row's mesh as text, such as "1x2x8"."""
    return "x".join(str(row["mesh"][axis]) for axis in ("data", "fsdp", "tensor"))


def step_line(row: Mapping) -> dict:
    """The table line of a step: GiB on one chip, work of one call, and the least time on the report's chip."""
    resident, memory = row["resident_bytes"], row.get("memory")
    line = {
        "stage": row["stage"],
        "step": _named(row),
        "slice": row["slice"],
        "mesh": mesh_text(row),
        "parameters": gib(resident["parameters"]),
        "target": gib(resident["target parameters"]),
        "optimizer": gib(resident.get("optimizer", 0)),
        "cache": gib(resident.get("cache", 0)),
        "temporary": None if memory is None else gib(memory["temporary"]),
        "peak": gib(row.get("peak_bytes")),
        "fits": "yes" if row["fits"] else "no",
    }
    if memory is not None:
        sent = {kind: of["sent"] for kind, of in row["collectives"].items()}
        line |= {
            "TFLOP": f"{row['flops'] / 1e12:.3g}",
            "GB moved": f"{row['bytes'] / 1e9:.3g}",
            "GB sent": f"{sum(sent.values()) / 1e9:.3g}",
            "at least": seconds(row["roofline"][row["slice"].split(":")[0]]["seconds"]),
        }
    return line | {"compile s": f"{row['compile_seconds']:.0f}"}


def collective_lines(row: Mapping) -> list[dict]:
    """The table lines of a step's collectives, one for each kind."""
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
    """The table line of a step with its least time on every listed chip, for the same work per chip."""
    times = {name: seconds(of["seconds"]) for name, of in row["roofline"].items()}
    return {"stage": row["stage"], "step": _named(row), **times}


def stage_line(summary: Mapping) -> str:
    """A sentence on whether a stage fits its slice, and on the smallest slice that it fits."""
    stage, peak, smallest = summary["stage"] or "the run", summary["peak_bytes"], summary["smallest"]
    text = f"{stage} fits {summary['slice']}" if summary["fits"] else f"{stage} does not fit {summary['slice']}"
    if peak is not None:
        text += f" ({gib(peak)} GiB on each chip)"
    if smallest is None:
        return f"{text}; no smaller slice was tried" if peak is None else f"{text}; no listed slice holds it"
    shape = ", ".join(f"{axis} {size}" for axis, size in smallest["mesh"].items())
    return f"{text}; the smallest listed slice that holds it is {smallest['slice']} (mesh {shape})"


def terminal(record: Mapping) -> str:
    """All tables of a cost report, for the terminal."""
    rows = record["rows"]
    collectives = [line for row in rows for line in collective_lines(row)]
    compiled = [roofline_line(row) for row in rows if "roofline" in row]
    parts = ["Memory on each chip in GiB, and the work of one call of each step", table(map(step_line, rows))]
    if collectives:
        parts += ["Collectives of one call", table(collectives)]
    if compiled:
        parts += ["The least time of one call on each kind of chip, with this mesh and work", table(compiled)]
    estimates = {row["compiler"] for row in rows} == {"CPU"}
    parts += ["Temporary memory is an estimate: compiled for CPUs in place of GPUs."] if estimates else []
    for row in rows:
        parts += [f"{row['stage']}: {row['step']} does not compile: {row['refusal']}"] if row["refusal"] else []
        for shape in row.get("gathered_weights", []) if row["step"] == "decode block" else []:
            parts.append(f"{row['stage']}: {row['step']} gathers weights of shape {shape} in its loop")
    return "\n\n".join([*parts, "\n".join(map(stage_line, record["stages"]))])


def table(lines: Iterable[Mapping], write: Callable = tables.aligned_table) -> str:
    """Makes a table with `write` from lines that may have different columns."""
    lines = list(lines)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    return write([{key: line.get(key) for key in columns} for line in lines], columns)
