"""Long texts: c, the order ratio and the keys that hold a row's mass against length, over all heads of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from approxkmv.figures.style import (
    COLOURS,
    as_written,
    draw_points,
    legend_below,
    name_of_lengths,
    new_figure,
    not_in_kernel,
    save,
    wrapped,
)
from approxkmv.files import check_columns
from approxkmv.results.tables import length_tables, masks_of, read_heads, read_overview

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Which heads are drawn, as quantiles over a model's heads.
HEADS = ((0.5, "median head"), (0.9, "90th of 100 heads"), (1.0, "largest head"))
# The longest label, in characters, of which two fit side by side.
LONGEST_IN_TWO_COLUMNS = 60
PANELS = (
    ("ratio", "c(n)"),
    ("softmax_ratio", "c(n) of the softmax matrix, without the row factor"),
    ("double_ratio", "$K_{(n)}\\,/\\,K_{(2n)}$ (the axis ends at $10^6$)"),
    ("keys_90_mean", "keys that hold 90 % of a row's softmax mass"),
)


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """Write STEM.pdf and STEM.png from the length table and facts of one model."""
    names = length_tables(tables, model)
    facts = as_written(read_overview(names.facts, "label", "layers", "heads", "texts_used", "corpus"))
    table = read_heads(names.scaling, facts, {column: "number" for column, _ in PANELS}, along="length")
    # For both masks.
    check_columns(names.scaling, table, {"texts": "whole"})
    figure = new_figure(8.6, 6.6)
    panels = figure.subplots(2, 2, sharex=True).ravel()
    masks = masks_of(table, "ratio")
    texts = table.groupby("length")["texts"].min()
    for axes, (column, title) in zip(panels, PANELS, strict=True):
        for before, line in zip(masks, ("-", "--"), strict=False):
            groups = table.groupby("length")[f"{before}{column}"]
            for (share, name), colour in zip(HEADS, COLOURS, strict=False):
                values = groups.quantile(share)
                which = f", {facts['mask']}" if before else ""
                axes.plot(values.index, values, color=colour, linestyle=line, label=name + which)
                draw_points(axes, values.index.to_series(), values, texts, colour, 3)
        _scales(axes, table["length"].to_numpy())
        axes.set_title(title, fontsize=8.5, loc="left")
    lengths = np.sort(table["length"].unique())
    panels[3].plot(lengths, lengths, color="#999999", linewidth=0.8)
    panels[3].annotate(
        "all n", (lengths[0], lengths[0]), (2, 9), textcoords="offset points", fontsize=7, color="#777777"
    )
    for axes in panels[2:]:
        name_of_lengths(axes, "n in tokens", texts)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = len(masks) if max(map(len, labels)) <= LONGEST_IN_TWO_COLUMNS else 1
    legend_below(figure, wrapped(not_in_kernel(facts), 120), handles=handles, labels=labels, ncols=columns)
    count = facts["texts_used"]
    figure.suptitle(
        f"{facts['label']}: {facts['layers'] * facts['heads']} heads on "
        f"{'one long text' if count == 1 else f'{count} long texts (medians)'} of {facts['corpus']}",
        fontsize=10,
        fontweight="bold",
        x=0.02,
        ha="left",
    )
    return save(figure, stem)


def _scales(axes: Axes, lengths: np.ndarray) -> None:
    """Logarithmic axes, with a tick at each length."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # A head without a tail would squeeze the others together, and one without a limit too.
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-3), min(high, 1e6))
    marks = np.unique(lengths)
    axes.xaxis.set_major_locator(FixedLocator(marks[:: max(1, len(marks) // 6)].tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
