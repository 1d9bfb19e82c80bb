"""Figures of points with intervals in both directions: what costs against what is gained."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from specjax.reporting.estimates import Estimate
from specjax.reporting.panels import DASHES, Theme, looks_of, save_panels


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point with its intervals in both directions (None if there is none), drawn hollow or filled."""

    x: float | int
    x_edges: tuple[float, float] | None
    y: float | int
    y_edges: tuple[float, float] | None
    hollow: bool = False

    @classmethod
    def of(cls, x: Estimate, y: Estimate, hollow: bool = False) -> "Mark":
        """The mark of two estimates over seeds."""
        edges = lambda at: None if at.half is None else (at.mean - at.half, at.mean + at.half)
        return cls(x.mean, edges(x), y.mean, edges(y), hollow)


def tradeoff_figure(
    panels: Mapping[str, Mapping[str, Sequence[Mark]]],
    path: str | Path,
    *,
    axes: Sequence[tuple[str, str]],
    joined: bool = True,
    front: Sequence[tuple[float, float]] = (),
) -> None:
    """Draws marks with their intervals, one colour per series, and a dashed line through `front`.

    Args:
      panels: {title: {name of a series: its marks, in the order of the line through them}}.
      path: of the light figure; the dark one is saved next to it.
      axes: the labels of the horizontal and the vertical axis, for each panel.
      joined: whether a line goes through the marks of a series.

    Raises:
      ValueError: if there is no panel.
    """
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    looks = looks_of((), names)
    labels = dict(zip(panels, axes, strict=True))

    def draw(axes, theme: Theme, series: Mapping) -> None:
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
        if front:
            axes.plot(*zip(*front, strict=True), color=theme.ink, linestyle=DASHES, linewidth=1)
        across, up = labels[next(title for title, drawn in panels.items() if drawn is series)]
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    save_panels(path, panels, names, draw, dashed="Pareto front" if front else None)
