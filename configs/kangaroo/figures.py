"""Figures of Kangaroo's page and of a Spec-Bench report, drawn from records."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from configs.kangaroo.tables import exit_lines, histogram_row, rows_of
from configs.records.marks import Mark, tradeoff_figure
from specjax.reporting import spec_bench_page


def _mark(x: float | int, row: Mapping, key: str) -> Mark:
    edges = row.get(f"{key}_ci")
    return Mark(x, None, row[key], tuple(edges) if edges else None)


def _shares(counts: Sequence[int]) -> list[Mark]:
    """A histogram over [0, 1] as the polygon through the middles of its bins."""
    total = max(sum(counts), 1)
    return [Mark((i + 0.5) / len(counts), None, count / total, None) for i, count in enumerate(counts)]


def ablations(record: Mapping, path: Path) -> None:
    """Speed-up and compression rate by exit layer and by threshold, a line each gamma; confidence of both fates."""
    panels, axes = {}, []
    measures = {"speed-up": "speedup", "compression rate": "block_efficiency"}
    lines = exit_lines(record)
    for said, key in measures.items() if lines else ():
        series = {
            kind: [_mark(line["exit layer"], line[kind], key) for line in lines] for kind in ("threshold", "fixed")
        }
        panels[f"Exit layer: {said}"] = series
        axes.append(("layers before the exit", said))
    rows = [row for row in rows_of(record, "grid") if row["gamma"]]
    for said, key in measures.items() if rows else ():
        series = {}
        for row in sorted(rows, key=lambda row: (row["gamma"], row["threshold"])):
            series.setdefault(f"gamma {row['gamma']}", []).append(_mark(row["threshold"], row, key))
        panels[f"Threshold: {said}"] = series
        axes.append(("threshold (0: none)", said))
    row = histogram_row(record)
    if row is not None:
        panels["Drafted tokens by confidence"] = {
            fate: _shares(row["confidence"][fate]) for fate in ("accepted", "rejected")
        }
        axes.append(("confidence (largest probability at temperature 1)", "share of tokens"))
    tradeoff_figure(panels, path, axes=axes)


# The name of a record -> what draws its figure; joined into `sync.FIGURES`.
FIGURES: dict[str, Callable[[Mapping, Path], None]] = {
    "kangaroo_ablations": ablations,
    "kangaroo_spec_bench": spec_bench_page.figure,
}
