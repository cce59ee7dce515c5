"""Figure 2: how far the kernel falls behind its n largest entries, median over texts, for every head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from approxkmv.figures.heatmap import draw_heatmap, grid, size_of
from approxkmv.figures.style import new_figure, save, short
from approxkmv.files import read_table
from approxkmv.steps.tables import model_tables, read_overview


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From the per-head table and the overview of one model, write STEM.pdf and STEM.png."""
    names = model_tables(tables, model)
    facts = read_overview(names.overview)
    table = read_table(names.heads)
    following, double = grid(table, "median_next_ratio"), grid(table, "median_double_ratio")
    width, height = size_of(following)
    # Wide grids one above the other, tall ones side by side.
    stacked = following.shape[1] >= following.shape[0]
    size = (width + 1.7, 2 * (height + 0.8) + 0.5) if stacked else (2 * (width + 1.5), height + 1.35)
    figure = new_figure(*size)
    first, second = figure.subplots(2, 1) if stacked else figure.subplots(1, 2)
    # 1 is the least that a ratio can be. The paper says "about 1" of the first: a narrow scale where that holds.
    wide: dict[str, Any] = {"low": 1.0, "high": 1000.0, "ticks": (1, 3, 10, 30, 100, 300, 1000)}
    narrow: dict[str, Any] = {"low": 1.0, "high": 1.1, "ticks": (1.0, 1.02, 1.04, 1.06, 1.08, 1.1)}
    scale = narrow if np.nanmax(following) <= 1.1 else wide
    draw_heatmap(
        figure,
        first,
        following,
        **scale,
        bound=None,
        label="median over texts",
        write=near_one,
    )
    draw_heatmap(
        figure,
        second,
        double,
        **wide,
        bound=20.0,
        label="median over texts",
    )
    figure.suptitle(
        f"{facts['label']}: {facts['texts_used']} texts of {facts['corpus']}",
        fontsize=10,
        fontweight="bold",
        x=0.02,
        ha="left",
    )
    first.set_title(
        "$K_{(n)}\\,/\\,K_{(n+1)}$, the last entry of the head over the first of the tail", fontsize=8, loc="left"
    )
    second.set_title("$K_{(n)}\\,/\\,K_{(2n)}$; outlined: above the paper's 20", fontsize=8, loc="left")
    return save(figure, stem)


def near_one(value: float) -> str:
    """A ratio that is mostly a little above 1: three decimals while they fit."""
    return f"{value:.3f}" if value < 9.9995 else short(value)
