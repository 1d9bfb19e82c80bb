"""Figures of configs/distillspec/README.md, drawn from the committed records."""

from collections.abc import Callable, Mapping
from pathlib import Path

from configs.distillspec.tables import garden_members
from configs.distillspec.tradeoffs import Cell, Estimate, Point, cells, main_metric, pareto_front
from configs.records.marks import Mark, tradeoff_figure


def _edges(estimate: Estimate) -> tuple[float, float] | None:
    return None if estimate.half is None else (estimate.mean - estimate.half, estimate.mean + estimate.half)


def _mark(cell: Cell, at: Estimate, hollow: bool = False) -> Mark:
    return Mark(at.mean, _edges(at), cell.quality.mean, _edges(cell.quality), hollow)


def lossy(record: Mapping, path: Path) -> None:
    """Quality against block efficiency, and against latency where it was measured; a line each rule, by lenience.

    A panel each temperature and draft; the exact rule is where every line begins.
    """
    found = [cell for cell in cells(record) if cell.gamma]
    metric = main_metric(record["rows"]).replace("_", " ")
    measures = {"block efficiency": lambda cell: cell.block_efficiency, "relative latency": lambda cell: cell.latency}
    panels, axes = {}, []
    for measure, value in measures.items():
        for temperature, drafter in dict.fromkeys((c.temperature, c.drafter) for c in found if c.lenience is not None):
            mine = [cell for cell in found if (cell.temperature, cell.drafter) == (temperature, drafter)]
            if any(value(cell) is None for cell in mine):
                continue
            exact = next(cell for cell in mine if cell.lenience is None)
            rules = dict.fromkeys(cell.rule for cell in mine if cell.lenience is not None)
            series = {}
            for rule in rules:
                line = sorted((c for c in mine if c.rule == rule), key=lambda cell: -cell.lenience)
                series[f"{rule}, lossy"] = [_mark(cell, value(cell)) for cell in (exact, *line)]
            panels[f"{drafter}, temperature {temperature:g}"[:60] + f": {measure}"] = series
            axes.append((measure, metric))
    tradeoff_figure(panels, path, axes=axes)


def garden(record: Mapping, path: Path) -> None:
    """Quality against relative latency, a mark each model and way to decode it; a line through the Pareto front.

    Where latency was not measured, quality against block efficiency, without a front.
    """
    members = garden_members(record)
    timed = all(kept.cell.latency is not None for kept in members)
    series: dict[str, list[Mark]] = {}
    for kept in members:
        across = kept.cell.latency if timed else kept.cell.block_efficiency
        series.setdefault(kept.model, []).append(_mark(kept.cell, across, kept.decoded == "plain"))
    points = [Point(kept.name, kept.cell.latency.mean, kept.cell.quality.mean) for kept in members if timed]
    name = "relative latency" if timed else "block efficiency"
    tradeoff_figure(
        {"Model garden": series},
        path,
        axes=[(f"{name} (hollow: decoded plainly)", main_metric(record["rows"]).replace("_", " "))],
        joined=False,
        front=[(point.cost, point.quality) for point in pareto_front(points)],
    )


# The name of a record -> what draws its figure.
FIGURES: dict[str, Callable[[Mapping, Path], None]] = {"lossy": lossy, "garden": garden}
