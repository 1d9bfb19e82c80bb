"""Figures of configs/distillspec/README.md, drawn from the committed records."""

from collections.abc import Mapping
from pathlib import Path

from configs.distillspec.tables import garden_members, garden_points, lossy_groups
from configs.distillspec.tradeoffs import main_metric, pareto_front
from configs.records.claims import Measured
from specjax.reporting.plots import Mark, lines_figure


def _mark(x: Measured, y: Measured, hollow: bool = False) -> Mark:
    return Mark(x.value, y.value, x.edges, y.edges, hollow)


def lossy(record: Mapping, path: Path) -> None:
    """Quality against block efficiency, and against latency where it was measured; a line for each rule, by lenience.

    A panel for each temperature and draft. Every line starts at the lossless rule.
    """
    metric = main_metric(record["rows"]).replace("_", " ")
    panels, labels = {}, []
    for measure, key in {"block efficiency": "block_efficiency", "relative latency": "latency"}.items():
        for exact, cells in lossy_groups(record):
            if any(getattr(cell, key) is None for cell in (exact, *cells)):
                continue
            series: dict[str, list[Mark]] = {}
            for cell in sorted(cells, key=lambda cell: -cell.lenience):
                line = series.setdefault(f"{cell.rule}, lossy", [_mark(getattr(exact, key), exact.quality)])
                line.append(_mark(getattr(cell, key), cell.quality))
            title = f"{exact.drafter}, temperature {exact.temperature:g}"
            # In the order of the record, so that every panel gives a rule the same colour.
            panels[f"{title[:60]}: {measure}"] = {f"{c.rule}, lossy": series[f"{c.rule}, lossy"] for c in cells}
            labels.append((measure, metric))
    lines_figure(panels, path, labels=labels)


def garden(record: Mapping, path: Path) -> None:
    """Quality against relative latency, a mark for each model and way to decode it; a line through the Pareto front.

    If latency was not measured, quality against block efficiency, without a front.
    """
    members = garden_members(record)
    timed = all(cell.latency is not None for cell in members.values())
    series: dict[str, list[Mark]] = {}
    for name, cell in members.items():
        model, decoded = name.split(", ")
        mark = _mark(cell.latency if timed else cell.block_efficiency, cell.quality, decoded == "plain")
        series.setdefault(model, []).append(mark)
    points = garden_points(members) if timed else {}
    across = "relative latency" if timed else "block efficiency"
    lines_figure(
        {"Model garden": series},
        path,
        labels=[(f"{across} (hollow: decoded plainly)", main_metric(record["rows"]).replace("_", " "))],
        joined=False,
        guides=[[points[name] for name in pareto_front(points)]] if points else (),
        guides_name="Pareto front" if points else None,
    )
