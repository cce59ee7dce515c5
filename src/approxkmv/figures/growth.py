"""Growth per head: layers by heads, coloured by the exponent of c over the last octave; large c that grows outlined."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from approxkmv.figures.heatmap import draw_heatmap, grid, is_wide, new_panels
from approxkmv.figures.style import as_written, entries, footnote, not_in_kernel, save
from approxkmv.results.tables import facts_of, masks_of, model_tables, read_heads, read_overview
from approxkmv.statistics.growth import FAST, SIZES, TRENDS, in_words


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From the growth table and overview of one model, write STEM.pdf and STEM.png; masked too if there is such."""
    facts = as_written(read_overview(facts_of(tables, model), "label", "layers", "heads", "paper_bound"))
    columns = {"exponent": "number", "size": "text", "trend": "text"} | dict.fromkeys(("texts", "length"), "whole")
    table = read_heads(model_tables(tables, model).growth, facts, columns)
    masks = masks_of(table, "exponent")
    values = grid(table, "exponent")
    shape = (len(masks), 1) if is_wide(values) else (1, len(masks))
    figure, panels = new_panels(values, *shape, title_lines=4)
    for axes, before in zip(panels, masks, strict=True):
        outlined = np.zeros(values.shape, dtype=bool)
        both = (table[f"{before}size"] == SIZES[1]) & (table[f"{before}trend"] == TRENDS[1])
        outlined[table["layer"], table["head"]] = both
        draw_heatmap(
            figure,
            axes,
            grid(table, f"{before}exponent"),
            low=-0.5,
            high=1.0,
            ticks=(-0.5, 0, FAST, 1),
            bound=None,
            label="exponent of c(n) over the last octave",
            write=two_decimals,
            linear=True,
            outlined=outlined,
        )
        counts = "\n".join(
            f"{name}: {in_words(table[f'{before}{name}'], words)}"
            for name, words in (("size", SIZES), ("trend", TRENDS))
        )
        axes.set_title(f"{entries(before, facts)}\n{counts}", fontsize=8, loc="left")
    first = table.iloc[0]
    figure.suptitle(
        f"{facts['label']}\nexponent of c(n) up to n = {first['length']:,} on {first['texts']} texts;\n"
        f"outlined: c(n) is above {facts['paper_bound']:g} and grows",
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
