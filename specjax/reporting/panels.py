"""Shared parts of all figures: two themes, colours and markers of lines, and stacked panels under one legend.

Each figure is saved twice, as NAME.png for light pages and NAME.dark.png for dark ones. Panels are stacked,
so that a figure is readable on the screen of a phone. A name has the same colour in all figures with the
same `palette`, which is the list of all names.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

WIDTH, PANEL_HEIGHT, DPI = 5.0, 2.7, 170
MARKERS = "osD^vPX"
DASHES = (0, (4, 2))


@dataclasses.dataclass(frozen=True)
class Theme:
    ink: str
    faint: str
    paper: str
    series: tuple[str, ...]


# Colours that are distinct with red-green colour blindness; lines also differ by marker.
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


def dark_twin(path: str | Path) -> Path:
    """The path of the dark version of a figure."""
    path = Path(path)
    return path.with_name(f"{path.stem}.dark.png")


def looks_of(palette: Sequence[str], names: Sequence[str]) -> Callable[[Theme, str], tuple[str, str]]:
    """Makes a function from (theme, name) to a line's colour and marker, by the name's index in palette, then names."""
    places = {name: place for place, name in enumerate(dict.fromkeys([*palette, *names]))}

    def look(theme: Theme, name: str) -> tuple[str, str]:
        again, place = divmod(places[name], len(theme.series))  # a colour is reused with another marker
        return theme.series[place], MARKERS[(place + again) % len(MARKERS)]

    return look


def save_panels(
    path: str | Path,
    panels: Mapping[str, Mapping],
    names: Sequence[str],
    draw: Callable,
    *,
    share_y: bool = False,
    dashed: str | None = None,
) -> None:
    """Saves a figure in both themes; `draw(axes, theme, panel)` draws each of `panels`, and `names` are the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not panels:
        raise ValueError("there is nothing to draw: no record has the values of this figure")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [*names, *([dashed] if dashed else [])]
    columns = _columns(entries)
    legend_height = 0.15 + 0.24 * -(-len(entries) // columns) if len(entries) > 1 else 0.1
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
            if len(entries) > 1:
                labels = [axes.get_legend_handles_labels() for axes in grid]
                handles = {label: handle for pair in labels for handle, label in zip(*pair, strict=True)}
                handles = {name: handles[name] for name in names if name in handles}
                if dashed:
                    handles[dashed] = Line2D([], [], color=theme.ink, linestyle=DASHES, linewidth=1)
                figure.legend(handles.values(), handles.keys(), loc="upper left", ncols=columns)
            figure.savefig(target, dpi=DPI)


def _columns(entries: Sequence[str]) -> int:
    """The number of legend columns that fit the figure's width, at least one."""
    from matplotlib.textpath import TextPath

    # The width of an entry is that of its text, plus 0.65 inches for the sample line and margins.
    widths = [TextPath((0, 0), name, size=10).get_extents().width / 72 + 0.65 for name in entries]
    fits = lambda columns: sum(max(part, default=0.0) for part in np.array_split(widths, columns)) <= WIDTH
    return next((columns for columns in (3, 2) if fits(columns)), 1)


@contextlib.contextmanager
def style(theme: Theme):
    """A matplotlib context for a theme: axes without a box, a faint horizontal grid, text in the page's colour."""
    import matplotlib

    inked = ("axes.titlecolor", "axes.labelcolor", "axes.edgecolor", "text.color", "xtick.color", "ytick.color")
    absent = ("axes.spines.top", "axes.spines.right", "axes.spines.left", "ytick.left", "ytick.minor.left")
    settings = {
        "font.family": "sans-serif",
        "font.size": 10.5,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.facecolor": theme.paper,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "grid.linewidth": 0.8,
        "figure.facecolor": theme.paper,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "legend.handlelength": 1.8,
        "legend.borderaxespad": 0.3,
        "lines.linewidth": 1.9,
        "lines.markersize": 5,
        **dict.fromkeys(inked, theme.ink),
        **dict.fromkeys(absent, False),
    }
    with matplotlib.rc_context(settings):
        yield
