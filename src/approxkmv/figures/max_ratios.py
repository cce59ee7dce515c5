"""Figures 1 and 3: the largest head-to-tail ratio of every head."""

from __future__ import annotations

from pathlib import Path

from approxkmv.figures.heatmap import Scale, draw_heatmap, grid, is_wide, new_panels
from approxkmv.figures.style import as_written, entries, footnote, near, not_in_kernel, save, wrapped
from approxkmv.results.tables import ModelTables, masks_of, read_heads, read_overview
from approxkmv.words import counted


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From the per-head table and the overview of one model, write STEM.pdf and STEM.png; masked too if available."""
    names = ModelTables(tables, model)
    facts = as_written(read_overview(names.overview, "label", "layers", "heads", "texts_used", "corpus", "paper_bound"))
    table = read_heads(names.heads, facts, {"max_ratio": "at least 0"})
    masks = masks_of(table, "max_ratio")
    values = grid(table, "max_ratio")
    bound = facts["paper_bound"]

    above = {before: int((table[f"{before}max_ratio"] > bound).sum()) for before in masks}
    largest = table.nlargest(1, "max_ratio").iloc[0]
    figure, panels = new_panels(
        values,
        *((len(masks), 1) if is_wide(values) else (1, len(masks))),
        f"{facts['label']}: c exceeds {bound:g} in {above['']} of {len(table)} heads; the largest is "
        f"{near(bound)(largest['max_ratio'])} (layer {largest['layer']:.0f}, head {largest['head']:.0f})",
        f"Head-to-tail ratio c, the largest over prefixes and {counted(facts['texts_used'], 'text')} of "
        f"{facts['corpus']}; outlined: above the paper's bound {bound:g}",
    )
    scale = Scale(0.05, 100.0, (0.1, 0.3, 1, 3, 10, 30, 100), "largest c over texts and prefixes", bound)
    for axes, before in zip(panels, masks, strict=True):
        draw_heatmap(figure, axes, grid(table, f"{before}max_ratio"), scale, write=near(bound))
        title = f"{entries(before, facts)}: {counted(above[before], 'head')} above {bound:g}"
        axes.set_title(wrapped(title, 60), fontsize=8, loc="left")
    footnote(figure, not_in_kernel(facts))
    return save(figure, stem)
