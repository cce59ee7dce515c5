"""Growth per head: the exponent of c(n) from n/2 to n in each cell, with marks for the trend, outlines for the size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from approxkmv.figures.heatmap import Scale, draw_heatmap, grid, is_wide, new_panels
from approxkmv.figures.style import as_written, entries, footnote, not_in_kernel, save
from approxkmv.results.tables import ModelTables, masks_of, read_heads, read_overview
from approxkmv.statistics.growth import SIZES, TRENDS, in_words
from approxkmv.words import counted

if TYPE_CHECKING:
    import pandas as pd


# The mark in front of an exponent.
MARKS = dict(zip(TRENDS, ("→", "↑", "?"), strict=True))


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From the growth table and overview of one model, write STEM.pdf and STEM.png; masked too if there is such."""
    names = ModelTables(tables, model)
    facts = as_written(read_overview(names.facts, "label", "layers", "heads", "paper_bound"))
    columns = {"exponent": "number", "size": "text", "trend": "text"}
    columns |= dict.fromkeys(("texts", "length", "start"), "whole")
    table = read_heads(names.growth, facts, columns)
    masks = masks_of(table, "exponent")
    values = grid(table, "exponent")
    shape = (len(masks), 1) if is_wide(values) else (1, len(masks))
    first, bound = table.iloc[0], facts["paper_bound"]
    grows = table["trend"] == TRENDS[1]
    found = (
        f"c(n) grows in {grows.sum()} of {len(table)} heads and is above {bound:g} in "
        f"{(grows & (table['size'] == SIZES[1])).sum()} of them, by 95 % intervals"
        if first["start"]
        else "too few texts or lengths to tell how c(n) grows"
    )
    figure, panels = new_panels(
        values,
        *shape,
        f"{facts['label']}: {found}",
        f"Exponent of c(n) from n/2 to n = {first['length']:,} on {counted(first['texts'], 'text')}; "
        + ", ".join(f"{mark} {trend}" for trend, mark in MARKS.items())
        + f"; outlined: c(n) above {bound:g} (dashed: undecided)",
    )
    low, high = _limits(np.concatenate([table[f"{before}exponent"] for before in masks]))
    ticks = np.arange(low, high + 0.1, 0.5).tolist()
    scale = Scale(low, high, ticks, "exponent of c(n), from n/2 to n", linear=True)
    for axes, before in zip(panels, masks, strict=True):
        large, undecided = (_cells(table, f"{before}size", word) for word in SIZES[1:])
        before_them = np.full(values.shape, "", dtype=object)
        # With a thin space, since an arrow and a minus are one long arrow.
        before_them[table["layer"], table["head"]] = table[f"{before}trend"].map(MARKS) + "\u2009"
        draw_heatmap(
            figure,
            axes,
            grid(table, f"{before}exponent"),
            scale,
            write=two_decimals,
            outlined=large,
            dashed=undecided,
            before=before_them,
        )
        counts = "\n".join(
            f"{name}: {in_words(table[f'{before}{name}'], words)}"
            for name, words in (("size", SIZES), ("trend", TRENDS))
        )
        axes.set_title(f"{entries(before, facts)}\n{counts}", fontsize=8, loc="left")
    footnote(figure, not_in_kernel(facts))
    return save(figure, stem)


def _cells(table: pd.DataFrame, column: str, word: str) -> np.ndarray:
    """(layers, heads): where a verdict is this word."""
    return grid(table.assign(chosen=(table[column] == word).astype(float)), "chosen") == 1


def _limits(exponents: np.ndarray) -> tuple[float, float]:
    """Limits in steps of a half that hold all but one in fifty exponents at either end, at least 0 to 1."""
    low, high = np.nanquantile(exponents, (0.02, 0.98)) if np.isfinite(exponents).any() else (0.0, 1.0)
    return min(0.0, float(np.floor(2 * low) / 2)), max(1.0, float(np.ceil(2 * high) / 2))


def two_decimals(value: float) -> str:
    """An exponent in a cell, without a minus before zero."""
    text = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.0f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")
