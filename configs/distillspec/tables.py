"""Tables of configs/distillspec/README.md: functions of the committed records, over their seeds."""

import statistics
from collections.abc import Iterator, Mapping

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
from configs.records.rows import by_recipe, gains, markdown, provenance, trained
from specjax.reporting import tables


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


def operating_cell(record: Mapping, lossy_cells: list[Cell]) -> Cell | None:
    """The lossy setting with the fewest target calls whose quality is within LOSS of plain decoding's."""
    least = least_quality(cells(record), lossy_cells[0].temperature)
    return operating_point({cell: cell.counted for cell in lossy_cells}, least)


def lossy_points(record: Mapping) -> list[dict]:
    """The operating point for each temperature, draft and measured cost, compared with the lossless rule."""
    lines = []
    for exact, lossy_cells in lossy_groups(record):
        members = (exact, *lossy_cells)
        costs = {"target calls": {cell: cell.counted for cell in members}}
        if all(cell.latency is not None for cell in members):
            costs["latency"] = {cell: cell.timed for cell in members}
        for by, points in costs.items():
            least = least_quality(cells(record), exact.temperature)
            best = operating_point({cell: points[cell] for cell in lossy_cells}, least)
            line = {"temperature": exact.temperature, "draft": exact.drafter, "by": by}
            line["lossy rule"] = "none within the loss" if best is None else best.label
            line |= {key: None if best is None else best.scores[key] for key in ("quality", "lost")}
            change = None if best is None else f"{100 * (points[best].cost / points[exact].cost - 1):+.1f}%"
            lines.append(line | {"against lossless": change})
    return lines


def lossy_fronts(record: Mapping) -> dict[str, int]:
    """How many settings of each lossy rule are on the Pareto front of quality and target calls.

    There is one front for each temperature and draft. The lossless rule competes and is not counted.
    """
    counts: dict[str, int] = {}
    for exact, lossy_cells in lossy_groups(record):
        front = pareto_front({cell: cell.counted for cell in (exact, *lossy_cells)})
        for cell in lossy_cells:
            counts[cell.rule] = counts.get(cell.rule, 0) + (cell in front)
    return counts


def lossy(record: Mapping) -> str:
    """Markdown tables of the operating points and of every decoding setting."""
    # The block efficiency comes before the other scores.
    lines = [
        {"temperature": cell.temperature, "draft": cell.drafter, "rule": cell.label, "gamma": cell.gamma}
        | {"block efficiency": None}
        | cell.scores
        for cell in cells(record)
    ]
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


def garden_members(record: Mapping) -> dict[str, Cell]:
    """Every way to decode, by "MODEL, plain", "MODEL, SD" or "MODEL, DistillSpec".

    The plainly decoded largest model, "large", is the baseline "none".
    """
    members = {}
    for cell in cells(record):
        model, _, draft = ("large", "", "") if cell.drafter == "none" else cell.drafter.rpartition("_")
        members[f"{model}, {_DRAFTS[draft] if cell.gamma else 'plain'}"] = cell
    return members


def garden_best(record: Mapping) -> str | None:
    """The member with the lowest latency and a quality within LOSS of the largest model's; None if none was timed."""
    members = garden_members(record)
    least = least_quality(list(members.values()), next(iter(members.values())).temperature)
    return operating_point(garden_points(members), least)


def garden_points(members: Mapping[str, Cell]) -> dict[str, Point]:
    """Relative latency and quality of the members that were timed."""
    return {name: cell.timed for name, cell in members.items() if cell.latency is not None}


def garden_parts(record: Mapping, best: str) -> list[dict]:
    """What each part contributes on the way from the plainly decoded largest model to `best`, one after another.

    The factor is the latency with the part divided by the latency without it.
    """
    model, decoded = best.split(", ")
    size = model.removesuffix("_kd").removesuffix("_raw")
    steps = {"the largest model, decoded plainly": "large, plain"}
    if size != "large":
        steps[f"smaller target ({size})"] = f"{size}_raw, plain"
    if model.endswith("_kd"):
        steps["distilled for the task (KD)"] = f"{size}_kd, plain"
    if decoded != "plain":
        steps["speculative decoding (SD)"] = f"{model}, SD"
    if decoded == "DistillSpec":
        steps["its draft distilled (DistillSpec)"] = best
    members = garden_members(record)
    lines, previous = [], None
    for part, cell in ((part, members[name]) for part, name in steps.items()):
        line = {"part": part, "quality": cell.quality.plus_minus, "relative latency": cell.latency.plus_minus}
        line["factor"] = None if previous is None else cell.latency.value / previous.latency.value
        line["change in quality"] = None if previous is None else cell.quality.value - previous.quality.value
        lines.append(line)
        previous = cell
    return lines


def garden(record: Mapping) -> str:
    """The best member, the contribution of each of its parts, then every member."""
    members, best = garden_members(record), garden_best(record)
    parameters = {row["stage"]: row["params"] for row in record["rows"] if "params" in row}
    front, lines = pareto_front(garden_points(members)), []
    for name, cell in members.items():
        model, decoded = name.split(", ")
        line = {"model": model, "decoded": decoded, "parameters": parameters[model], **cell.scores}
        lines.append(line | {"on the front": name in front if front else None})
    head = ["Latencies are not measured yet."]
    if best is not None:
        plain, fastest = members["large, plain"], members[best]
        line = (
            f"Best within {100 * LOSS:g}% of the largest model's quality: {best}, relative latency 1 to "
            f"{fastest.latency.plus_minus} ({1 / fastest.latency.value:.1f}x lower), "
            f"quality {plain.quality.plus_minus} to {fastest.quality.plus_minus}."
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
    for gamma in sorted({row["gamma"] for row in evaluated}):
        for temperature, recipes in by_recipe(row for row in evaluated if row["gamma"] == gamma).items():
            values = {
                recipe: {seed: rows[seed]["block_efficiency"] for seed in sorted(rows)}
                for recipe, rows in recipes.items()
            }
            for recipe, by_seed in values.items():
                trainings = [training[f"{recipe}_{seed}"] for seed in by_seed]
                line = {"recipe": recipe, "temperature": temperature, "gamma": gamma}
                line |= {key: statistics.fmean(row[key] for row in trainings) for key in ("steps", "train_seconds")}
                line["block_efficiency"] = statistics.fmean(by_seed.values())
                line["by seed"] = " ".join(f"{value:.3f}" for value in by_seed.values())
                for control in (name for name in recipes if name.startswith("control")):
                    gained = gains(by_seed, values[control]) if control != recipe else []
                    line[f"over {control}"] = _mean_and_range(gained) if gained else None
                lines.append(line)
    return markdown(lines)


def _mean_and_range(percents: list[float]) -> str:
    return f"{statistics.fmean(percents):+.1f}% ({min(percents):+.1f} to {max(percents):+.1f})"
