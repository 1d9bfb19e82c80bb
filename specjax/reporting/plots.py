"""Draws figures from records: speed-up against gamma, acceptance by position, and training curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from specjax.reporting.panels import DASHES, Theme, looks_of, save_panels
from specjax.reporting.tables import SETTINGS, is_lossy, rule_label, varying


def speedup_figure(rows: Sequence[Mapping], path: str | Path, *, palette: Sequence[str] = ()) -> None:
    """Draws measured (solid, with 95% intervals) and predicted speed-up (dashed) by gamma; a panel per temperature.

    Raises ValueError if no row has both a drafter and a speed-up.
    """
    rows = [row for row in rows if row["gamma"] > 0 and row["speedup"] is not None]
    panels = _grouped(rows)
    names = _names(panels)
    looks = looks_of(palette, names)

    def draw(axes, theme: Theme, series: Mapping) -> None:
        gammas = sorted({row["gamma"] for members in series.values() for row in members})
        axes.axhline(1, color=theme.ink, linewidth=1.1)
        for name, members in series.items():
            color, marker = looks(theme, name)
            members = sorted(members, key=lambda row: row["gamma"])
            at = np.array([row["gamma"] + _offset(series, name, row["gamma"]) for row in members])
            value = np.array([row["speedup"] for row in members])
            edges = np.array([row["speedup_ci"] or (row["speedup"],) * 2 for row in members])
            axes.plot(at, value, color=color, marker=marker, label=name)
            axes.vlines(at, edges[:, 0], edges[:, 1], color=color, linewidth=1.2)
            predicted = [row.get("predicted_speedup") for row in members]
            if any(point is not None for point in predicted):
                axes.plot(at, np.array(predicted, float), color=color, marker="_", linestyle=DASHES, linewidth=1)
        axes.set_xticks(gammas, [str(gamma) for gamma in gammas])
        axes.set_xlim(gammas[0] - 0.5, gammas[-1] + 0.5)
        axes.set_xlabel("gamma (most tokens drafted per block)")
        axes.set_ylabel("speed-up")

    dashed = "predicted" if _any(rows, "predicted_speedup") else None
    save_panels(path, panels, names, draw, share_y=True, dashed=dashed)


def acceptance_figure(rows: Sequence[Mapping], path: str | Path, *, palette: Sequence[str] = ()) -> None:
    """Draws acceptance of reached positions by position, at each drafter's largest gamma; a panel per temperature.

    Raises ValueError if no row has drafted tokens.
    """
    rows = [row for row in rows if row["gamma"] > 0 and any(p is not None for p in row["acceptance_by_position"])]
    widest = lambda members: max(members, key=lambda row: row["gamma"])["acceptance_by_position"]
    points = {
        title: {
            name: [(position, rate) for position, rate in enumerate(widest(members), 1) if rate is not None]
            for name, members in series.items()
        }
        for title, series in _grouped(rows).items()
    }
    labels = [("position in the block", "accepted, if reached")] * len(points)
    lines_figure(points, path, labels=labels, palette=palette, from_zero=True)


def training_figures(
    stages: Mapping[str, Sequence[Mapping]], folder: str | Path, *, palette: Sequence[str] = ()
) -> list[Path]:
    """Draws training_KEY.png for the loss and each other key that a stage logged, and returns the paths.

    Raw values are faint, and the solid line is their running mean; the dashed line with markers is `validation_KEY`.
    """
    looks, paths = looks_of(palette, list(stages)), []

    def draw(axes, theme: Theme, panel: Mapping) -> None:
        drawn = []
        for name, lines in panel["series"].items():
            color, _ = looks(theme, name)
            steps, values = _points(lines, panel["key"])
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
            axes.plot(steps, _running_mean(values), color=color, label=name)
            held_out_steps, held_out = _points(lines, f"validation_{panel['key']}")
            look = {"color": color, "linestyle": DASHES, "marker": "o", "markersize": 3, "linewidth": 1}
            axes.plot(held_out_steps, held_out, **look)
            drawn += [*values, *held_out]
        if min(drawn) > 0 and max(drawn) > 8 * min(drawn):
            _logarithmic(axes)
        axes.set_xlabel("step")

    for key in ("loss", "acceptance", "block_efficiency"):
        held_out = [name for name, lines in stages.items() if _any(lines, f"validation_{key}")]
        series = {name: lines for name, lines in stages.items() if _any(lines, key) or name in held_out}
        if series:
            paths.append(Path(folder) / f"training_{key}.png")
            panels = {key.replace("_", " "): {"key": key, "series": series}}
            save_panels(paths[-1], panels, list(series), draw, dashed="held out" if held_out else None)
    return paths


class Mark(NamedTuple):
    """A point, with its intervals (None if there are none), drawn filled or hollow."""

    x: float | int
    y: float | int
    x_edges: Sequence[float] | None = None
    y_edges: Sequence[float] | None = None
    hollow: bool = False


def lines_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple]]],
    path: str | Path,
    *,
    labels: Sequence[tuple[str, str]],
    palette: Sequence[str] = (),
    joined: bool = True,
    guides: Sequence[Sequence[tuple[float, float]]] = (),
    guides_name: str | None = None,
    from_zero: bool = False,
) -> None:
    """Draws {panel title: {line name: points (x, y) or `Mark`s}}. Raises ValueError without panels.

    Args:
      labels: the labels of the horizontal and the vertical axis, for each panel.
      joined: whether to connect the points of a line, in their order.
      guides: points of dashed lines to draw in every panel; `guides_name` is their name in the legend.
      from_zero: whether the vertical axis starts at 0.
    """
    from matplotlib.ticker import MaxNLocator

    names = _names(panels)
    looks = looks_of(palette, names)
    drawn = {
        title: {"series": series, "labels": pair} for (title, series), pair in zip(panels.items(), labels, strict=True)
    }

    def draw(axes, theme: Theme, panel: Mapping) -> None:
        series = {name: [Mark(*point) for point in points] for name, points in panel["series"].items()}
        for name, marks in series.items():
            color, marker = looks(theme, name)
            if joined:
                axes.plot([mark.x for mark in marks], [mark.y for mark in marks], color=color, linewidth=1.2)
            for mark in marks:
                if mark.x_edges:
                    axes.hlines(mark.y, *mark.x_edges, color=color, linewidth=0.7, alpha=0.6)
                if mark.y_edges:
                    axes.vlines(mark.x, *mark.y_edges, color=color, linewidth=0.7, alpha=0.6)
                face = theme.paper if mark.hollow else color
                axes.plot(mark.x, mark.y, color=color, marker=marker, markerfacecolor=face, label=name, zorder=3, ls="")
        for guide in guides:
            axes.plot(*zip(*guide, strict=True), color=theme.ink, linestyle=DASHES, linewidth=1)
        if from_zero:
            points = [point for line in (*series.values(), *guides) for point in line]
            axes.set_ylim(0, 1.06 * max(point[1] for point in points) or None)
            if all(float(point[0]).is_integer() for point in points):
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(panel["labels"][0])
        axes.set_ylabel(panel["labels"][1])

    save_panels(path, drawn, names, draw, dashed=guides_name)


def _grouped(rows: Sequence[Mapping]) -> dict[str, dict[str, list[Mapping]]]:
    """Groups rows as {panel title: {line name: rows}}; a line's name has the settings that vary."""
    panels: dict[str, dict[str, list]] = {}
    vary = varying(rows, SETTINGS)
    others = [key for key in vary if key not in ("task", "rule", "lenience")]
    for row in sorted(rows, key=lambda row: row["temperature"]):
        task = [str(row["task"])] if "task" in vary else []
        title = ", ".join([*task, f"temperature {row['temperature']:g}"])
        rule = [rule_label(row)] if "rule" in vary or is_lossy(row) else []
        varied = varying([other for other in rows if other["drafter"] == row["drafter"]], others)
        settings = ", ".join([*rule, *(f"{key.replace('_', ' ')} {row.get(key)}" for key in varied)])
        name = row["drafter"] + (f" ({settings})" if settings else "")
        panels.setdefault(title, {}).setdefault(name, []).append(row)
    return panels


def _names(panels: Mapping[str, Mapping]) -> list[str]:
    """The names of all lines."""
    return list(dict.fromkeys(name for series in panels.values() for name in series))


def _offset(series: Mapping[str, Sequence[Mapping]], name: str, gamma: int) -> float:
    """Horizontal offset of a line at this gamma, so that the intervals of several lines do not overlap."""
    lines = [other for other, members in series.items() if any(row["gamma"] == gamma for row in members)]
    return 0.05 * (lines.index(name) - (len(lines) - 1) / 2)


def _logarithmic(axes) -> None:
    """Makes the vertical axis logarithmic, with plain numbers, because losses of stages differ in magnitude."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _points(lines: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of the steps and values of those lines that have `key`."""
    logged = [line for line in lines if line.get(key) is not None]
    return tuple(np.array([line[name] for line in logged], float) for name in ("step", key))


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a centred window of 1/40 of the curve, smaller at its ends; a short curve is not changed."""
    half = len(values) // 80
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _any(lines: Sequence[Mapping], key: str) -> bool:
    return any(line.get(key) is not None for line in lines)
