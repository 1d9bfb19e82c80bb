"""Matrices of numbers as fields of colour, for light pages and dark ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from specjax.reporting.panels import DARK, DPI, LIGHT, PANEL_HEIGHT, WIDTH, dark_twin, style


def heat_map(
    panels: Mapping[str, Sequence[Sequence[float | None]]],
    path: str | Path,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
) -> None:
    """A matrix of numbers for each panel, in one scale of colours and written into the fields; None is left blank.

    Raises ValueError where there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrices = {title: np.array(values, float) for title, values in panels.items()}
    known = np.concatenate([m[np.isfinite(m)] for m in matrices.values()] or [np.zeros(0)])
    if not len(known):
        raise ValueError("there is nothing to draw: no record has the values of this figure")
    low, high = float(known.min()), float(known.max())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for theme, target in ((LIGHT, path), (DARK, dark_twin(path))):
        with style(theme):
            figure = Figure(figsize=(WIDTH, PANEL_HEIGHT * len(matrices)), layout="constrained")
            FigureCanvasAgg(figure)
            grid = figure.subplots(len(matrices), 1, squeeze=False)[:, 0]
            for axes, (title, values) in zip(grid, matrices.items(), strict=True):
                image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
                axes.grid(visible=False)
                axes.set_xticks(range(len(columns)), columns, fontsize=9)
                axes.set_yticks(range(len(rows)), rows)
                axes.set_title(title, loc="left")
                for (row, column), value in np.ndenumerate(values):
                    if np.isfinite(value):
                        ink = "#ffffff" if value < (low + high) / 2 else "#000000"
                        axes.text(column, row, f"{value:+.1f}", ha="center", va="center", color=ink)
            figure.colorbar(image, ax=list(grid), label=label)
            figure.savefig(target, dpi=DPI)
