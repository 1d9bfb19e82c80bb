"""The figure of Kangaroo's ablations, drawn from their record."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.kangaroo.tables import exit_lines, histogram_row, threshold_grid
from configs.records.marks import Mark, tradeoff_figure


def _mark(x: float, row: Mapping, key: str) -> Mark:
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
    exits, grid, row = exit_lines(record), threshold_grid(record), histogram_row(record)
    for name, key in measures.items() if exits else ():
        panels[f"Exit layer: {name}"] = {
            kind: [_mark(layer, line[kind], key) for layer, line in exits.items()] for kind in ("threshold", "fixed")
        }
        axes.append(("layers before the exit", name))
    for name, key in measures.items() if grid else ():
        panels[f"Threshold: {name}"] = {
            f"gamma {gamma}": [_mark(threshold, each, key) for threshold, each in rows.items()]
            for gamma, rows in grid.items()
        }
        axes.append(("threshold (0: none)", name))
    if row is not None:
        fates = {fate: _shares(row["confidence"][fate]) for fate in ("accepted", "rejected")}
        panels["Drafted tokens by confidence"] = fates
        axes.append(("confidence (largest probability at temperature 1)", "share of tokens"))
    tradeoff_figure(panels, path, axes=axes)
