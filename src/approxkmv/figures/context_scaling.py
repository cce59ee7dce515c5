"""Figure 4: the largest c over all heads against context length, one line per model and mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from approxkmv.figures.style import (
    COLOURS,
    ENTRIES,
    as_written,
    draw_points,
    legend_below,
    name_of_lengths,
    new_figure,
    not_in_kernel,
    save,
    wrapped,
)
from approxkmv.results.tables import MASKED, masks_of, model_tables, read_overview, read_statistics

PLACE = {"prefix": "whole", "contexts": "whole"}
VALUES = {"mean": "number", "std": "number", "min": "number"}
# The longest label, in characters, of which two fit side by side.
LONGEST_IN_TWO_COLUMNS = 45


def draw(tables: Path, models: Sequence[str], stem: Path) -> list[Path]:
    """Write STEM.pdf and STEM.png from each model's scaling table and overview."""
    # Read first, since the labels decide the legend's height and number of columns.
    names = [model_tables(tables, model) for model in models]
    read = [
        (read_statistics(name.scaling, PLACE, VALUES), as_written(read_overview(name.overview, "label", "paper_bound")))
        for name in names
    ]
    masks = sorted({facts["mask"] for table, facts in read if MASKED in masks_of(table, "mean")})
    causal = bool(masks)
    dashed = f"the same model, {masks[0] if len(masks) == 1 else ENTRIES[MASKED]} (mean)" if causal else ""
    left_out = [f"{facts['label']}, {not_in_kernel(facts)}" for _, facts in read if facts["left_out"]]
    labels = [facts["label"] for _, facts in read] + [dashed] * causal
    columns = 2 if max(map(len, labels)) <= LONGEST_IN_TWO_COLUMNS else 1
    figure = new_figure(7.2, 4.2 + 0.18 * -(-len(labels) // columns))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bounds = []
    for i, (table, facts) in enumerate(read):
        colour = COLOURS[i % len(COLOURS)]
        top.fill_between(
            table["prefix"],
            (table["mean"] - table["std"]).clip(lower=table["min"]),
            table["mean"] + table["std"],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
        top.plot(table["prefix"], table["mean"], color=colour, label=facts["label"])
        draw_points(top, table["prefix"], table["mean"], table["contexts"], colour, 3.5)
        if MASKED in masks_of(table, "mean"):
            # Mean only: two bands per model would overlap.
            top.plot(table["prefix"], table[f"{MASKED}mean"], color=colour, linestyle="--")
            draw_points(top, table["prefix"], table[f"{MASKED}mean"], table["contexts"], colour, 2.5)
        bottom.plot(table["prefix"], table["contexts"], color=colour, marker="o", markersize=3)
        bounds.append(facts["paper_bound"])
    top.set_yscale("log")
    low, high = top.get_ylim()
    # Keep the bound's line and the text above it inside the axes, however small c is.
    low, lowest, highest = min(low, 1.0), min(bounds), max(bounds)
    top.set_ylim(low, max(high * 1.2, highest * (highest / low) ** 0.06))
    from matplotlib.ticker import FuncFormatter, LogLocator

    top.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    top.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    top.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    if lowest < highest:
        top.axhspan(lowest, highest, color="#D00000", alpha=0.12, linewidth=0)
    top.axhline(highest, color="#D00000", linewidth=1.0, linestyle=":")
    top.annotate(
        f"the paper's bound {highest:g}" if lowest == highest else f"the paper's bounds {lowest:g} to {highest:g}",
        (1.0, highest),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=7.5,
        color="#D00000",
    )
    top.set_ylabel("largest c over layers and heads")
    top.set_title(
        "Scaling of c with the length of the context: mean and standard deviation over texts", fontsize=9, loc="left"
    )
    if causal:
        top.plot([], [], color="#555555", linestyle="--", label=dashed)
    legend_below(figure, "\n".join(wrapped(line, 110) for line in left_out), ncols=columns)
    bottom.set_yscale("log")
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    bottom.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    bottom.set_ylabel("texts")
    name_of_lengths(bottom, "prefix length i in tokens", pd.concat([table["contexts"] for table, _ in read]))
    return save(figure, stem)
