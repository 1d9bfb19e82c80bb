"""Figures of points with intervals in both directions: what costs against what is gained."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from specjax.reporting.panels import DASHES, Theme, looks_of, save_panels


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
