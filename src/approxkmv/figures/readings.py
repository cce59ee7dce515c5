"""The largest c and the order ratio of a model under each reading of the definition, and along scales between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from approxkmv.figures import style
from approxkmv.files import read_table
from approxkmv.results.tables import MASKED, ModelTables, read_overview
from approxkmv.words import counted

COLUMNS = dict.fromkeys(("reading", "entries"), "text")
COLUMNS |= dict.fromkeys(("largest_ratio", "median_double"), "at least 0 or empty")
COLUMNS |= dict.fromkeys(("heads_within_bound", "heads", "texts"), "whole")
# The highest limit of the axis: underflows make a ratio infinite. And the lowest of the axis of c, which may be 0.
LARGEST = 1e6
LEAST = 1e-3
# "About 20 or less for most heads."
DOUBLE = 20.0


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From a model's two tables of readings and its overview, write STEM.pdf and STEM.png; masked too if there."""
    from matplotlib.patches import Rectangle

    names = ModelTables(tables, model)
    facts = style.as_written(read_overview(names.overview, "label", "paper_bound"))
    table = read_table(names.readings, COLUMNS)
    path = read_table(names.readings_path, {**COLUMNS, "power": "at least 0"})
    highest = 1.5 * max(100.0, table["median_double"].max(), path["median_double"].max())
    beyond = False
    kinds = sorted(table["entries"].unique(), key=lambda kind: kind != "all")
    figure = style.new_figure(1.2 + 4.2 * len(kinds), 4.4)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True).ravel()
    bound = facts["paper_bound"]
    for axes, kind in zip(panels, kinds, strict=True):
        line = path[path["entries"] == kind].sort_values("power")
        c = line["largest_ratio"].clip(lower=LEAST)
        axes.plot(c, line["median_double"], color="#888888", linewidth=1.0, zorder=1)
        own = table[table["entries"] == kind]
        own = own.assign(small=own["largest_ratio"] < LEAST, largest_ratio=own["largest_ratio"].clip(lower=LEAST))
        looks = [style.look(i, markersize=7, alpha=0.85) for i in range(len(own))]
        for row, look in zip(own.itertuples(), looks, strict=True):
            label = f"{row.reading} ({row.heads_within_bound} of {row.heads})"
            label += ", ratio 0/0" if np.isnan(row.median_double) else ""
            axes.plot(row.largest_ratio, row.median_double, linewidth=0, label=label, **look)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(
            min(0.3, max(LEAST, 0.7 * own["largest_ratio"].min())), max(10.0, 1.5 * own["largest_ratio"].max())
        )
        axes.set_ylim(0.8, min(LARGEST, highest))
        for row, look in zip(own.itertuples(), looks, strict=True):
            beyond |= row.small | style.mark_beyond(axes, [row.largest_ratio], [row.median_double], **look)
            if row.small:
                axes.plot(row.largest_ratio, np.clip(row.median_double, *axes.get_ylim()), clip_on=False, **look)
        low, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
        hatched: dict[str, Any] = {"facecolor": "#009E7322", "edgecolor": "black", "hatch": "//", "linewidth": 0}
        axes.add_patch(Rectangle((low, bottom), bound - low, DOUBLE - bottom, zorder=0, **hatched))
        for axis in (axes.xaxis, axes.yaxis):
            style.logarithmic_ticks(axis)
        axes.set_xlabel("largest c over heads and texts")
        axes.set_title(style.entries("" if kind == "all" else MASKED, facts), fontsize=8, loc="left", pad=9)
        style.legend_under(axes, 0.16, f"heads with c at most {bound:g}", ncols=2)
    panels[0].set_ylabel("$K_{(n)}\\,/\\,K_{(2n)}$, median over heads")
    fewest, most = int(table["texts"].min()), int(table["texts"].max())
    texts = counted(most, "text") if fewest == most else f"{fewest} to {most} texts"
    inside = table[(table["largest_ratio"] <= bound) & (table["median_double"] <= DOUBLE)]
    names_inside = {kind: ", ".join(inside.loc[inside["entries"] == kind, "reading"]) or "no reading" for kind in kinds}
    style.headline(
        figure,
        f"{facts['label']}: the paper's numbers (c at most {bound:g}, the ratio at most {DOUBLE:g}) come out "
        + "; ".join(
            f"under {names_inside[kind]} ({style.entries('' if kind == 'all' else MASKED, facts)})" for kind in kinds
        ),
        f"Readings of the definition on {texts}; line: scales up to 1; hatched: the paper's numbers"
        + "; points on the edge: beyond it" * beyond,
    )
    style.footnote(figure, style.not_in_kernel(facts))
    return style.save(figure, stem)
