"""Writes the report and draws the figure of a Spec-Bench run."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from specjax.reporting import page
from specjax.reporting.panels import Theme, looks_of, save_panels

OVERALL = "overall"


def figure(record: Mapping, path: Path) -> None:
    """Draws speed-up by subtask and drafter, with intervals, and CTAR (share of blocks with > w tokens) overall."""
    rows = [row for row in record["rows"] if "subtask" in row and row["gamma"]]
    name = lambda row: f"{row['drafter']}, gamma {row['gamma']}, T {row['temperature']:g}"
    names = list(dict.fromkeys(map(name, rows)))
    subtasks = list(dict.fromkeys(row["subtask"] for row in rows))
    looks = looks_of((), names)

    def draw_speed(axes, theme: Theme) -> None:
        axes.axhline(1, color=theme.ink, linewidth=1.1)
        width = 0.8 / len(names)
        for place, drafter in enumerate(names):
            mine = {row["subtask"]: row for row in rows if name(row) == drafter}
            color, _ = looks(theme, drafter)
            at = np.arange(len(subtasks)) + width * (place - (len(names) - 1) / 2)
            axes.bar(at, [mine[subtask]["speedup"] for subtask in subtasks], width, color=color, label=drafter)
            for x, subtask in zip(at, subtasks, strict=True):
                if mine[subtask]["speedup_ci"]:
                    axes.vlines(x, *mine[subtask]["speedup_ci"], color=theme.ink, linewidth=0.8)
        axes.set_xticks(range(len(subtasks)), [s.replace("_", "\n") for s in subtasks], fontsize=7)
        axes.set_ylabel("speed-up")

    def draw_ctar(axes, theme: Theme) -> None:
        for row in rows:
            if row["subtask"] == OVERALL:
                color, marker = looks(theme, name(row))
                axes.plot(1 + np.arange(len(row["ctar"])), row["ctar"], color=color, marker=marker, label=name(row))
        axes.set_xlabel("w, guesses in a row")
        axes.set_ylabel("CTAR(w), all questions")

    panels = {"Speed-up by subtask": {"draw": draw_speed}, "All guesses accepted": {"draw": draw_ctar}} if rows else {}
    save_panels(path, panels, names, lambda axes, theme, series: series["draw"](axes, theme))


def write(workdir: Path, results: Mapping) -> None:
    """Writes report.html and figures/spec_bench.png of a Spec-Bench run."""
    rows = [row for row in results["rows"] if row["gamma"]]
    blocks = []
    if rows:
        drawn = workdir / "figures" / "spec_bench.png"
        figure(results, drawn)
        blocks.append(page.Figures([page.Figure(drawn, "By subtask, with 95% intervals over questions.")]))
    keys = ("subtask", "drafter", "temperature", "gamma", "threshold", "questions", "block_efficiency")
    keys = (*keys, "acceptance_rate", "tokens_per_second", "speedup", "identical_to_baseline")
    blocks.append(page.rows_table(results["rows"], keys))
    intro = "Every question is compared with plain decoding; the prompt of a second turn has its answer to the first."
    settings = page.Section("Settings", [page.Details("Config", results["config"])])
    sections = [page.Section("Results", blocks, intro), settings]
    page.write_report(workdir, title="Spec-Bench", environment=results["environment"], sections=sections)
