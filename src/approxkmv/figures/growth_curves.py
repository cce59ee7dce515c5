"""c against the prefix length for typical heads of each verdict, with their fitted power laws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from approxkmv.figures.style import COLOURS, as_written, entries, footnote, new_figure, not_in_kernel, save
from approxkmv.results.tables import masks_of, model_tables, read_heads, read_overview
from approxkmv.statistics.growth import FAR_BOUND, VERDICTS

if TYPE_CHECKING:
    import pandas as pd

# Where in a verdict's heads, ordered by exponent, its typical ones stand.
QUANTILES = (0.25, 0.75)


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From a model's two growth tables and its overview, write STEM.pdf and STEM.png; masked too if there is such."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = model_tables(tables, model)
    facts = as_written(read_overview(names.overview, "label", "layers", "heads"))
    growth = read_heads(names.growth, facts, {"exponent": "number", "coefficient": "number", "verdict": "text"})
    curves = read_heads(names.curves, facts, {"adjusted_ratio": "number"}, along="prefix")
    masks = masks_of(growth, "exponent")
    figure = new_figure(0.6 + 4.4 * len(masks), 5.2)
    panels = figure.subplots(1, len(masks), squeeze=False, sharey=True).ravel()
    prefixes = np.sort(curves["prefix"].unique())
    for axes, before in zip(panels, masks, strict=True):
        lowest = []
        for colour, (_, row) in zip(COLOURS, typical(growth, before).iterrows(), strict=False):
            own = curves[(curves["layer"] == row["layer"]) & (curves["head"] == row["head"])]
            axes.plot(
                own["prefix"], own[f"{before}adjusted_ratio"], color=colour, marker="o", markersize=3.5, linewidth=0
            )
            line = row[f"{before}coefficient"] * prefixes.astype(float) ** row[f"{before}exponent"]
            name = (
                f"layer {row['layer']}, head {row['head']}: g = {row[f'{before}exponent']:.2f}, "
                f"{row[f'{before}verdict']}"
            )
            axes.plot(prefixes, line, color=colour, linewidth=1.2, label=name)
            lowest.append(own[f"{before}adjusted_ratio"].min())
        axes.axhline(FAR_BOUND, color="#D00000", linewidth=0.9, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        # A head without a tail would squeeze the others into a corner.
        axes.set_ylim(bottom=max(1e-4, 0.5 * min([1.0, *lowest])))
        marks = [p for p in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if prefixes[0] <= p <= prefixes[-1]]
        axes.xaxis.set_major_locator(FixedLocator(marks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set_xlabel("prefix length n in tokens")
        axes.set_title(f"{entries(before, facts)} (dashed: c = {FAR_BOUND:g})", fontsize=8, loc="left")
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    panels[0].set_ylabel("c of the average text")
    figure.suptitle(f"{facts['label']}\nc(n) of typical heads and fitted power laws", fontsize=9, x=0.02, ha="left")
    footnote(figure, not_in_kernel(facts))
    return save(figure, stem)


def typical(growth: pd.DataFrame, before: str) -> pd.DataFrame:
    """Of each verdict, the heads at the QUANTILES of its exponents: one row per head, no head twice."""
    chosen: list[int] = []
    for word in VERDICTS:
        part = growth[growth[f"{before}verdict"] == word].dropna(subset=f"{before}exponent")
        part = part.sort_values(f"{before}exponent", kind="stable")
        chosen += [part.index[round(q * (len(part) - 1))] for q in QUANTILES if len(part)]
    return growth.loc[list(dict.fromkeys(chosen))]
