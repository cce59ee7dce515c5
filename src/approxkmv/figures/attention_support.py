"""How many keys the rows of each head attend to, and the first token's share of the mass, by layer and head."""

from __future__ import annotations

from pathlib import Path

from approxkmv.figures.heatmap import Scale, draw_heatmap, grid, is_wide, new_panels
from approxkmv.figures.style import as_written, entries, footnote, save, short
from approxkmv.results.tables import ModelTables, masks_of, read_heads, read_overview
from approxkmv.words import counted

SUPPORT = Scale(1.0, 512.0, (1, 3, 10, 30, 100, 300), "keys, mean over rows and texts")
SHARE = Scale(0.0, 1.0, (0, 0.25, 0.5, 0.75, 1), "share, mean over rows and texts", linear=True)


def draw(tables: Path, model: str, stem: Path) -> list[Path]:
    """From attention_MODEL.csv and the overview of one model, write STEM.pdf and STEM.png.

    One row of panels is over every key; if layers have masks or more, another shows the model's own softmax.
    """
    names = ModelTables(tables, model)
    facts = as_written(read_overview(names.overview, "label", "layers", "heads", "texts_used", "corpus"))
    table = read_heads(names.attention, facts, dict.fromkeys(("support", "first_mass"), "at least 0"))
    masks = masks_of(table, "support")
    values = grid(table, "support")
    rows, columns = (len(masks), 2) if len(masks) > 1 or not is_wide(values) else (2, 1)
    half = int((table["first_mass"] > 0.5).sum())
    figure, panels = new_panels(
        values,
        rows,
        columns,
        f"{facts['label']}: a row of the median head attends to {short(table['support'].median())} keys; the first "
        f"token has more than half of the weight in {half} of {len(table)} heads",
        f"Rows of the softmax on {counted(facts['texts_used'], 'text')} of {facts['corpus']}; "
        "support: exp of a row's entropy",
    )
    # Of what is left out a decoder, or layers without softmax, are no part of a row.
    beside = any(text.endswith(" layers") for text in facts["left_out"])
    for i, before in enumerate(masks):
        first, second = panels[2 * i : 2 * i + 2]
        over = f"{entries(before, facts)}{', and what is named below' if before and beside else ''}"
        draw_heatmap(figure, first, grid(table, f"{before}support"), SUPPORT)
        draw_heatmap(figure, second, grid(table, f"{before}first_mass"), SHARE)
        first.set_title(f"effective support\n{over}", fontsize=8, loc="left")
        second.set_title(f"weight on the first token\n{over}", fontsize=8, loc="left")
    footnote(figure, f"the model has {', '.join(facts['left_out'])}" if facts["left_out"] else "")
    return save(figure, stem)
