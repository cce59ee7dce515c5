"""Figure 2: how far the kernel falls behind its n largest entries, median over texts, for every head."""

from __future__ import annotations

from pathlib import Path

from approxkmv.figures.heatmap import draw_heatmap, grid, size_of
from approxkmv.figures.style import new_figure, save
from approxkmv.files import read_table
from approxkmv.steps.tables import model_tables, read_overview


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From the per-head table and the overview of one model, write STEM.pdf and STEM.png."""
    names = model_tables(tables, model)
    facts = read_overview(names.overview)
    table = read_table(names.heads)
    following, double = grid(table, "median_next_ratio"), grid(table, "median_double_ratio")
    width, height = size_of(following)
    figure = new_figure(2 * (width + 1.5), height + 1.35)
    left, right = figure.subplots(1, 2)
    # 1 is the least that a ratio can be; the scale of the left panel is narrow because the paper says "about 1".
    draw_heatmap(figure, left, following, low=1.0, high=1.1, bound=None, label="median of the ratio")
    draw_heatmap(figure, right, double, low=1.0, high=1000.0, bound=20.0, label="median of the ratio")
    figure.suptitle(
        f"{facts['label']}: {facts['texts_used']} texts of {facts['corpus']}",
        fontsize=10,
        fontweight="bold",
        x=0.02,
        ha="left",
    )
    left.set_title("$K_{(n)}\\,/\\,K_{(n+1)}$: the last of the head over the first of the tail", fontsize=8, loc="left")
    right.set_title("$K_{(n)}\\,/\\,K_{(2n)}$; outlined: above the paper's 20", fontsize=8, loc="left")
    return save(figure, stem)
