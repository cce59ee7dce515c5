"""Figures 1 and 3: the largest head-to-tail ratio of every head."""

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
    values = grid(read_table(names.heads), "max_ratio")
    width, height = size_of(values)
    figure = new_figure(width + 1.7, height + 1.35)
    axes = figure.add_subplot()
    bound = facts["paper_bound"]
    draw_heatmap(
        figure,
        axes,
        values,
        low=0.05,
        high=100.0,
        ticks=(0.1, 0.3, 1, 3, 10, 30, 100),
        bound=bound,
        label="largest c over texts and prefixes",
    )
    above = facts["layers"] * facts["heads"] - facts["heads_within_bound"]
    figure.suptitle(facts["label"], fontsize=10, fontweight="bold", x=0.02, ha="left")
    axes.set_title(
        f"Head-to-tail ratio c on {facts['texts_used']} texts of {facts['corpus']}\n"
        f"outlined: above the paper's bound {bound:g} ({above} of {facts['layers'] * facts['heads']} heads)",
        fontsize=8,
        loc="left",
    )
    return save(figure, stem)
