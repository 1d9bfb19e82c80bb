"""Tables of configs/distillspec/README.md: functions of the committed records, over their seeds."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping

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
from configs.records.rows import by_recipe, gains, markdown, trained
from specjax.reporting import tables
from specjax.reporting.records import provenance

# The cost of a way to decode: target calls per token, which are the same on any machine, and relative latency.
_COSTS: dict[str, Callable[[Cell], float | None]] = {
    "target calls": lambda cell: 1 / cell.block_efficiency.mean,
    "latency": lambda cell: None if cell.latency is None else cell.latency.mean,
}


def lossy_groups(record: Mapping) -> Iterator[tuple[Cell, list[Cell]]]:
    """The lossless way to decode and the lossy ones, for each temperature and draft."""
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in cells(record):
        if cell.gamma:
            groups.setdefault((cell.temperature, cell.drafter), []).append(cell)
    for group in groups.values():
        lossy_cells = [cell for cell in group if cell.lenience is not None]
        if lossy_cells:
            yield next(cell for cell in group if cell.lenience is None), lossy_cells


def operating_cell(record: Mapping, lossy_cells: list[Cell], by: str) -> Cell | None:
    """The lossy setting with the lowest cost whose quality is within LOSS of plain decoding's."""
    by_label = {cell.label: cell for cell in lossy_cells}
    points = [Point(label, _COSTS[by](cell), cell.quality.mean) for label, cell in by_label.items()]
    best = operating_point(points, least_quality(cells(record), lossy_cells[0].temperature))
    return None if best is None else by_label[best.name]


def lossy_points(record: Mapping) -> list[dict]:
    """The operating point for each temperature, draft and measured cost, compared with the lossless rule."""
    lines = []
    for exact, lossy_cells in lossy_groups(record):
        for by, cost in _COSTS.items():
            if any(cost(cell) is None for cell in (exact, *lossy_cells)):
                continue
            best = operating_cell(record, lossy_cells, by)
            line = {"temperature": exact.temperature, "draft": exact.drafter, "by": by}
            line["lossy rule"] = "none within the loss" if best is None else best.label
            line |= {key: None if best is None else _scores(best)[key] for key in ("quality", "lost")}
            line["against lossless"] = None if best is None else f"{100 * (cost(best) / cost(exact) - 1):+.1f}%"
            lines.append(line)
    return lines


def lossy_fronts(record: Mapping) -> dict[str, int]:
    """How many settings of each lossy rule are on the Pareto front of quality and target calls.

    There is one front for each temperature and draft. The lossless rule competes and is not counted.
    """
    counts: dict[str, int] = {}
    for exact, lossy_cells in lossy_groups(record):
        by_label = {cell.label: cell for cell in (exact, *lossy_cells)}
        points = [Point(label, 1 / cell.block_efficiency.mean, cell.quality.mean) for label, cell in by_label.items()]
        front = [by_label[point.name] for point in pareto_front(points)]
        for cell in lossy_cells:
            counts[cell.rule] = counts.get(cell.rule, 0) + (cell in front)
    return counts


def _scores(cell: Cell) -> dict[str, str | None]:
    return {
        "quality": str(cell.quality),
        "lost": str(cell.lost),
        "block efficiency": str(cell.block_efficiency),
        "relative latency": None if cell.latency is None else str(cell.latency),
    }


def lossy(record: Mapping) -> str:
    """Markdown tables of the operating points and of every decoding setting."""
    settings = lambda cell: {"temperature": cell.temperature, "draft": cell.drafter, "rule": cell.label}
    columns = lambda cell: settings(cell) | {"gamma": cell.gamma, "block efficiency": str(cell.block_efficiency)}
    lines = [columns(cell) | _scores(cell) for cell in cells(record)]
    head = f"Operating points within {100 * LOSS:g}% of plain decoding's quality:"
    return "\n\n".join([head, markdown(lossy_points(record)), "All settings:", markdown(lines), _source(record)])


def _source(record: Mapping) -> str:
    """The metric, the prompts, the seeds, and the machine of the numbers in a table."""
    rows = record["rows"]
    judged = next(row for row in rows if row["stage"] == "quality")
    seeds = ", ".join(str(seed) for seed in sorted({row["run_seed"] for row in rows}))
    return (
        f"Quality is {main_metric(rows)} on {judged['prompts']} prompts of `{judged['task']}` a seed; "
        f"seeds {seeds}; ± is half a 95% interval by Student's t over seeds. "
        f"{provenance(record)}."
    )


# How a model of the garden is decoded, by the end of its drafter's name.
_DRAFTS = {"sd": "SD", "distillspec": "DistillSpec"}


@dataclasses.dataclass(frozen=True)
class Member:
    """A model of the garden with its decoding method: "plain", "SD" or "DistillSpec"."""

    model: str
    decoded: str
    cell: Cell

    @property
    def name(self) -> str:
        return f"{self.model}, {self.decoded}"

    @property
    def point(self) -> Point:
        return Point(self.name, self.cell.latency.mean, self.cell.quality.mean)


def garden_members(record: Mapping) -> list[Member]:
    """Every model and way to decode it. The plainly decoded largest model, "large", is the baseline "none"."""
    members = []
    for cell in cells(record):
        model, _, draft = ("large", "", "") if cell.drafter == "none" else cell.drafter.rpartition("_")
        members.append(Member(model, _DRAFTS[draft] if cell.gamma else "plain", cell))
    return members


def garden_best(record: Mapping) -> Member | None:
    """The member with the lowest latency and a quality within LOSS of the largest model's; None if none was timed."""
    members = {member.name: member for member in garden_members(record)}
    ways = [member.cell for member in members.values()]
    points = [member.point for member in members.values() if member.cell.latency is not None]
    best = operating_point(points, least_quality(ways, ways[0].temperature))
    return None if best is None else members[best.name]


def garden_parts(record: Mapping, best: Member) -> list[dict]:
    """What each part contributes on the way from the plainly decoded largest model to `best`, one after another.

    The factor is the latency with the part divided by the latency without it.
    """
    size = best.model.removesuffix("_kd").removesuffix("_raw")
    steps = {"the largest model, decoded plainly": "large, plain"}
    if size != "large":
        steps[f"smaller target ({size})"] = f"{size}_raw, plain"
    if best.model.endswith("_kd"):
        steps["distilled for the task (KD)"] = f"{size}_kd, plain"
    if best.decoded != "plain":
        steps["speculative decoding (SD)"] = f"{best.model}, SD"
    if best.decoded == "DistillSpec":
        steps["its draft distilled (DistillSpec)"] = best.name
    members = {member.name: member.cell for member in garden_members(record)}
    lines, before = [], None
    for part, cell in ((part, members[name]) for part, name in steps.items()):
        line = {"part": part, "quality": str(cell.quality), "relative latency": str(cell.latency)}
        line["factor"] = None if before is None else cell.latency.mean / before.latency.mean
        line["change in quality"] = None if before is None else cell.quality.mean - before.quality.mean
        lines.append(line)
        before = cell
    return lines


def garden(record: Mapping) -> str:
    """The best member, the contribution of each of its parts, then every member."""
    members, best = garden_members(record), garden_best(record)
    parameters = {row["stage"]: row["params"] for row in record["rows"] if "params" in row}
    front = {point.name for point in pareto_front([m.point for m in members if m.cell.latency is not None])}
    lines = [
        {"model": member.model, "decoded": member.decoded, "parameters": parameters[member.model]}
        | _scores(member.cell)
        | {"on the front": member.name in front if front else None}
        for member in members
    ]
    head = ["Latencies are not measured yet."]
    if best is not None:
        plain = next(member.cell for member in members if member.name == "large, plain")
        line = (
            f"Best within {100 * LOSS:g}% of the largest model's quality: {best.name}, relative latency 1 to "
            f"{best.cell.latency} ({1 / best.cell.latency.mean:.1f}x lower), "
            f"quality {plain.quality} to {best.cell.quality}."
        )
        head = [line, markdown(garden_parts(record, best))]
    return "\n\n".join([*head, markdown(lines), _source(record)])


def distillation_memory(record: Mapping) -> str:
    """Megabytes of a training step by vocabulary: by formula, compiler and system; in chunks and all at once."""
    columns = {"vocabulary": "vocabulary", "logits_megabytes": "all logits, once"}
    for way in ("chunked", "whole"):
        for account in ("on_paper", "compiled", "peak"):
            columns[f"{way}_{account}_megabytes"] = f"{way}, {account.replace('_', ' ')}"
    rows = record["rows"]
    run = (
        f"{rows[0]['positions']} positions, chunks of {rows[0]['chunk']}; a draft "
        f"{record['config']['models']['draft']['width']} wide; {provenance(record)}"
    )
    return f"{tables.markdown_table(rows, columns)}\n\n{run}"


def study(record: Mapping) -> str:
    """Each recipe over its seeds: what training took, block efficiency, and its gain over each control.

    Gains are paired by seed: mean and range in percent. The record is the results.json of
    configs/quickstart_controls.py, whose stages and drafters are named RECIPE_SEED.
    """
    training, lines = trained(record), []
    evaluated = [row for row in record["rows"] if row.get("drafter") in training]
    groups = [
        (gamma, temperature, recipes)
        for gamma in sorted({row["gamma"] for row in evaluated})
        for temperature, recipes in by_recipe(row for row in evaluated if row["gamma"] == gamma).items()
    ]
    for gamma, temperature, recipes in groups:
        values = {
            recipe: {seed: rows[seed]["block_efficiency"] for seed in sorted(rows)} for recipe, rows in recipes.items()
        }
        for recipe, rows in recipes.items():
            mean = lambda key, recipe=recipe, rows=rows: statistics.fmean(training[f"{recipe}_{s}"][key] for s in rows)
            line = {"recipe": recipe, "temperature": temperature, "gamma": gamma}
            line |= {"steps": mean("steps"), "train_seconds": mean("train_seconds")}
            line["block_efficiency"] = statistics.fmean(values[recipe].values())
            line["by seed"] = " ".join(f"{value:.3f}" for value in values[recipe].values())
            for control in (name for name in recipes if name.startswith("control")):
                gained = gains(values[recipe], values[control]) if control != recipe else []
                line[f"over {control}"] = _mean_and_range(gained) if gained else None
            lines.append(line)
    return markdown(lines)


def _mean_and_range(percents: list[float]) -> str:
    return f"{statistics.fmean(percents):+.1f}% ({min(percents):+.1f} to {max(percents):+.1f})"
