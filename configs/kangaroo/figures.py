"""The figure of Kangaroo's ablations, drawn from their record."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.kangaroo.tables import exit_lines, histogram_row, threshold_grid
from specjax.reporting.plots import Mark, lines_figure


def _mark(x: float, row: Mapping, key: str) -> Mark:
    return Mark(x, row[key], y_edges=row.get(f"{key}_ci"))


def _shares(counts: Sequence[int]) -> list[Mark]:
    """A histogram over [0, 1] as the polygon through the middles of its bins."""
    total = max(sum(counts), 1)
    return [Mark((i + 0.5) / len(counts), count / total) for i, count in enumerate(counts)]


def ablations(record: Mapping, path: Path) -> None:
    """Speed-up and compression rate by exit layer and by threshold, a line each gamma; confidence of both fates."""
    panels, labels = {}, []
    measures = {"speed-up": "speedup", "compression rate": "block_efficiency"}
    exits, grid, row = exit_lines(record), threshold_grid(record), histogram_row(record)
    for name, key in measures.items() if exits else ():
        panels[f"Exit layer: {name}"] = {
            kind: [_mark(layer, line[kind], key) for layer, line in exits.items()] for kind in ("threshold", "fixed")
        }
        labels.append(("layers before the exit", name))
    for name, key in measures.items() if grid else ():
        panels[f"Threshold: {name}"] = {
            f"gamma {gamma}": [_mark(threshold, each, key) for threshold, each in rows.items()]
            for gamma, rows in grid.items()
        }
        labels.append(("threshold (0: none)", name))
    if row is not None:
        fates = {fate: _shares(row["confidence"][fate]) for fate in ("accepted", "rejected")}
        panels["Drafted tokens by confidence"] = fates
        labels.append(("confidence (largest probability at temperature 1)", "share of tokens"))
    lines_figure(panels, path, labels=labels)
