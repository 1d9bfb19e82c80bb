"""Tables of configs/distillspec/README.md: functions of the committed records, over their seeds."""

import dataclasses
from collections.abc import Callable, Mapping

from configs.distillspec.tradeoffs import (
    LOSS,
    Cell,
    Point,
    cells,
    least_quality,
    main_metric,
    operating_point,
    pareto_front,
)
from specjax.reporting import tables
from specjax.reporting.records import provenance


def lossy_points(record: Mapping) -> list[dict]:
    """A line for each temperature, draft and measure: the best lossy setting within LOSS, beside the exact rule.

    Measures are block efficiency, which is the same on any machine, and latency, where it was measured.
    """
    found, lines = cells(record), []
    groups = dict.fromkeys((c.temperature, c.drafter) for c in found if c.lenience is not None)
    for temperature, drafter in groups:
        mine = [cell for cell in found if (cell.temperature, cell.drafter) == (temperature, drafter) and cell.gamma]
        for measure, cost in _MEASURES.items():
            if any(cost(cell) is None for cell in mine):
                continue
            exact = next(cell for cell in mine if cell.lenience is None)
            by_label = {cell.label: cell for cell in mine if cell.lenience is not None}
            points = [Point(label, cost(cell), cell.quality.mean) for label, cell in by_label.items()]
            best = operating_point(points, least_quality(found, temperature))
            line = {"temperature": temperature, "draft": drafter, "by": measure, "lossy rule": "none within the loss"}
            if best is not None:
                chosen = by_label[best.name]
                line |= {
                    "lossy rule": best.name,
                    "quality": str(chosen.quality),
                    "lost": str(chosen.lost),
                    "against lossless": f"{100 * (best.cost / cost(exact) - 1):+.1f}%",
                }
            lines.append(line)
    return lines


def lossy_fronts(record: Mapping) -> dict[str, int]:
    """How many settings of each lossy rule no other, at equal temperature and draft, beats in quality and target calls.

    The exact rule competes too, and is not counted.
    """
    counts = {cell.rule: 0 for cell in cells(record) if cell.lenience is not None}
    groups: dict[tuple, dict[str, Cell]] = {}
    for cell in cells(record):
        if cell.gamma:
            groups.setdefault((cell.temperature, cell.drafter), {})[cell.label] = cell
    for group in groups.values():
        points = [Point(label, _MEASURES["target calls"](cell), cell.quality.mean) for label, cell in group.items()]
        for point in pareto_front(points):
            if group[point.name].lenience is not None:
                counts[group[point.name].rule] += 1
    return counts


# What a point costs: target calls a token, seconds a token.
_MEASURES: dict[str, Callable[[Cell], float | None]] = {
    "target calls": lambda cell: 1 / cell.block_efficiency.mean,
    "latency": lambda cell: None if cell.latency is None else cell.latency.mean,
}


def lossy(record: Mapping) -> str:
    """The operating points, then every setting."""
    lines = [
        {
            "temperature": cell.temperature,
            "draft": cell.drafter,
            "rule": cell.label,
            "gamma": cell.gamma,
            "block efficiency": str(cell.block_efficiency),
            "quality": str(cell.quality),
            "lost": str(cell.lost),
            "relative latency": None if cell.latency is None else str(cell.latency),
        }
        for cell in cells(record)
    ]
    points = lossy_points(record)
    columns = list(dict.fromkeys(key for line in points for key in line))
    head = f"Operating points within {100 * LOSS:g}% of plain decoding's quality:"
    told = tables.markdown_table(points, columns)
    return "\n\n".join([head, told, "All settings:", tables.markdown_table(lines, list(lines[0])), source(record)])


def source(record: Mapping) -> str:
    """What the numbers are made of, for below a table."""
    rows = record["rows"]
    judged = next(row for row in rows if row["stage"] == "quality")
    seeds = ", ".join(str(seed) for seed in sorted({row["run_seed"] for row in rows}))
    return (
        f"Quality is {main_metric(rows)} on {judged['prompts']} prompts of `{judged['task']}` a seed; "
        f"seeds {seeds}; ± is half a 95% interval by Student's t over seeds. "
        f"{provenance(record)}."
    )


# How a model of the garden is decoded, by the end of its drafter's name; at gamma 0, plainly.
_DRAFTS = {"sd": "SD", "distillspec": "DistillSpec"}


@dataclasses.dataclass(frozen=True)
class Kept:
    """A model of the garden and how it is decoded: "plain", "SD" or "DistillSpec"."""

    model: str
    decoded: str
    cell: Cell

    @property
    def name(self) -> str:
        return f"{self.model}, {self.decoded}"


def garden_members(record: Mapping) -> list[Kept]:
    """Every model and draft of the record. The largest model, "large", decoded plainly is the baseline "none"."""
    members = []
    for cell in cells(record):
        model, _, draft = ("large", "", "") if cell.drafter == "none" else cell.drafter.rpartition("_")
        members.append(Kept(model, _DRAFTS[draft] if cell.gamma else "plain", cell))
    return members


def garden_best(record: Mapping) -> Kept | None:
    """The member with the least latency within LOSS of the largest model's quality; None where none was timed."""
    members = {kept.name: kept for kept in garden_members(record) if kept.cell.latency is not None}
    found = [kept.cell for kept in garden_members(record)]
    points = [Point(name, kept.cell.latency.mean, kept.cell.quality.mean) for name, kept in members.items()]
    best = operating_point(points, least_quality(found, found[0].temperature))
    return None if best is None else members[best.name]


def garden_parts(record: Mapping, best: Kept) -> list[dict]:
    """What each part brought on the way from the largest model, decoded plainly, to `best`, one after another.

    The factor is the latency behind a part over that before it.
    """
    size = best.model.removesuffix("_kd").removesuffix("_raw")
    steps = [("the largest model, decoded plainly", "large, plain")]
    if size != "large":
        steps.append((f"smaller target ({size})", f"{size}_raw, plain"))
    if best.model.endswith("_kd"):
        steps.append(("distilled for the task (KD)", f"{size}_kd, plain"))
    if best.decoded != "plain":
        steps.append(("speculative decoding (SD)", f"{best.model}, SD"))
    if best.decoded == "DistillSpec":
        steps.append(("its draft distilled (DistillSpec)", best.name))
    members = {kept.name: kept.cell for kept in garden_members(record)}
    lines, before = [], None
    for part, name in steps:
        cell = members[name]
        factor = None if before is None else cell.latency.mean / before.latency.mean
        change = None if before is None else cell.quality.mean - before.quality.mean
        told = {"quality": str(cell.quality), "relative latency": str(cell.latency)}
        lines.append({"part": part, **told, "factor": factor, "change in quality": change})
        before = cell
    return lines


def garden_line(record: Mapping) -> str:
    """The line that the paper prints: the best member within a stated loss, and its latency."""
    best = garden_best(record)
    if best is None:
        return "Latencies are not measured yet."
    plain = next(kept.cell for kept in garden_members(record) if kept.name == "large, plain")
    return (
        f"Best within {100 * LOSS:g}% of the largest model's quality: {best.name}, relative latency 1 to "
        f"{best.cell.latency} ({1 / best.cell.latency.mean:.1f}x lower), "
        f"quality {plain.quality} to {best.cell.quality}."
    )


def garden(record: Mapping) -> str:
    """The best member, what each part brought to it, then every member."""
    members, best = garden_members(record), garden_best(record)
    parameters = {row["stage"]: row["params"] for row in record["rows"] if "params" in row}
    timed = [kept for kept in members if kept.cell.latency is not None]
    points = [Point(kept.name, kept.cell.latency.mean, kept.cell.quality.mean) for kept in timed]
    front = {point.name for point in pareto_front(points)}
    lines = [
        {
            "model": kept.model,
            "decoded": kept.decoded,
            "parameters": parameters[kept.model],
            "quality": str(kept.cell.quality),
            "lost": str(kept.cell.lost),
            "block efficiency": str(kept.cell.block_efficiency),
            "relative latency": None if kept.cell.latency is None else str(kept.cell.latency),
            "on the front": kept.name in front if timed else None,
        }
        for kept in members
    ]
    written = [garden_line(record)]
    if best is not None:
        parts = garden_parts(record, best)
        written.append(tables.markdown_table(parts, list(parts[0])))
    return "\n\n".join([*written, tables.markdown_table(lines, list(lines[0])), source(record)])


def distillation_memory(record: Mapping) -> str:
    """Megabytes of a step at each vocabulary, by formula, compiler and system; in chunks, and all positions at once."""
    columns = {"vocabulary": "vocabulary", "logits_megabytes": "all logits, once"}
    for way in ("chunked", "whole"):
        columns |= {f"{way}_{name}_megabytes": f"{way}, {name.replace('_', ' ')}" for name in _ACCOUNTS}
    rows, config = record["rows"], record["config"]
    run = (
        f"{rows[0]['positions']} positions, chunks of {rows[0]['chunk']}; a draft {config['models']['draft']['width']} "
        f"wide; {provenance(record)}"
    )
    return f"{tables.markdown_table(rows, columns)}\n\n{run}"


_ACCOUNTS = ("on_paper", "compiled", "peak")


TABLES: dict[str, Callable[[Mapping], str]] = {
    "lossy": lossy,
    "garden": garden,
    "distillation_memory": distillation_memory,
}
