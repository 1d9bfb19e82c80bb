"""Figures as functions of the records: speed-up against gamma, acceptance by position, training curves.

Each figure is saved twice, as NAME.png for light pages and NAME.dark.png for dark ones. Panels are stacked,
so that a figure stays as wide as a phone and its text is readable there. A name keeps its colour in all
figures that are given the same `palette`, the list of all names.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from specjax.reporting.tables import SETTINGS, is_lossy, rule_label, varying

WIDTH, PANEL_HEIGHT, DPI = 5.0, 2.7, 170
MARKERS = "osD^vPX"
DASHES = (0, (4, 2))


@dataclasses.dataclass(frozen=True)
class Theme:
    ink: str
    faint: str
    paper: str
    series: tuple[str, ...]


# Hues that people with red-green blindness tell apart too, each beside a marker of its own shape.
LIGHT = Theme(
    ink="#33312d",
    faint="#d9d5cc",
    paper="#ffffff",
    series=("#1f6f8b", "#c8572b", "#5b7f1e", "#7d57a8", "#b08400", "#3b5bb5", "#a8446b"),
)
DARK = Theme(
    ink="#cfcbc2",
    faint="#3d4046",
    paper="#1d1f23",
    series=("#5fb7d4", "#f08a5d", "#a3c95c", "#b79be0", "#e3bd4b", "#8aa5f0", "#e58aac"),
)


def speedup_figure(rows: Sequence[Mapping], path: str | Path, *, palette: Sequence[str] = ()) -> None:
    """Measured speed-up (solid, 95% intervals) and predicted (dashed) against gamma; a panel per temperature.

    Raises ValueError where no row has both a drafter and a speed-up.
    """
    rows = [row for row in rows if row["gamma"] > 0 and row["speedup"] is not None]
    panels, names = _grouped(rows)
    looks = looks_of(palette, names)

    def draw(axes, theme: Theme, series: Mapping) -> None:
        gammas = sorted({row["gamma"] for members in series.values() for row in members})
        axes.axhline(1, color=theme.ink, linewidth=1.1)
        for name, members in series.items():
            color, marker = looks(theme, name)
            # Set a little apart, or intervals of equal gamma would hide one another.
            shift = 0.05 * (names.index(name) - (len(names) - 1) / 2)
            members = sorted(members, key=lambda row: row["gamma"])
            at = np.array([row["gamma"] for row in members]) + shift
            value = np.array([row["speedup"] for row in members])
            edges = np.array([row["speedup_ci"] or (row["speedup"],) * 2 for row in members])
            axes.plot(at, value, color=color, marker=marker, label=name)
            axes.vlines(at, edges[:, 0], edges[:, 1], color=color, linewidth=1.2)
            predicted = [row.get("predicted_speedup") for row in members]
            if any(point is not None for point in predicted):
                axes.plot(at, np.array(predicted, float), color=color, linestyle=DASHES, linewidth=1)
        axes.set_xticks(gammas, [str(gamma) for gamma in gammas])
        axes.set_xlabel("gamma (most tokens drafted per block)")
        axes.set_ylabel("speed-up")

    save_panels(
        path,
        panels,
        names,
        draw,
        share_y=True,
        dashed="predicted" if _any(rows, "predicted_speedup") else None,
    )


def acceptance_figure(rows: Sequence[Mapping], path: str | Path, *, palette: Sequence[str] = ()) -> None:
    """Acceptance of a position that was reached, at each drafter's largest gamma; a panel per temperature.

    Raises ValueError where no row drafted anything.
    """
    rows = [row for row in rows if row["gamma"] > 0 and any(p is not None for p in row["acceptance_by_position"])]
    panels, names = _grouped(rows)
    looks = looks_of(palette, names)

    def draw(axes, theme: Theme, series: Mapping) -> None:
        longest = 1
        for name, members in series.items():
            color, marker = looks(theme, name)
            widest = max(members, key=lambda row: row["gamma"])
            longest = max(longest, widest["gamma"])
            axes.plot(
                np.arange(widest["gamma"]) + 1,
                np.array(widest["acceptance_by_position"], float),
                color=color,
                marker=marker,
                label=name,
            )
        axes.set_xticks(range(1, longest + 1))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("position in the block")
        axes.set_ylabel("accepted, if reached")

    save_panels(path, panels, names, draw, share_y=True)


def training_figures(
    stages: Mapping[str, Sequence[Mapping]],
    folder: str | Path,
    *,
    keys: Sequence[str] = ("loss", "acceptance", "block_efficiency"),
    palette: Sequence[str] = (),
) -> list[Path]:
    """training_KEY.png for each key that a stage logged, from the lines of its metrics.jsonl.

    Solid is the running mean of what was logged, over its raw values; dashed with markers is
    `validation_KEY`. Returns the paths, none where no stage logged any of the keys.
    """
    looks, paths = looks_of(palette, list(stages)), []
    for key in keys:
        held_out_key = f"validation_{key}"

        def draw(axes, theme: Theme, series: Mapping, key=key, held_out_key=held_out_key) -> None:
            drawn = []
            for name, lines in series.items():
                color, _ = looks(theme, name)
                steps, values = _points(lines, key)
                axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
                axes.plot(steps, _running_mean(values), color=color, label=name)
                held_out_steps, held_out = _points(lines, held_out_key)
                axes.plot(
                    held_out_steps,
                    held_out,
                    color=color,
                    linestyle=DASHES,
                    marker="o",
                    markersize=3,
                    linewidth=1,
                )
                drawn += [values, held_out]
            drawn = np.concatenate(drawn)
            if drawn.min() > 0 and drawn.max() > 8 * drawn.min():
                _logarithmic(axes)
            axes.set_xlabel("step")

        series = {name: lines for name, lines in stages.items() if _any(lines, key) or _any(lines, held_out_key)}
        if series:
            paths.append(Path(folder) / f"training_{key}.png")
            held_out = any(_any(lines, held_out_key) for lines in series.values())
            save_panels(
                paths[-1],
                {key.replace("_", " "): series},
                list(series),
                draw,
                dashed="held out" if held_out else None,
            )
    return paths


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point with its intervals, None where there is none; hollow or full."""

    x: float | int
    x_edges: tuple[float, float] | None
    y: float | int
    y_edges: tuple[float, float] | None
    hollow: bool = False


def tradeoff_figure(
    panels: Mapping[str, Mapping[str, Sequence[Mark]]],
    path: str | Path,
    *,
    axes: Sequence[tuple[str, str]],
    joined: bool = True,
    front: Sequence[tuple[float, float]] = (),
) -> None:
    """Marks with their intervals, a colour each series; the dashed line goes through `front`.

    Args:
      panels: title -> name of a series -> its marks, in the order of the line through them.
      path: of the light figure; the dark one lies beside it.
      axes: what is drawn across and up, of each panel.
      joined: whether a line goes through the marks of a series.

    Raises ValueError where there is no panel.
    """
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    looks = looks_of((), names)
    labels = dict(zip(panels, axes, strict=True))

    def draw(axes, theme: Theme, series: Mapping) -> None:
        for name, marks in series.items():
            color, marker = looks(theme, name)
            x, y = np.array([mark.x for mark in marks]), np.array([mark.y for mark in marks])
            if joined:
                axes.plot(x, y, color=color, linewidth=1.2)
            for mark in marks:
                if mark.x_edges:
                    axes.hlines(mark.y, *mark.x_edges, color=color, linewidth=0.7, alpha=0.6)
                if mark.y_edges:
                    axes.vlines(mark.x, *mark.y_edges, color=color, linewidth=0.7, alpha=0.6)
            for hollow in (False, True):
                chosen = np.array([mark.hollow == hollow for mark in marks])
                face = theme.paper if hollow else color
                look = {"color": color, "marker": marker, "markerfacecolor": face, "linestyle": "none"}
                if chosen.any():
                    axes.plot(x[chosen], y[chosen], label=name, zorder=3, **look)
        if front:
            axes.plot(*zip(*front, strict=True), color=theme.ink, linestyle=DASHES, linewidth=1)
        across, up = labels[next(title for title, drawn in panels.items() if drawn is series)]
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    save_panels(path, panels, names, draw, dashed="Pareto front" if front else None)


def lines_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float | int, float]]]],
    path: str | Path,
    *,
    x_label: str,
    y_label: str,
    palette: Sequence[str] = (),
    joined: bool = True,
    guides: Sequence[Sequence[tuple[float, float]]] = (),
) -> None:
    """Points (x, y), joined by lines or not, from 0 upwards: {panel title: {line name: points}}.

    `guides` are dashed lines in every panel. Raises ValueError where there are no panels.
    """
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    looks = looks_of(palette, names)

    def draw(axes, theme: Theme, series: Mapping) -> None:
        for name, points in series.items():
            color, marker = looks(theme, name)
            line = "-" if joined else ""
            axes.plot(*zip(*sorted(points), strict=True), color=color, marker=marker, linestyle=line, label=name)
        for guide in guides:
            axes.plot(*zip(*guide, strict=True), color=theme.ink, linestyle=DASHES, linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    save_panels(path, panels, names, draw)


def dark_twin(path: str | Path) -> Path:
    """Where the dark version of a figure lies."""
    path = Path(path)
    return path.with_name(f"{path.stem}.dark.png")


def _grouped(rows: Sequence[Mapping]) -> tuple[dict[str, dict[str, list]], list[str]]:
    """{panel title: {line name: rows}} and all line names; settings that vary, and lossy rules, join the drafter's."""
    panels: dict[str, dict[str, list]] = {}
    vary = varying(rows, SETTINGS)
    others = [key for key in vary if key not in ("task", "rule", "lenience")]
    by_rule = "rule" in vary
    by_task = varying(rows, ["task"])
    for row in sorted(rows, key=lambda row: row["temperature"]):
        title = ", ".join([*(str(row[key]) for key in by_task), f"temperature {row['temperature']:g}"])
        rule = [rule_label(row)] if by_rule or is_lossy(row) else []
        settings = ", ".join([*rule, *(f"{key.replace('_', ' ')} {row.get(key)}" for key in others)])
        name = row["drafter"] + (f" ({settings})" if settings else "")
        panels.setdefault(title, {}).setdefault(name, []).append(row)
    in_order = {name: None for row in rows for series in panels.values() for name, m in series.items() if row in m}
    return panels, list(in_order)


def looks_of(palette: Sequence[str], names: Sequence[str]) -> Callable[[Theme, str], tuple[str, str]]:
    """Colour and marker of a line by its place in the palette; names that are not in it follow."""
    places = {name: place for place, name in enumerate(dict.fromkeys([*palette, *names]))}
    return lambda theme, name: (
        theme.series[places[name] % len(theme.series)],
        MARKERS[places[name] % len(MARKERS)],
    )


def save_panels(
    path: str | Path,
    panels: Mapping[str, Mapping],
    names: Sequence[str],
    draw: Callable,
    *,
    share_y: bool = False,
    dashed: str | None = None,
) -> None:
    """Draws every panel in both themes, under one legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not panels:
        raise ValueError("there is nothing to draw: no record has the values of this figure")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = len(names) + bool(dashed)
    columns = 2 if max(map(len, names)) > 18 else 3
    legend_height = 0.15 + 0.24 * -(-entries // columns) if entries > 1 else 0.1
    height = PANEL_HEIGHT * len(panels) + legend_height
    for theme, target in ((LIGHT, path), (DARK, dark_twin(path))):
        with style(theme):
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            FigureCanvasAgg(figure)
            figure.get_layout_engine().set(rect=(0, 0, 1, 1 - legend_height / height), hspace=0.06)
            grid = figure.subplots(len(panels), 1, squeeze=False, sharey=share_y)[:, 0]
            for axes, (title, series) in zip(grid, panels.items(), strict=True):
                draw(axes, theme, series)
                axes.set_title(title, loc="left")
            if entries > 1:
                found = [axes.get_legend_handles_labels() for axes in grid]
                handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
                handles = {name: handles[name] for name in names if name in handles}
                if dashed:
                    handles[dashed] = Line2D([], [], color=theme.ink, linestyle=DASHES, linewidth=1)
                figure.legend(handles.values(), handles.keys(), loc="upper left", ncols=columns)
            figure.savefig(target, dpi=DPI)


@contextlib.contextmanager
def style(theme: Theme):
    """Quiet axes: no box, a faint horizontal grid, text in the ink of the page."""
    import matplotlib

    settings = {
        "font.family": "sans-serif",
        "font.size": 10.5,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.ink,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "grid.linewidth": 0.8,
        "figure.facecolor": theme.paper,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "ytick.left": False,
        "ytick.minor.left": False,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "legend.handlelength": 1.8,
        "legend.borderaxespad": 0.3,
        "lines.linewidth": 1.9,
        "lines.markersize": 5,
    }
    with matplotlib.rc_context(settings):
        yield


def _logarithmic(axes) -> None:
    """A logarithmic axis with plain numbers; stages train on losses of different size."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _points(lines: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that logged `key`."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, float), np.array(values, float)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a fortieth of the curve, cut at its ends; a short curve stays itself."""
    half = len(values) // 80
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _any(lines: Sequence[Mapping], key: str) -> bool:
    return any(line.get(key) is not None for line in lines)
