"""What all figures share: their style, and byte-reproducible PDF and PNG output."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.files import written_whole
from approxkmv.progress import LOG
from approxkmv.results.tables import MASKED
from approxkmv.statistics.entries import EVERY_KEY, OWN_MASK
from approxkmv.statistics.growth import ENOUGH_TEXTS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe palette.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A200")
# The entries of K that a statistic covers, by the prefix of its column.
ENTRIES = {"": EVERY_KEY, MASKED: OWN_MASK}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches, that needs no display."""
    import matplotlib

    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "approxkmv",
            "pdf.fonttype": 42,
        }
    )
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.pdf and STEM.png without timestamps; log the characters that the font lacks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    if missing := missing_glyphs(figure):
        LOG.info("  %s: boxes stand for %s, which the font does not have", stem.name, " ".join(missing))
    paths = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        path = Path(f"{stem}{suffix}")
        with written_whole(path) as temporary, warnings.catch_warnings():
            # Already logged above, in one line.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            figure.savefig(temporary, dpi=160, metadata=metadata)
        paths.append(path)
    return paths


def as_written(facts: Mapping[str, Any]) -> dict[str, Any]:
    """An overview whose texts a figure draws literally, not as mathematics.

    A label that begins with an underscore gets a space in front, since legends omit such labels.
    """

    def plain(text: str) -> str:
        return (" " if text.startswith("_") else "") + text.replace("$", r"\$")

    words = {name: plain(facts[name]) for name in ("label", "corpus", "mask") if name in facts}
    return {**facts, **words, "left_out": [plain(text) for text in facts.get("left_out", ())]}


def missing_glyphs(figure: Figure) -> list[str]:
    """The characters in a figure's texts that its font lacks and draws as boxes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.text import Text

    font = get_font(findfont(FontProperties()))
    used = {mark for text in figure.findobj(Text) for mark in text.get_text()}
    return sorted(mark for mark in used if mark.isprintable() and not font.get_char_index(ord(mark)))


def entries(before: str, facts: Mapping[str, Any]) -> str:
    """The entries of K that a model's statistic covers, from the prefix of its column and the model's overview."""
    return wrapped(facts["mask"], 60) if before else ENTRIES[before]


def not_in_kernel(facts: Mapping[str, Any]) -> str:
    """A line for under a model's figures: what its attention includes but K does not. Empty if nothing."""
    return f"not in K: {', '.join(facts['left_out'])}" if facts["left_out"] else ""


def draw_points(axes: Axes, x: pd.Series, y: pd.Series, texts: pd.Series, colour: str, size: float) -> None:
    """Draw dots, hollow where there are fewer than ENOUGH_TEXTS texts."""
    for enough, face in ((texts >= ENOUGH_TEXTS, colour), (texts < ENOUGH_TEXTS, "white")):
        style: dict[str, Any] = {"marker": "o", "markersize": size, "linewidth": 0, "markerfacecolor": face}
        axes.plot(x[enough], y[enough], color=colour, **style)


def name_of_lengths(axes: Axes, name: str, texts: pd.Series) -> None:
    """Label an axis of lengths, and explain hollow points if there are any."""
    hollow = f" (hollow: fewer than {ENOUGH_TEXTS} texts)" if (texts < ENOUGH_TEXTS).any() else ""
    axes.set_xlabel(f"{name}{hollow}")


def footnote(figure: Figure, text: str) -> None:
    """Add a small line under a figure, unless the text is empty."""
    if text:
        figure.supxlabel(wrapped(text, int(17 * figure.get_figwidth())), fontsize=7, x=0.02, ha="left")


def legend_below(figure: Figure, text: str, **options: Any) -> None:
    """Put a figure's legend below its axes, with a small heading unless the text is empty."""
    heading = {"title": text, "title_fontsize": 7, "alignment": "left"} if text else {}
    figure.legend(frameon=False, fontsize=8, loc="outside lower left", **options, **heading)


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width))


def short(value: float) -> str:
    """A number for a cell of a heat map: two to three significant digits, at most five characters."""
    if value != value:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size < 0.005:
        return "0" if size == 0 else "<.01"
    if size < 9.95:
        return f"{value:.2f}" if size < 0.995 else f"{value:.1f}"
    if size < 9999.5:
        return f"{value:.0f}"
    exponent = f"{value:.0e}".split("e")[1]
    return f"{f'{value:.0e}'[0]}e{int(exponent)}"
