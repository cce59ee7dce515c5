"""c against the length for typical heads of each size and trend, with the exponent over the last octave."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from approxkmv.figures import style
from approxkmv.figures.growth import two_decimals
from approxkmv.results.tables import ModelTables, masks_of, read_heads, read_overview
from approxkmv.statistics.growth import ENOUGH_TEXTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {"exponent": "number", "size": "text", "trend": "text"} | dict.fromkeys(("start", "length"), "whole")
# The lowest limit of the axis of c.
LOWEST = 1e-4


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From a model's two growth tables and its overview, write STEM.pdf and STEM.png; masked too if there is such."""
    names = ModelTables(tables, model)
    facts = style.as_written(read_overview(names.facts, "label", "layers", "heads", "paper_bound"))
    growth = read_heads(names.growth, facts, COLUMNS)
    curves = read_heads(
        names.growth_curves, facts, {"texts": "whole", "adjusted_ratio": "at least 0 or empty"}, along="prefix"
    )
    masks = masks_of(growth, "exponent")
    figure = style.new_figure(0.6 + 4.4 * len(masks), 5.4)
    panels = figure.subplots(1, len(masks), squeeze=False, sharey=True).ravel()
    prefixes = np.sort(curves["prefix"].unique())
    bound = facts["paper_bound"]
    drawn: list[tuple[Axes, pd.Series, pd.Series, dict[str, Any]]] = []
    for axes, before in zip(panels, masks, strict=True):
        for i, (_, row) in enumerate(typical(growth, before).iterrows()):
            own = curves[(curves["layer"] == row["layer"]) & (curves["head"] == row["head"])].set_index("prefix")
            c, solid = own[f"{before}adjusted_ratio"], own[f"{before}texts"] >= ENOUGH_TEXTS
            look = style.look(i, markersize=4.5)
            name = (
                f"layer {row['layer']}, head {row['head']}: {row[f'{before}size']}, {row[f'{before}trend']}, "
                f"exponent {two_decimals(row[f'{before}exponent'])}"
            )
            style.draw_points(axes, c.index, c, solid, label=name, linestyle="none", **look)
            octave = np.array([row[f"{before}start"], row[f"{before}length"]])
            middle = np.log(c.reindex(octave)).mean()
            line = np.exp(middle + row[f"{before}exponent"] * (np.log(octave) - np.log(octave).mean()))
            axes.plot(octave, line, color=look["color"], linewidth=1.6, linestyle=style.LINES[i % len(style.LINES)])
            drawn.append((axes, c, solid, look))
    # A head without a tail would squeeze the others into a corner: what lies below the axis is marked.
    lowest = 0.5 * min([1.0, *(c[c > 0].min() for _, c, *_ in drawn if (c > 0).any())])
    for axes, before in zip(panels, masks, strict=True):
        axes.axhline(bound, color=style.BOUND, linewidth=0.9, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(max(LOWEST, lowest), 2 * max([bound, *(c.max() for _, c, *_ in drawn)]))
        marks = [p for p in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if prefixes[0] <= p <= 1.2 * prefixes[-1]]
        axes.set_xlim(0.9 * prefixes[0], 1.1 * max(prefixes[-1], marks[-1] if marks else 0))
        style.ticks_at(axes.xaxis, marks)
        style.logarithmic_ticks(axes.yaxis)
        style.name_of_lengths(axes, "length n in tokens", curves[f"{before}texts"])
        axes.set_title(f"{style.entries(before, facts)} (dotted: c = {bound:g})", fontsize=8, loc="left")
        below = any((c < axes.get_ylim()[0]).any() for of, c, *_ in drawn if of is axes)
        if not any(of is axes for of, *_ in drawn):
            continue
        style.legend_under(axes, 0.14, f"points on the axis: c below {axes.get_ylim()[0]:.1g}" if below else "")
    for axes, c, solid, look in drawn:
        style.mark_beyond(axes, c.index, c, solid, **look)
    panels[0].set_ylabel("c of the average text")
    exponents = pd.concat([typical(growth, before)[f"{before}exponent"] for before in masks])
    ends = " to ".join(dict.fromkeys(two_decimals(end) for end in (exponents.min(), exponents.max())))
    found = f"c(n) of typical heads goes as n to the power {ends}"
    style.headline(
        figure,
        f"{facts['label']}: {found if len(exponents) else 'too few texts or lengths to tell how c(n) grows'}",
        "One head of each size and trend; lines: the exponent from n/2 to n",
    )
    style.footnote(figure, style.not_in_kernel(facts))
    return style.save(figure, stem)


def typical(growth: pd.DataFrame, before: str) -> pd.DataFrame:
    """Of each pair of size and trend the head in the middle of its exponents."""
    measured = growth.dropna(subset=f"{before}exponent").sort_values(f"{before}exponent", kind="stable")
    groups = measured.groupby([f"{before}size", f"{before}trend"], sort=True)
    return growth.loc[[part.index[len(part) // 2] for _, part in groups]]
