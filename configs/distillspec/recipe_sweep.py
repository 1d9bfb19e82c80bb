"""The recipe sweep of configs/distillspec/sweep.py: its tables and its heat map, of whatever is finished.

A record is that of `reporting/condense.py`. Stages and drafters are named CELL_SEED, and a cell of the matrix
TEXT_DIVERGENCE. Every gain is paired: a seed's draft against the draft of the same seed that it is compared with, on
the same prompts. Intervals are 95% intervals over seeds by Student's t.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.distillspec import heatmaps
from configs.distillspec.tradeoffs import Estimate
from specjax.reporting import page, tables
from specjax.reporting.records import provenance

TEXTS = ("fixed", "draft", "target", "mixed")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation")
NEWER = ("negative_log_acceptance", "lk_hybrid")
UNDISTILLED = "supervised"


def efficiencies(record: Mapping) -> dict[float, dict[str, dict[int, float]]]:
    """{temperature: {cell: {seed: block efficiency}}} of every draft that was trained."""
    trained = {row["stage"] for row in record["rows"] if "train_seconds" in row}
    found: dict[float, dict[str, dict[int, float]]] = {}
    for row in record["rows"]:
        cell, _, seed = row.get("drafter", "").rpartition("_")
        if row.get("drafter") in trained and seed.isdigit() and not row["stage"].startswith("transfer"):
            found.setdefault(row["temperature"], {}).setdefault(cell, {})[int(seed)] = row["block_efficiency"]
    return {temperature: found[temperature] for temperature in sorted(found)}


def is_sweep(record: Mapping) -> bool:
    """Whether there is a gain for any cell of the matrix."""
    found = (matrix(cells) for cells in efficiencies(record).values())
    return any(value is not None for lines in found for line in lines for value in line)


def gains(values: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Percent by which `values` exceed `others`, over the seeds that both have."""
    return [100 * (values[seed] / others[seed] - 1) for seed in sorted(values) if seed in others]


def _said(values: Sequence[float]) -> str | None:
    """A mean gain, and its interval where there are seeds enough for one."""
    if not values:
        return None
    return said(Estimate.of(values))


def said(gain: Estimate) -> str:
    """A gain in percent with its interval."""
    within = "(1 seed)" if gain.half is None else f"[{gain.mean - gain.half:+.1f}, {gain.mean + gain.half:+.1f}]"
    return f"{gain.mean:+.1f}% {within}"


def matrix(cells: Mapping[str, Mapping[int, float]]) -> list[list[float | None]]:
    """Mean gain over the undistilled draft, a line for each text and a column for each divergence."""
    undistilled = cells.get(UNDISTILLED, {})
    found = lambda cell: gains(cells.get(cell, {}), undistilled)
    mean = lambda values: statistics.fmean(values) if values else None
    return [[mean(found(f"{text}_{divergence}")) for divergence in DIVERGENCES] for text in TEXTS]


def heat_map(record: Mapping, path: str | Path) -> None:
    """Gain over the undistilled draft in percent, by text and divergence, a panel for each temperature."""
    panels = {f"temperature {temperature:g}": matrix(cells) for temperature, cells in efficiencies(record).items()}
    heatmaps.heat_map(
        panels,
        path,
        rows=[f"{text} text" for text in TEXTS],
        columns=[tables.heading(divergence) for divergence in DIVERGENCES],
        label="block efficiency over the undistilled draft, %",
    )


def table(record: Mapping) -> str:
    """Every draft; then what was compared; then transfer; then how the target's text was written."""
    parts = [_markdown(lines) for lines in (drafts(record), comparisons(record), transfers(record)) if lines]
    written = [row for row in record["rows"] if "drafted_tokens_per_second" in row]
    if written:
        columns = ["stage", "batch_size", "rows", "tokens", "plain_tokens_per_second", "drafted_tokens_per_second"]
        parts.append(tables.markdown_table(written, [*columns, "speedup", "block_efficiency", "same_text"]))
    falls = [100 * row["last_quarter_improvement"] for row in record["rows"] if _is_undistilled(row)]
    if falls:
        told = ", ".join(f"{fall:.2f}%" for fall in falls)
        parts.append(f"The undistilled drafts' validation loss fell by {told} over the last quarter of their steps.")
    finished, stages = len({row["stage"] for row in record["rows"]}), len(record["config"]["stages"])
    parts.append(f"{finished} of {stages} stages finished; {provenance(record)}")
    return "\n\n".join(parts)


def _is_undistilled(row: Mapping) -> bool:
    known = row.get("last_quarter_improvement") is not None
    return known and row["stage"].rpartition("_")[0] == UNDISTILLED


def _markdown(lines: Sequence[Mapping]) -> str:
    return tables.markdown_table(lines, list(dict.fromkeys(key for line in lines for key in line)))


def drafts(record: Mapping) -> list[dict]:
    """A line for each draft: what its training took, and block efficiency and gain at each temperature."""
    trained: dict[str, list[Mapping]] = {}
    for row in record["rows"]:
        cell, _, seed = row["stage"].rpartition("_")
        if "train_seconds" in row and seed.isdigit():
            trained.setdefault(cell, []).append(row)
    by_temperature, lines = efficiencies(record), []
    for cell, rows in trained.items():
        line = {
            "draft": tables.heading(cell),
            "seeds": len(rows),
            "steps": statistics.fmean(row["steps"] for row in rows),
            "train seconds": statistics.fmean(row["train_seconds"] for row in rows),
        }
        for temperature, cells in by_temperature.items():
            values, at = cells.get(cell, {}), f"T={temperature:g}"
            line[f"{at}: block efficiency"] = statistics.fmean(values.values()) if values else None
            over = gains(values, cells.get(UNDISTILLED, {})) if cell != UNDISTILLED else []
            line[f"{at}: over undistilled"] = _said(over)
        lines.append(line)
    return lines


def transfers(record: Mapping) -> list[dict]:
    """A line for each draft, temperature and thing that it was not trained for: block efficiency, and gain there."""
    return [
        {
            "evaluated on": tables.heading(place),
            "T": temperature,
            "draft": tables.heading(cell),
            "seeds": len(values),
            "block efficiency": statistics.fmean(values.values()),
            "over undistilled": _said(gains(values, cells.get(UNDISTILLED, {}))) if cell != UNDISTILLED else None,
        }
        for (place, temperature), cells in _places(record).items()
        for cell, values in cells.items()
    ]


def transferred(record: Mapping, place: str, cell: str) -> dict[float, Estimate]:
    """By temperature, the gain of a draft over the undistilled one in a place that it was not trained for."""
    found = {}
    for (where, temperature), cells in _places(record).items():
        values = gains(cells.get(cell, {}), cells.get(UNDISTILLED, {}))
        if where == place and values:
            found[temperature] = Estimate.of(values)
    return found


def _places(record: Mapping) -> dict[tuple[str, float], dict[str, dict[int, float]]]:
    """{(place, temperature): {cell: {seed: block efficiency}}} of the transfer stages."""
    places: dict[tuple[str, float], dict[str, dict[int, float]]] = {}
    for row in record["rows"]:
        cell, _, seed = row.get("drafter", "").rpartition("_")
        if row["stage"].startswith("transfer") and seed.isdigit():
            place = row["stage"].removeprefix("transfer_").rpartition("_")[0]
            places.setdefault((place, row["temperature"]), {}).setdefault(cell, {})[int(seed)] = row["block_efficiency"]
    return places


def best(cells: Mapping[str, Mapping[int, float]]) -> str | None:
    """The cell of the matrix, or newer loss, with the largest mean gain among those of most seeds."""
    names = [f"{text}_{divergence}" for text in TEXTS for divergence in DIVERGENCES]
    names += [f"draft_{divergence}" for divergence in NEWER]
    found = {name: gains(cells.get(name, {}), cells.get(UNDISTILLED, {})) for name in names}
    most = max(map(len, found.values()))
    whole = {name: statistics.fmean(values) for name, values in found.items() if values and len(values) == most}
    return max(whole, key=whole.__getitem__, default=None)


def comparisons(record: Mapping) -> list[dict]:
    """A line for each question and temperature."""
    lines = []
    for temperature, cells in efficiencies(record).items():
        winner, of = best(cells), lambda name, cells=cells: cells.get(name, {})
        pairs = {}
        if winner is not None:
            for other in (UNDISTILLED, "plain_steps", "plain_clock"):
                pairs[f"best ({tables.heading(winner)}) over {tables.heading(other)}"] = (of(winner), of(other))
        for text in TEXTS[1:]:
            pairs[f"{text} text over fixed, mean of divergences"] = (_mean_of(cells, text), _mean_of(cells, "fixed"))
        draft, target = of("draft_forward_kl"), of("target_forward_kl")
        pairs["draft over target text, forward KL, equal steps"] = (draft, target)
        pairs["draft over target text, forward KL, equal time"] = (draft, of("target_forward_kl_clock"))
        for text in ("fixed", "draft"):
            little = of(f"little_{text}_forward_kl")
            pairs[f"{text} text of a few pages over all of it, forward KL"] = (little, of(f"{text}_forward_kl"))
        for name in (*DIVERGENCES[1:], *NEWER):
            pairs[f"{tables.heading(name)} over forward KL, draft text"] = (of(f"draft_{name}"), draft)
        for said, (values, others) in pairs.items():
            compared = gains(values, others)
            if compared:
                lines.append({"compared": said, "T": temperature, "seeds": len(compared), "gain": _said(compared)})
    return lines


def _mean_of(cells: Mapping[str, Mapping[int, float]], text: str) -> dict[int, float]:
    """By seed, the mean over the four divergences, of seeds that have all."""
    found = [cells.get(f"{text}_{divergence}", {}) for divergence in DIVERGENCES]
    return {
        seed: statistics.fmean(one[seed] for one in found) for seed in found[0] if all(seed in one for one in found)
    }


def over(record: Mapping, cell: str, other: str) -> dict[float, Estimate]:
    """By temperature, the gain of a draft over another; a text's name stands for its mean over the divergences."""
    found = {}
    for temperature, cells in efficiencies(record).items():
        mine, theirs = (_mean_of(cells, one) if one in TEXTS else cells.get(one, {}) for one in (cell, other))
        if values := gains(mine, theirs):
            found[temperature] = Estimate.of(values)
    return found


def ranks(record: Mapping) -> tuple[list[str], list[str]]:
    """The worst text of each divergence and temperature, and the best divergence of each text and temperature.

    By mean gain, of lines and columns that are whole.
    """
    worst, best_of = [], []
    for cells in efficiencies(record).values():
        found = matrix(cells)
        columns = [[line[column] for line in found] for column in range(len(DIVERGENCES))]
        worst += [TEXTS[column.index(min(column))] for column in columns if None not in column]
        best_of += [DIVERGENCES[line.index(max(line))] for line in found if None not in line]
    return worst, best_of


# The name of a record and of its table -> what writes the table, and what draws its figure.
TABLES = {"sweep": table, "sweep_encoder_decoder": table}
FIGURES = dict.fromkeys(TABLES, heat_map)


def sweep_section(results: Mapping, figures: Path) -> page.Section:
    """The map of gains of a recipe sweep, and its comparisons."""
    heat_map(results, figures / "recipes.png")
    blocks: list[page.Figures | page.Table] = [
        page.Figures([page.Figure(figures / "recipes.png", "Mean gain over seeds, in percent.")])
    ]
    for lines in (drafts(results), comparisons(results)):
        columns = [
            page.Column(key, tables.is_text(lines, key)) for key in dict.fromkeys(key for one in lines for key in one)
        ]
        blocks.append(
            page.Table(columns, [[tables.cell(line, column.heading) for column in columns] for line in lines])
        )
    return page.Section(
        "Recipes", blocks, "Block efficiency over the undistilled draft of the same seed; 95% over seeds."
    )


def write_report(workdir: Path, config: Any) -> None:
    """report.html of a run of the sweep: the usual page, with the map of gains after its headline."""
    results = page.run_results(workdir, config)
    sections = [sweep_section(results, workdir / "figures")] if is_sweep(results) else []
    page.write_run(workdir, results, page.training_curves(workdir, config), more=sections)
