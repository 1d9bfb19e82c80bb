"""The report of an advice."""

from pathlib import Path
from typing import Any

from specjax.reporting import page, plots, records, row_tables


def write(config: Any, workdir: Path, rows: list[dict]) -> None:
    """report.html of an advice: throughput against gamma of each candidate, and all tables."""
    candidates = [row for row in rows if row["table"] == "candidates" and not row["threshold"]]
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in candidates:
        curve = curves.setdefault(row["draft"], [(0, row["plain_tokens_per_second"])])
        curve.append((row["gamma"], row["tokens_per_second"]))
    path = workdir / "figures" / "throughput.png"
    plots.lines_figure({"expected": curves}, path, x_label="gamma", y_label="tokens per second")
    caption = "Expected tokens per second by gamma, without a confidence stop; 0 is plain decoding."
    figure = page.Section("Throughput", [page.Figures([page.Figure(path, caption)])])
    page.write_report(
        workdir / "report.html",
        title="Which draft to build",
        subtitle=workdir.name,
        environment=records.environment(config.seed),
        sections=[figure, *(page.Section(*each) for each in row_tables.page_tables(rows))],
    )
