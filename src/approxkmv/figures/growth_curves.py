"""c against the length for typical heads of each size and trend, with the exponent over the last octave."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from approxkmv.figures.style import (
    COLOURS,
    as_written,
    draw_points,
    entries,
    footnote,
    name_of_lengths,
    new_figure,
    not_in_kernel,
    save,
)
from approxkmv.results.tables import facts_of, masks_of, model_tables, read_heads, read_overview

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {"exponent": "number", "size": "text", "trend": "text"} | dict.fromkeys(("start", "length"), "whole")


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From a model's two growth tables and its overview, write STEM.pdf and STEM.png; masked too if there is such."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = model_tables(tables, model)
    facts = as_written(read_overview(facts_of(tables, model), "label", "layers", "heads", "paper_bound"))
    growth = read_heads(names.growth, facts, COLUMNS)
    curves = read_heads(names.curves, facts, {"texts": "whole", "adjusted_ratio": "number"}, along="prefix")
    masks = masks_of(growth, "exponent")
    figure = new_figure(0.6 + 4.4 * len(masks), 5.4)
    panels = figure.subplots(1, len(masks), squeeze=False, sharey=True).ravel()
    prefixes = np.sort(curves["prefix"].unique())
    bound = facts["paper_bound"]
    for axes, before in zip(panels, masks, strict=True):
        lowest = []
        for colour, (_, row) in zip(COLOURS, typical(growth, before).iterrows(), strict=False):
            own = curves[(curves["layer"] == row["layer"]) & (curves["head"] == row["head"])].set_index("prefix")
            c = own[f"{before}adjusted_ratio"]
            draw_points(axes, own.index.to_series(), c, own[f"{before}texts"], colour, 3.5)
            name = (
                f"layer {row['layer']}, head {row['head']}: {row[f'{before}size']}, {row[f'{before}trend']}, "
                f"exponent {row[f'{before}exponent']:.2f}"
            )
            octave = np.array([row[f"{before}start"], row[f"{before}length"]])
            middle = np.log(c.reindex(octave)).mean()
            line = np.exp(middle + row[f"{before}exponent"] * (np.log(octave) - np.log(octave).mean()))
            axes.plot(octave, line, color=colour, linewidth=1.6, label=name)
            lowest.append(c.min())
        axes.axhline(bound, color="#D00000", linewidth=0.9, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        # A head without a tail would squeeze the others into a corner.
        axes.set_ylim(bottom=max(1e-4, 0.5 * min([1.0, *lowest])))
        marks = [p for p in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if prefixes[0] <= p <= prefixes[-1]]
        axes.xaxis.set_major_locator(FixedLocator(marks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        name_of_lengths(axes, "length n in tokens", curves[f"{before}texts"])
        axes.set_title(f"{entries(before, facts)} (dashed: c = {bound:g})", fontsize=8, loc="left")
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    panels[0].set_ylabel("c of the average text")
    figure.suptitle(
        f"{facts['label']}\nc(n) of typical heads; lines: exponent over the last octave", fontsize=9, x=0.02, ha="left"
    )
    footnote(figure, not_in_kernel(facts))
    return save(figure, stem)


def typical(growth: pd.DataFrame, before: str) -> pd.DataFrame:
    """Of each pair of size and trend the head in the middle of its exponents."""
    measured = growth.dropna(subset=f"{before}exponent").sort_values(f"{before}exponent", kind="stable")
    groups = measured.groupby([f"{before}size", f"{before}trend"], sort=True)
    return growth.loc[[part.index[len(part) // 2] for _, part in groups]]
