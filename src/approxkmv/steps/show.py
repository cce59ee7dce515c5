"""What a run prints at its end: where the figures are, and the few numbers that matter."""

from __future__ import annotations

from pathlib import Path

from approxkmv.errors import TableError
from approxkmv.page.verdict import measured, sentences, sweep_sentence
from approxkmv.steps.cleaning import leftovers


def lines(results: Path) -> list[str]:
    """The message for one study's results, limited to the models the study has now, if the folder says which.

    Raises TableError when there are none.
    """
    if not (results / "tables").is_dir():
        raise TableError(f"{results} has no tables: run the study first")
    out, left = [], leftovers(results)
    for facts in measured(results / "tables", left=left):
        first, *rest = sentences(results / "tables", facts)
        out += [first, *(f"  {line}" for line in rest)]
    if won := sweep_sentence(results / "tables", left):
        out.append(f"sweep: {won}")
    if left:
        names = ", ".join(str(path.relative_to(results)) for path in left[:3])
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        out.append(f"of an earlier study: {names}{more}; `snakemake --cores all clean_leftovers` removes them")
    figures = f"figures: {results / 'figures'}   " if (results / "figures").is_dir() else ""
    page = f"   page: {results / 'index.html'}" if (results / "index.html").is_file() else ""
    out.append(f"{figures}tables: {results / 'tables'}{page}")
    return out
