"""Figure 2: how far the kernel falls behind its n largest entries, median over texts, for every head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from approxkmv.figures.heatmap import draw_heatmap, grid, is_wide, new_panels
from approxkmv.figures.style import as_written, entries, footnote, not_in_kernel, save, short
from approxkmv.results.tables import masks_of, model_tables, read_heads, read_overview

# A ratio is at least 1. The paper says "about 1" for K_(n)/K_(n+1): a narrow scale resolves that.
WIDE: dict[str, Any] = {"low": 1.0, "high": 1000.0, "ticks": (1, 3, 10, 30, 100, 300, 1000)}
NARROW: dict[str, Any] = {"low": 1.0, "high": 1.1, "ticks": (1.0, 1.02, 1.04, 1.06, 1.08, 1.1)}

TITLE: dict[str, Any] = {"fontsize": 8, "loc": "left"}


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From the per-head table and the overview of one model, write STEM.pdf and STEM.png; masked too if available.

    For a causal model one row of panels is over all entries and one is masked; otherwise the two panels are arranged
    as they fit best.
    """
    names = model_tables(tables, model)
    facts = as_written(read_overview(names.overview, "label", "layers", "heads", "texts_used", "corpus"))
    table = read_heads(names.heads, facts, {"median_next_ratio": "number", "median_double_ratio": "number"})
    masks = masks_of(table, "median_next_ratio")
    values = grid(table, "median_next_ratio")
    rows, columns = (len(masks), 2) if len(masks) > 1 or not is_wide(values) else (2, 1)
    figure, panels = new_panels(values, rows, columns)
    following = {before: grid(table, f"{before}median_next_ratio") for before in masks}
    # One scale for both masks, so that a colour means the same in each.
    scale = NARROW if max(map(np.nanmax, following.values())) <= NARROW["high"] else WIDE
    for i, before in enumerate(masks):
        first, second = panels[2 * i : 2 * i + 2]
        draw_heatmap(
            figure,
            first,
            following[before],
            **scale,
            bound=None,
            label="median over texts",
            write=near_one,
        )
        double = grid(table, f"{before}median_double_ratio")
        draw_heatmap(figure, second, double, **WIDE, bound=20.0, label="median over texts")
        first.set_title(
            f"$K_{{(n)}}\\,/\\,K_{{(n+1)}}$, last of the head over first of the tail\n{entries(before, facts)}", **TITLE
        )
        second.set_title(
            f"$K_{{(n)}}\\,/\\,K_{{(2n)}}$; outlined: above the paper's 20\n{entries(before, facts)}", **TITLE
        )
    figure.suptitle(
        f"{facts['label']}\nratios of ordered entries on {facts['texts_used']} texts of {facts['corpus']}",
        fontsize=9,
        x=0.02,
        ha="left",
    )
    footnote(figure, not_in_kernel(facts))
    return save(figure, stem)


def near_one(value: float) -> str:
    """A ratio that is mostly slightly above 1: three decimals if they fit."""
    return f"{value:.3f}" if value < 9.9995 else short(value)
