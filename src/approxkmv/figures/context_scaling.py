"""Figure 4: the largest c over all heads against context length, one line per model and mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from approxkmv.figures import style
from approxkmv.results.tables import MASKED, ModelTables, masks_of, read_overview, read_statistics
from approxkmv.statistics.growth import ENOUGH_TEXTS

PLACE = {"prefix": "whole", "contexts": "whole"}
VALUES = dict.fromkeys(("mean", "std", "min"), "at least 0")
# The lowest limit of the axis of c.
LOWEST = 1e-4
# The longest label, in characters, of which two fit side by side.
LONGEST_IN_TWO_COLUMNS = 45
# The longest name beside a line's end, which takes its room from the axes; the legend has all of it.
LONGEST_AT_AN_END = 32


def draw(tables: Path, models: Sequence[str], stem: Path) -> list[Path]:
    """Write STEM.pdf and STEM.png from each model's scaling table and overview."""
    # Read first, since the labels decide the legend's height and number of columns.
    names = [ModelTables(tables, model) for model in models]
    read = [
        (
            read_statistics(name.context_scaling, PLACE, VALUES),
            style.as_written(read_overview(name.overview, "label", "paper_bound")),
        )
        for name in names
    ]
    masks = sorted({facts["mask"] for table, facts in read if MASKED in masks_of(table, "mean")})
    causal = bool(masks)
    dashed = f"the same model, {masks[0] if len(masks) == 1 else style.ENTRIES[MASKED]} (mean)" if causal else ""
    left_out = [f"{facts['label']}, {style.not_in_kernel(facts)}" for _, facts in read if facts["left_out"]]
    labels = [facts["label"] for _, facts in read] + [dashed] * causal
    columns = 2 if max(map(len, labels)) <= LONGEST_IN_TWO_COLUMNS else 1
    figure = style.new_figure(8.2, 4.4 + 0.18 * -(-len(labels) // columns))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bounds, ends, found, drawn = [], [], [], []
    for i, (table, facts) in enumerate(read):
        look = style.look(i)
        prefix, solid = table["prefix"], table["contexts"] >= ENOUGH_TEXTS
        below, above = (table["mean"] - table["std"]).clip(lower=table["min"]), table["mean"] + table["std"]
        top.fill_between(prefix, below, above, color=look["color"], alpha=0.18, linewidth=0)
        style.draw_points(top, prefix, table["mean"], solid, label=facts["label"], markersize=5, **look)
        drawn.append((prefix, table["mean"], solid, look | {"markersize": 5}))
        name = style.abridged(_short(facts["label"]), LONGEST_AT_AN_END)
        ends.append((prefix.iloc[-1], table["mean"].iloc[-1], name, look["color"]))
        if MASKED in masks_of(table, "mean"):
            # Mean only: two bands per model would overlap.
            masked = table[f"{MASKED}mean"]
            style.draw_points(top, prefix, masked, solid, markersize=3.5, linestyle="--", **look)
            drawn.append((prefix, masked, solid, look | {"markersize": 3.5}))
            ends.append((prefix.iloc[-1], masked.iloc[-1], f"{name}, masked", look["color"]))
        bottom.plot(prefix, table["contexts"], markersize=3.5, **look)
        bounds.append(facts["paper_bound"])
        if solid.any():
            known = table[solid]
            first, last = known.iloc[0], known.iloc[-1]
            found.append((_short(facts["label"]), first, last))
    top.set_yscale("log")
    low, high = top.get_ylim()
    # Keep the bound's line and the text above it inside the axes, however small c is.
    low, lowest, highest = min(max(low, LOWEST), 1.0), min(bounds), max(bounds)
    top.set_ylim(low, max(high * 1.2, highest * (highest / low) ** 0.06))
    tiny = [style.mark_beyond(top, *points, **look) for *points, look in drawn]
    style.logarithmic_ticks(top.yaxis)
    if lowest < highest:
        top.axhspan(lowest, highest, color=style.BOUND, alpha=0.12, linewidth=0)
    top.axhline(highest, color=style.BOUND, linewidth=1.0, linestyle=":")
    top.annotate(
        f"the paper's bound {highest:g}" if lowest == highest else f"the paper's bounds {lowest:g} to {highest:g}",
        (1.0, highest),
        (0, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=7.5,
        color=style.BOUND,
    )
    top.set_ylabel("largest c over layers and heads")
    if causal:
        top.plot([], [], color="#555555", linestyle="--", label=dashed)
    style.legend_below(figure, "\n".join(style.wrapped(line, 110) for line in left_out), ncols=columns)
    bottom.set_yscale("log")
    style.logarithmic_ticks(bottom.yaxis)
    bottom.set_ylabel("texts")
    style.name_of_lengths(bottom, "prefix length i in tokens", pd.concat([table["contexts"] for table, _ in read]))
    title, details = _from_to(found)
    style.headline(
        figure,
        f"Figure 4: the largest c over layers and heads {title}",
        details,
        "Mean and standard deviation over texts" + "; points on the axis: smaller c" * any(tiny),
    )
    style.label_ends(figure, [(top, [(x, max(y, low), *more) for x, y, *more in ends])])
    return style.save(figure, stem)


def _from_to(found: Sequence[tuple[str, pd.Series, pd.Series]]) -> tuple[str, str]:
    """What happens to the largest c from the shortest to the longest prefix that enough texts reach.

    By model, or of many models how many and, for the line below, between which values.
    """
    if not found:
        return "of too few texts to say", ""
    if len(found) <= 2:
        if all(first["prefix"] == last["prefix"] for _, first, last in found):
            each = [f"{style.short(last['mean'])} at {last['prefix']:.0f} tokens ({name})" for name, _, last in found]
            return f"is {'; '.join(each)}", ""
        each = [
            f"from {style.short(first['mean'])} at {first['prefix']:.0f} tokens to {style.short(last['mean'])} at "
            f"{last['prefix']:.0f} ({name})"
            for name, first, last in found
        ]
        return f"goes {'; '.join(each)}", ""
    start, end = (
        f"{style.short(min(row['mean'] for row in rows))} to {style.short(max(row['mean'] for row in rows))}"
        for rows in ([first for _, first, _ in found], [last for *_, last in found])
    )
    up = sum(last["mean"] > first["mean"] for _, first, last in found)
    return (
        f"is larger at the longest prefix than at the shortest in {up} of {len(found)} models",
        f"{start} at the shortest prefix, {end} at the longest that {ENOUGH_TEXTS} texts reach",
    )


def _short(label: str) -> str:
    """A model's label without what is in brackets."""
    return label.partition(" (")[0].strip() or label
