"""The recipe sweep of configs/distillspec/sweep.py: gains by text and divergence, tables, heat map, report.

A record may hold only some of the stages. Stages and drafters are named CELL_SEED, and a cell of the matrix
TEXT_DIVERGENCE. Every gain is paired: the draft of a seed is compared with another draft of the same seed, on the same
prompts. Intervals are 95% intervals over seeds by Student's t.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.records.claims import Measured
from configs.records.rows import by_recipe, gains, markdown, percent, provenance, trained
from specjax.reporting import page, panels, tables

TEXTS = ("fixed", "draft", "target", "mixed")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation")
NEWER = ("negative_log_acceptance", "lk_hybrid")
UNDISTILLED = "supervised"

# {recipe: {seed: block efficiency}}
Efficiencies = Mapping[str, Mapping[int, float]]


def place_of(stage: str) -> str:
    """What a stage evaluated drafts on that it did not train them for; "" for the sweep's own task and target."""
    return stage.removeprefix("transfer_").rpartition("_")[0] if stage.startswith("transfer") else ""


def efficiencies(record: Mapping, place: str = "") -> dict[float, Efficiencies]:
    """{temperature: {cell: {seed: block efficiency}}} of every trained draft, as evaluated on a place."""
    drafts = trained(record)
    rows = [row for row in record["rows"] if place_of(row["stage"]) == place]
    cells = by_recipe(row for row in rows if place or row.get("drafter") in drafts)
    return {
        temperature: {
            cell: {seed: row["block_efficiency"] for seed, row in seeds.items()} for cell, seeds in by_cell.items()
        }
        for temperature, by_cell in cells.items()
    }


def _over(cells: Efficiencies, cell: str, other: str) -> list[float]:
    """The gain of a cell over another, for each seed; the name of a text means its mean over the divergences."""
    values, others = (_mean_of(cells, one) if one in TEXTS else cells.get(one, {}) for one in (cell, other))
    return gains(values, others)


def _mean_of(cells: Efficiencies, text: str) -> dict[int, float]:
    """The mean over the four divergences, for each seed that has all of them."""
    of_text = [cells.get(f"{text}_{divergence}", {}) for divergence in DIVERGENCES]
    return {
        seed: statistics.fmean(one[seed] for one in of_text)
        for seed in of_text[0]
        if all(seed in one for one in of_text)
    }


def over(record: Mapping, cell: str, other: str, place: str = "") -> dict[float, Measured]:
    """The gain of a cell over another at each temperature at which a seed has both."""
    by_temperature = {t: percent(_over(cells, cell, other)) for t, cells in efficiencies(record, place).items()}
    return {temperature: gain for temperature, gain in by_temperature.items() if gain is not None}


def matrix(cells: Efficiencies) -> list[list[float | None]]:
    """The mean gain over the undistilled draft: a line for each text, a column for each divergence."""
    of_cell = lambda cell: _over(cells, cell, UNDISTILLED)
    mean = lambda values: statistics.fmean(values) if values else None
    return [[mean(of_cell(f"{text}_{divergence}")) for divergence in DIVERGENCES] for text in TEXTS]


def best(cells: Efficiencies) -> str | None:
    """The cell of the matrix, or newer loss, with the largest mean gain among those that have the most seeds."""
    names = [f"{text}_{divergence}" for text in TEXTS for divergence in DIVERGENCES]
    names += [f"draft_{divergence}" for divergence in NEWER]
    by_name = {name: _over(cells, name, UNDISTILLED) for name in names}
    most = max(map(len, by_name.values()))
    complete = {name: statistics.fmean(values) for name, values in by_name.items() if values and len(values) == most}
    return max(complete, key=complete.__getitem__, default=None)


def ranks(record: Mapping) -> tuple[list[str], list[str]]:
    """The worst text for each divergence and temperature, and the best divergence for each text and temperature.

    By mean gain; lines and columns of the matrix that are not complete are left out.
    """
    worst, best_of = [], []
    for cells in efficiencies(record).values():
        values = matrix(cells)
        worst += [TEXTS[column.index(min(column))] for column in zip(*values, strict=True) if None not in column]
        best_of += [DIVERGENCES[line.index(max(line))] for line in values if None not in line]
    return worst, best_of


def heat_map(record: Mapping, path: str | Path) -> None:
    """Gain over the undistilled draft in percent, by text and divergence, a panel for each temperature.

    Missing cells stay blank. Raises ValueError if the record has no gain at all.
    """
    by_temperature = {t: np.array(matrix(cells), float) for t, cells in efficiencies(record).items()}
    known = [value for values in by_temperature.values() for value in values[np.isfinite(values)]]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def draw(axes, theme: panels.Theme, panel: Mapping) -> None:
        del theme
        image = axes.imshow(panel["gains"], cmap="cividis", vmin=low, vmax=high, aspect="auto")
        axes.grid(visible=False)
        axes.set_xticks(range(len(DIVERGENCES)), [tables.heading(name) for name in DIVERGENCES], fontsize=9)
        axes.set_yticks(range(len(TEXTS)), [f"{text} text" for text in TEXTS])
        for (row, column), value in np.ndenumerate(panel["gains"]):
            if np.isfinite(value):
                ink = "#ffffff" if value < (low + high) / 2 else "#000000"
                axes.text(column, row, f"{value:+.1f}", ha="center", va="center", color=ink)
        axes.figure.colorbar(image, ax=axes, label="gain in block efficiency, %")

    drawn = {f"temperature {t:g}": {"gains": values} for t, values in by_temperature.items()}
    panels.save_panels(path, drawn if known else {}, (), draw)


def table(record: Mapping) -> str:
    """Every draft, the comparisons, the transfer, and how the target's text was written."""
    parts = [markdown(lines) for lines in (drafts(record), comparisons(record), transfers(record)) if lines]
    written = [row for row in record["rows"] if "drafted_tokens_per_second" in row]
    if written:
        columns = ["stage", "batch_size", "rows", "tokens", "plain_tokens_per_second", "drafted_tokens_per_second"]
        parts.append(tables.markdown_table(written, [*columns, "speedup", "block_efficiency", "same_text"]))
    falls = [
        f"{100 * row['last_quarter_improvement']:.2f}%"
        for row in record["rows"]
        if row.get("last_quarter_improvement") is not None and row["stage"].rpartition("_")[0] == UNDISTILLED
    ]
    if falls:
        parts.append(
            f"The undistilled drafts' validation loss fell by {', '.join(falls)} over the last quarter of their steps."
        )
    finished, stages = len({row["stage"] for row in record["rows"]}), len(record["config"]["stages"])
    return "\n\n".join([*parts, f"{finished} of {stages} stages finished; {provenance(record)}"])


def drafts(record: Mapping) -> list[dict]:
    """A line for each draft: what its training took, and block efficiency and gain at each temperature."""
    stages: dict[str, list[Mapping]] = {}
    for name, row in trained(record).items():
        cell, _, seed = name.rpartition("_")
        if seed.isdigit():
            stages.setdefault(cell, []).append(row)
    by_temperature, lines = efficiencies(record), []
    for cell, rows in stages.items():
        line = {"draft": tables.heading(cell), "seeds": len(rows)}
        line["steps"] = statistics.fmean(row["steps"] for row in rows)
        line["train seconds"] = statistics.fmean(row["train_seconds"] for row in rows)
        for temperature, cells in by_temperature.items():
            values, at = cells.get(cell, {}), f"T={temperature:g}"
            line[f"{at}: block efficiency"] = statistics.fmean(values.values()) if values else None
            line[f"{at}: over undistilled"] = _over_undistilled(cells, cell)
        lines.append(line)
    return lines


def _over_undistilled(cells: Efficiencies, cell: str) -> str | None:
    gain = None if cell == UNDISTILLED else percent(_over(cells, cell, UNDISTILLED))
    return None if gain is None else str(gain)


def transfers(record: Mapping) -> list[dict]:
    """A line for each place, temperature and draft: block efficiency there, and the gain over the undistilled draft."""
    places = dict.fromkeys(place_of(row["stage"]) for row in record["rows"])
    return [
        {
            "evaluated on": tables.heading(place),
            "T": temperature,
            "draft": tables.heading(cell),
            "seeds": len(values),
            "block efficiency": statistics.fmean(values.values()),
            "over undistilled": _over_undistilled(cells, cell),
        }
        for place in filter(None, places)
        for temperature, cells in efficiencies(record, place).items()
        for cell, values in cells.items()
    ]


def comparisons(record: Mapping) -> list[dict]:
    """A line for each question and temperature: the compared drafts, and the gain of the first over the second."""
    questions = {f"{text} text over fixed, mean of divergences": (text, "fixed") for text in TEXTS[1:]}
    draft, target = "draft_forward_kl", "target_forward_kl"
    questions["draft over target text, forward KL, equal steps"] = (draft, target)
    questions["draft over target text, forward KL, equal time"] = (draft, f"{target}_clock")
    for text in ("fixed", "draft"):
        little = (f"little_{text}_forward_kl", f"{text}_forward_kl")
        questions[f"{text} text of a few pages over all of it, forward KL"] = little
    for name in (*DIVERGENCES[1:], *NEWER):
        questions[f"{tables.heading(name)} over forward KL, draft text"] = (f"draft_{name}", draft)
    lines = []
    for temperature, cells in efficiencies(record).items():
        winner, controls = best(cells), (UNDISTILLED, "plain_steps", "plain_clock")
        named = lambda other, winner=winner: f"best ({tables.heading(winner)}) over {tables.heading(other)}"
        pairs = {} if winner is None else {named(other): (winner, other) for other in controls}
        for compared, pair in (pairs | questions).items():
            values = _over(cells, *pair)
            if values:
                line = {"compared": compared, "T": temperature, "seeds": len(values), "gain": str(percent(values))}
                lines.append(line)
    return lines


def write_report(workdir: Path, config: Any) -> None:
    """report.html of a run of the sweep: the usual page, with the map of gains and the comparisons at its top."""
    results, path = page.run_results(workdir, config), workdir / "figures" / "recipes.png"
    values = {gain for cells in efficiencies(results).values() for line in matrix(cells) for gain in line}
    blocks = []
    if values - {None}:
        heat_map(results, path)
        blocks.append(page.Figures([page.Figure(path, "Mean gain over seeds, in percent.")]))
        for lines in (drafts(results), comparisons(results)):
            blocks.append(page.rows_table(lines, list(dict.fromkeys(key for line in lines for key in line))))
    intro = "Block efficiency over the undistilled draft of the same seed; 95% over seeds."
    sections = [page.Section("Recipes", blocks, intro)] if blocks else []
    page.write_run(workdir, results, page.training_curves(workdir, config), more=sections)
