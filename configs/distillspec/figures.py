"""Figures of configs/distillspec/README.md, drawn from the committed records."""

from collections.abc import Mapping
from pathlib import Path

from configs.distillspec.tables import garden_members, garden_points, lossy_groups
from configs.distillspec.tradeoffs import main_metric, pareto_front
from configs.records.marks import Mark, tradeoff_figure


def lossy(record: Mapping, path: Path) -> None:
    """Quality against block efficiency, and against latency where it was measured; a line for each rule, by lenience.

    A panel for each temperature and draft. Every line starts at the lossless rule.
    """
    metric = main_metric(record["rows"]).replace("_", " ")
    panels, axes = {}, []
    for measure, key in {"block efficiency": "block_efficiency", "relative latency": "latency"}.items():
        for exact, cells in lossy_groups(record):
            if any(getattr(cell, key) is None for cell in (exact, *cells)):
                continue
            series: dict[str, list[Mark]] = {}
            for cell in sorted(cells, key=lambda cell: -cell.lenience):
                line = series.setdefault(f"{cell.rule}, lossy", [Mark.of(getattr(exact, key), exact.quality)])
                line.append(Mark.of(getattr(cell, key), cell.quality))
            title = f"{exact.drafter}, temperature {exact.temperature:g}"
            # In the order of the record, so that every panel gives a rule the same colour.
            panels[f"{title[:60]}: {measure}"] = {f"{c.rule}, lossy": series[f"{c.rule}, lossy"] for c in cells}
            axes.append((measure, metric))
    tradeoff_figure(panels, path, axes=axes)


def garden(record: Mapping, path: Path) -> None:
    """Quality against relative latency, a mark for each model and way to decode it; a line through the Pareto front.

    If latency was not measured, quality against block efficiency, without a front.
    """
    members = garden_members(record)
    timed = all(cell.latency is not None for cell in members.values())
    series: dict[str, list[Mark]] = {}
    for name, cell in members.items():
        model, decoded = name.split(", ")
        mark = Mark.of(cell.latency if timed else cell.block_efficiency, cell.quality, decoded == "plain")
        series.setdefault(model, []).append(mark)
    points = garden_points(members) if timed else {}
    across = "relative latency" if timed else "block efficiency"
    tradeoff_figure(
        {"Model garden": series},
        path,
        axes=[(f"{across} (hollow: decoded plainly)", main_metric(record["rows"]).replace("_", " "))],
        joined=False,
        front=[points[name] for name in pareto_front(points)],
    )
