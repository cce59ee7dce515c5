"""Figure 2: how far the kernel falls behind its n largest entries, median over texts, for every head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from approxkmv.figures.heatmap import Scale, draw_heatmap, grid, is_wide, new_panels
from approxkmv.figures.style import as_written, entries, footnote, near, not_in_kernel, save
from approxkmv.results.tables import ModelTables, masks_of, read_heads, read_overview
from approxkmv.words import counted

# One scale for both ratios and all models, so that a colour means the same everywhere. A ratio is at least 1.
SCALE = Scale(1.0, 1000.0, (1, 3, 10, 30, 100, 300, 1000), "median over texts")
# "About 1", and "about 20 or less for most heads".
NEXT, DOUBLE = 1.05, 20.0
WORDS = {"next": "$K_{(n)}\\,/\\,K_{(n+1)}$", "double": "$K_{(n)}\\,/\\,K_{(2n)}$"}


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From the per-head table and the overview of one model, write STEM.pdf and STEM.png; masked too if available.

    Without a mask the two panels are the two ratios; with one they are K_(n) / K_(2n) over all entries and under the
    mask, and the titles say in how many heads K_(n) / K_(n+1) is about 1.
    """
    names = ModelTables(tables, model)
    facts = as_written(read_overview(names.overview, "label", "layers", "heads", "texts_used", "corpus"))
    table = read_heads(names.heads, facts, dict.fromkeys(("median_next_ratio", "median_double_ratio"), "at least 0"))
    masks = masks_of(table, "median_next_ratio")
    values = grid(table, "median_next_ratio")
    shown = [(before, "double") for before in masks] if len(masks) > 1 else [("", "next"), ("", "double")]
    small = {before: int((table[f"{before}median_double_ratio"] <= DOUBLE).sum()) for before in masks}
    figure, panels = new_panels(
        values,
        *((2, 1) if is_wide(values) else (1, 2)),
        f"{facts['label']}: {WORDS['double']} is at most {DOUBLE:g} in {small['']} of {len(table)} heads",
        f"Ratios of ordered entries of K, medians over {counted(facts['texts_used'], 'text')} of {facts['corpus']}; "
        f"outlined: above the paper's {DOUBLE:g}",
    )
    for axes, (before, which) in zip(panels, shown, strict=True):
        of = grid(table, f"{before}median_{which}_ratio")
        scale = replace(SCALE, bound=DOUBLE) if which == "double" else SCALE
        draw_heatmap(figure, axes, of, scale, write=_WRITE[which])
        close = int((table[f"{before}median_next_ratio"] <= NEXT).sum())
        about = f"{WORDS['next']} is at most {NEXT:g} in {counted(close, 'head')}"
        count = (
            about if which == "next" else f"{WORDS['double']} is at most {DOUBLE:g} in {counted(small[before], 'head')}"
        )
        beside = f"\n{about}" if len(masks) > 1 else ""
        axes.set_title(f"{entries(before, facts)}\n{count}{beside}", fontsize=8, loc="left")
    footnote(figure, not_in_kernel(facts))
    return save(figure, stem)


def near_one(value: float) -> str:
    """A ratio that is mostly slightly above 1: three decimals if they fit."""
    return f"{value:.3f}" if value < 9.9995 else up_to_the_scale(value)


def up_to_the_scale(value: float) -> str:
    """A ratio in a cell, exact near the paper's bound; beyond the scale only that it is."""
    return near(DOUBLE)(value) if not value > SCALE.high else f">{SCALE.high:,.0f}"


_WRITE = {"next": near_one, "double": up_to_the_scale}
