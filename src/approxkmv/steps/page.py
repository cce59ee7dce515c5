"""Tables to the page of a study, with the figures that can be drawn from them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from approxkmv.errors import TableError
from approxkmv.page.render import figures_of, write_page
from approxkmv.page.verdict import measured
from approxkmv.progress import progress
from approxkmv.steps.cleaning import leftovers


def make_page(
    tables: Path, out: Path, title: str, figures: Path | None = None, models: Collection[str] | None = None
) -> int:
    """Write OUT/index.html and, unless `figures` is a folder that has them, OUT/figures; returns the page's bytes.

    In the folder of a study that the workflow ran, what an earlier study left is not shown. Raises TableError for a
    folder without tables, tables that cannot be read, and models or figures that are not there.
    """
    from approxkmv.figures.catalogue import draw

    left = leftovers(tables.parent) if tables.name == "tables" else []
    names = list(dict.fromkeys(facts["model"] for facts in measured(tables, models, left)))
    if absent := [name for name in models or () if name not in names]:
        there = ", ".join(dict.fromkeys(facts["model"] for facts in measured(tables, left=left))) or "none"
        raise TableError(f"{tables} has no tables of the model {absent[0]!r}; there is: {there}")
    wanted = figures_of(tables, names, left)
    if figures is not None and wanted and not figures.is_dir():
        raise TableError(f"there is no folder {figures}: leave out --figures to draw them")
    if figures is None:
        figures = out / "figures"
        with progress(total=len(wanted), unit="figure", title="figures") as bar:
            for name, of, stem in wanted:
                draw(name, tables, of, figures / stem)
                bar.update(1)
    return write_page(tables, figures, out / "index.html", title, models, left)
