"""Growth of c per head: layers by heads, coloured by the exponent g, heads that fail outlined."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from approxkmv.figures.heatmap import draw_heatmap, grid, is_wide, new_panels
from approxkmv.figures.style import as_written, entries, footnote, not_in_kernel, save
from approxkmv.results.tables import masks_of, model_tables, read_heads, read_overview
from approxkmv.statistics.growth import FAILS, VERDICTS


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From the growth table and overview of one model, write STEM.pdf and STEM.png; masked too if there is such."""
    names = model_tables(tables, model)
    facts = as_written(read_overview(names.overview, "label", "layers", "heads", "texts_used"))
    table = read_heads(names.growth, facts, {"exponent": "number", "verdict": "text"})
    masks = masks_of(table, "exponent")
    values = grid(table, "exponent")
    figure, panels = new_panels(values, *((len(masks), 1) if is_wide(values) else (1, len(masks))))
    for axes, before in zip(panels, masks, strict=True):
        fails = np.zeros(values.shape, dtype=bool)
        fails[table["layer"], table["head"]] = table[f"{before}verdict"] == FAILS
        draw_heatmap(
            figure,
            axes,
            grid(table, f"{before}exponent"),
            low=-0.5,
            high=1.0,
            ticks=(-0.5, 0, 0.1, 0.5, 1),
            bound=None,
            label="g",
            write=two_decimals,
            linear=True,
            outlined=fails,
        )
        counts = table[f"{before}verdict"].value_counts()
        found = ", ".join(f"{word} {counts[word]}" for word in VERDICTS if word in counts)
        axes.set_title(f"{entries(before, facts)}\n{found}", fontsize=8, loc="left")
    figure.suptitle(
        f"{facts['label']}\nexponent g of c(n) ~ n$^g$ on {facts['texts_used']} texts; outlined: fails",
        fontsize=9,
        x=0.02,
        ha="left",
    )
    footnote(figure, not_in_kernel(facts))
    return save(figure, stem)


def two_decimals(value: float) -> str:
    """An exponent in a cell, without a minus before zero."""
    text = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.0f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")
