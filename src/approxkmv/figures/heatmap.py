"""A grid of layers by heads with the value in each cell, as in Figures 1 to 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from approxkmv.figures.style import headline, new_figure, short, ticks_at

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL_WIDTH = 0.46
CELL_HEIGHT = 0.27


@dataclass(frozen=True)
class Scale:
    """The colours of values from low to high: by logarithm or linearly, with ticks, a label and perhaps a bound."""

    low: float
    high: float
    ticks: Sequence[float]
    label: str
    bound: float | None = None
    linear: bool = False


def grid(table: pd.DataFrame, column: str) -> np.ndarray:
    """(layers, heads), NaN if a model has no such head."""
    values = np.full((table["layer"].max() + 1, table["head"].max() + 1), np.nan)
    values[table["layer"], table["head"]] = table[column]
    return values


def size_of(values: np.ndarray) -> tuple[float, float]:
    """Width and height in inches of the cells alone."""
    return max(2.6, CELL_WIDTH * values.shape[1]), max(1.2, CELL_HEIGHT * values.shape[0])


def new_panels(values: np.ndarray, rows: int, columns: int, *title: str) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns heat maps of the shape of `values`, and its axes, row by row.

    `title`: the finding and the lines that explain it. Narrow grids are widened to fit a panel's title.
    """
    width, height = size_of(values)
    figure = new_figure(columns * (max(width, 3.4) + 1.5), 1.0)
    figure.set_figheight(rows * (height + 0.9) + 0.2 + 0.16 * headline(figure, *title))
    engine = figure.get_layout_engine()
    assert engine is not None
    # Space between the colour bar of a panel and the next panel.
    engine.set(w_pad=0.12)  # type: ignore[call-arg]
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def is_wide(values: np.ndarray) -> bool:
    """Whether two such grids fit better stacked than side by side."""
    return values.shape[1] >= values.shape[0]


def draw_heatmap(
    figure: Figure,
    axes: Axes,
    values: np.ndarray,
    scale: Scale,
    *,
    write: Callable[[float], str] = short,
    outlined: np.ndarray | None = None,
    dashed: np.ndarray | None = None,
    before: np.ndarray | None = None,
) -> None:
    """Colour by the scale, write each value, and outline the cells above the scale's bound.

    `outlined` and `dashed` (layers, heads) select the cells to outline instead; `before` has marks to write before
    the values.
    """
    from matplotlib.colors import LogNorm, Normalize

    low, high, bound = scale.low, scale.high, scale.bound
    norm = Normalize(low, high) if scale.linear else LogNorm(low, high)
    if outlined is None:
        outlined = values > bound if bound is not None else np.zeros(values.shape, dtype=bool)
    shown = np.clip(values, low, high)
    dark = norm(shown) < 0.6
    image = axes.imshow(shown, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
    for (layer, head), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        # It lies within its cell: the margins need not measure thousands of them.
        words = ("" if before is None else str(before[layer, head])) + write(value)
        text = axes.text(head, layer, words, ha="center", va="center", fontsize=6.5)
        text.set(color="white" if dark[layer, head] else "black", in_layout=False)
        if outlined[layer, head] or (dashed is not None and dashed[layer, head]):
            _outline(axes, head, layer, "-" if outlined[layer, head] else (0, (2, 2)))
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    axes.tick_params(length=0, labelsize=7)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3.2 / size_of(values)[1]), pad=0.02, extend="both")
    ticks_at(bar.ax.yaxis, scale.ticks)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(scale.label, fontsize=8)
    if bound is not None and low < bound < high:
        bar.ax.axhline(bound, color="white", linewidth=3.2)
        bar.ax.axhline(bound, color="black", linewidth=1.6)


def _outline(axes: Axes, head: int, layer: int, line: Any) -> None:
    """Black on white, readable on every colour."""
    from matplotlib.patches import Rectangle

    for colour, width, style in (("white", 2.4, "-"), ("black", 1.2, line)):
        cell = Rectangle((head - 0.45, layer - 0.43), 0.9, 0.86, fill=False, edgecolor=colour)
        cell.set(linewidth=width, linestyle=style)
        axes.add_patch(cell)
