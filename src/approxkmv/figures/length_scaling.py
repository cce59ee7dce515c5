"""Long texts: c, the order ratio and the keys that hold a row's mass against length, over all heads of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from approxkmv.figures import style
from approxkmv.files import check_columns
from approxkmv.results.tables import ModelTables, masks_of, read_heads, read_overview
from approxkmv.statistics.growth import ENOUGH_TEXTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The longest label, in characters, of which two fit side by side.
LONGEST_IN_TWO_COLUMNS = 60
PANELS = (
    ("ratio", "c(n) of K"),
    ("softmax_ratio", "c(n) of the softmax matrix"),
    ("double_ratio", "$K_{(n)}\\,/\\,K_{(2n)}$"),
    ("keys_90_mean", "keys that hold 90 % of a row's mass"),
)
# The lowest limit of each axis; axes not listed show values of at least 1.
LOWEST = {"ratio": 1e-3, "softmax_ratio": 1e-3}


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """Write STEM.pdf and STEM.png from the length table and facts of one model."""
    names = ModelTables(tables, model)
    facts = style.as_written(read_overview(names.lengths, "label", "layers", "heads", "texts_used", "corpus"))
    table = read_heads(names.length_scaling, facts, {column: "at least 0" for column, _ in PANELS}, along="length")
    # For both masks.
    check_columns(names.length_scaling, table, {"texts": "whole"})
    figure = style.new_figure(8.6, 7.0)
    panels = figure.subplots(2, 2, sharex=True).ravel()
    masks = masks_of(table, "ratio")
    texts = table.groupby("length")["texts"].min()
    lengths = np.sort(table["length"].unique())
    beyond = False
    for axes, (column, title) in zip(panels, PANELS, strict=True):
        drawn = []
        for before, line in zip(masks, style.LINES, strict=False):
            groups = table.groupby("length")[f"{before}{column}"]
            for i, (share, name) in enumerate(style.HEADS):
                values = groups.quantile(share)
                which = f", {facts['mask']}" if before else ""
                look = style.look(i, linestyle=line, markersize=3 if before else 4)
                style.draw_points(axes, lengths, values, texts >= ENOUGH_TEXTS, label=name + which, **look)
                drawn.append((values, look))
        if column == "keys_90_mean":
            axes.plot(lengths, lengths, color="#777777", linewidth=0.8)
            axes.annotate("all n", (lengths[0], lengths[0]), (2, 9), textcoords="offset points", fontsize=7)
        _scales(axes, lengths, LOWEST.get(column, 1.0))
        for values, look in drawn:
            beyond |= style.mark_beyond(axes, lengths, values, texts >= ENOUGH_TEXTS, **look)
        axes.set_ylabel(title, fontsize=8.5)
    for axes in panels[2:]:
        style.name_of_lengths(axes, "length n in tokens", texts)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = len(masks) if max(map(len, labels)) <= LONGEST_IN_TWO_COLUMNS else 1
    style.legend_below(
        figure, style.wrapped(style.not_in_kernel(facts), 120), handles=handles, labels=labels, ncols=columns
    )
    count = facts["texts_used"]
    # A length that few texts reach would compare them with all.
    known = lengths[(texts >= min(ENOUGH_TEXTS, texts.max())).to_numpy()]
    c = table[table["length"].isin(known)].groupby("length")["ratio"]
    middle, largest = ([style.short(c.quantile(share).iloc[end]) for end in (0, -1)] for share in (0.5, 1.0))
    found = f"at n = {known[0]:,} c(n) is {middle[0]} in the median head, {largest[0]} in the largest"
    if len(known) > 1:
        found = (
            f"from n = {known[0]:,} to {known[-1]:,} c(n) goes from {' to '.join(middle)} in the median head, "
            f"from {' to '.join(largest)} in the largest"
        )
    style.headline(
        figure,
        f"{facts['label']}: {found}",
        f"{facts['layers'] * facts['heads']} heads on "
        f"{'one long text' if count == 1 else f'{count} long texts (medians)'} of {facts['corpus']}"
        + "; points on an edge: beyond the axis"
        * beyond,
    )
    return style.save(figure, stem)


def _scales(axes: Axes, lengths: np.ndarray, lowest: float) -> None:
    """Logarithmic axes, with a tick at each length."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # A head without a tail would squeeze the others together, and one without a limit too.
    low, high = axes.get_ylim()
    low = lowest if lowest == 1.0 else max(low, lowest)
    axes.set_ylim(low, max(min(high, 1e6), 10 * low))
    marks = np.unique(lengths)
    style.ticks_at(axes.xaxis, marks[:: max(1, len(marks) // 6)])
    style.logarithmic_ticks(axes.yaxis)
