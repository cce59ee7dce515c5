"""c, the rows that carry K, |K|_2 and the error that attention tolerates, against the gauge t."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from approxkmv.figures import style
from approxkmv.files import read_table
from approxkmv.results.tables import ModelTables, read_overview

COLUMNS = {"layer": "whole", "head": "whole", "tokens": "whole", "t": "at least 0"}
COLUMNS |= dict.fromkeys(("ratio", "participation"), "at least 0")
COLUMNS |= dict.fromkeys(("log10_largest_row", "log10_norm", "log10_bound"), "number")
# n^1.89 / epsilon^2 < n^2 needs epsilon above n to this power, before constants and logarithms.
NEEDED_POWER = -0.055
PANELS = (
    ("ratio", "c"),
    ("participation", "rows that carry K, $(\\sum r)^2 / \\sum r^2$"),
    ("log10_norm", "$\\log_{10} |K|_2$, error at which y = 0 passes"),
    ("log10_bound", "$\\log_{10}$ of the error that attention tolerates"),
)


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From a model's table of the gauge and its overview, write STEM.pdf and STEM.png."""
    names = ModelTables(tables, model)
    facts = style.as_written(read_overview(names.overview, "label", "paper_bound"))
    table = read_table(names.gauge, COLUMNS)
    factors = np.sort(table["t"].unique())
    factors = factors[factors > 0]
    tokens = int(table["tokens"].iloc[0])
    # Older tables lack the column: they are over all entries.
    over = "all entries" if "entries" not in table or table["entries"].iloc[0] == "all" else facts["mask"]
    figure = style.new_figure(8.6, 6.6)
    beyond = False
    for axes, (column, title) in zip(figure.subplots(2, 2, sharex=True).ravel(), PANELS, strict=True):
        groups = table.groupby("t")[column]
        for i, (share, name) in enumerate(style.HEADS):
            values = groups.quantile(share)
            along = values.loc[factors]
            look = style.look(i, markersize=4)
            axes.plot(along.index, along, label=name, linestyle=style.LINES[i], **look)
            if 0.0 in values.index and np.isfinite(values.loc[0.0]):
                axes.plot(factors[0] / 2, values.loc[0.0], linestyle="none", **look)
        axes.set_xscale("log", base=2)
        if not column.startswith("log10"):
            axes.set_yscale("log")
            # The margin of an axis over hundreds of decades would be a dozen decades.
            axes.set_ylim(max(axes.get_ylim()[0], 1e-4), 2 * float(np.nanmax(values)))
            style.logarithmic_ticks(axes.yaxis)
            for i, (share, _) in enumerate(style.HEADS):
                along = groups.quantile(share).loc[factors]
                beyond |= style.mark_beyond(axes, factors, along, **style.look(i, markersize=4))
        style.ticks_at(axes.xaxis, factors)
        axes.set_ylabel(title, fontsize=8.5)
        if column == "ratio":
            axes.axhline(facts["paper_bound"], color=style.BOUND, linewidth=1.0, linestyle=":")
        if column == "log10_bound":
            axes.axhline(NEEDED_POWER * np.log10(tokens), color=style.BOUND, linewidth=1.0, linestyle=":")
    for axes in figure.axes[2:]:
        axes.set_xlabel("t: queries times t, keys divided by t")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    style.legend_below(figure, style.wrapped(style.not_in_kernel(facts), 120), handles=handles, labels=labels, ncols=3)
    best = table.groupby(["layer", "head"])["log10_bound"].max()
    enough = int((best >= NEEDED_POWER * np.log10(tokens)).sum())
    style.headline(
        figure,
        f"{facts['label']}: {enough or 'none'} of {len(best)} heads have a t at which attention tolerates the error "
        "that a cost below n² needs",
        f"One text of {tokens:,} tokens, {over}; dotted: c = {facts['paper_bound']:g} and the error needed; "
        "points at the left: the limit t → 0, the matrix A itself" + "; points on an edge: beyond the axis" * beyond,
    )
    return style.save(figure, stem)
