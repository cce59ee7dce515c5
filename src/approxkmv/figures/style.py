"""What all figures share: the look, and writing PDF and PNG with the same bytes each time."""

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

# Okabe and Ito's palette, readable with colour-blind eyes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A200")
# Which entries of K a statistic is over, by what stands before its column.
ENTRIES = {"": EVERY_KEY, MASKED: OWN_MASK}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, drawn without a display."""
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
    """Write STEM.pdf and STEM.png, without dates in them; a line says which characters the font cannot draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    if missing := missing_glyphs(figure):
        LOG.info("  %s: boxes stand for %s, which the font does not have", stem.name, " ".join(missing))
    paths = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        path = Path(f"{stem}{suffix}")
        with written_whole(path) as temporary, warnings.catch_warnings():
            # Said above, in one line.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            figure.savefig(temporary, dpi=160, metadata=metadata)
        paths.append(path)
    return paths


def as_written(facts: Mapping[str, Any]) -> dict[str, Any]:
    """An overview for a figure: what it says in words is drawn as it is written, not as mathematics.

    A label that begins with an underscore, which a legend would leave out, has a space before it.
    """

    def plain(text: str) -> str:
        return (" " if text.startswith("_") else "") + text.replace("$", r"\$")

    words = {name: plain(facts[name]) for name in ("label", "corpus", "mask") if name in facts}
    return {**facts, **words, "left_out": [plain(text) for text in facts.get("left_out", ())]}


def missing_glyphs(figure: Figure) -> list[str]:
    """The characters of a figure's texts that its font cannot draw, and puts a box in place of."""
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.text import Text

    font = get_font(findfont(FontProperties()))
    used = {mark for text in figure.findobj(Text) for mark in text.get_text()}
    return sorted(mark for mark in used if mark.isprintable() and not font.get_char_index(ord(mark)))


def entries(before: str, facts: Mapping[str, Any]) -> str:
    """Which entries of K a model's statistic is over, by what stands before its column and the model's overview."""
    return wrapped(facts["mask"], 60) if before else ENTRIES[before]


def not_in_kernel(facts: Mapping[str, Any]) -> str:
    """What the model's attention includes but K does not, for a line under its figures; empty if there is nothing."""
    return f"not in K: {', '.join(facts['left_out'])}" if facts["left_out"] else ""


def draw_points(axes: Axes, x: pd.Series, y: pd.Series, texts: pd.Series, colour: str, size: float) -> None:
    """Dots, hollow where they are of fewer than ENOUGH_TEXTS texts."""
    for enough, face in ((texts >= ENOUGH_TEXTS, colour), (texts < ENOUGH_TEXTS, "white")):
        style: dict[str, Any] = {"marker": "o", "markersize": size, "linewidth": 0, "markerfacecolor": face}
        axes.plot(x[enough], y[enough], color=colour, **style)


def name_of_lengths(axes: Axes, name: str, texts: pd.Series) -> None:
    """What stands under an axis of lengths, and what hollow points are if there are such."""
    hollow = f" (hollow: fewer than {ENOUGH_TEXTS} texts)" if (texts < ENOUGH_TEXTS).any() else ""
    axes.set_xlabel(f"{name}{hollow}")


def footnote(figure: Figure, text: str) -> None:
    """A small line under a figure; nothing for an empty text."""
    if text:
        figure.supxlabel(wrapped(text, int(17 * figure.get_figwidth())), fontsize=7, x=0.02, ha="left")


def legend_below(figure: Figure, text: str, **options: Any) -> None:
    """The legend of a figure's axes under it, headed by a small line; nothing of it for an empty text."""
    heading = {"title": text, "title_fontsize": 7, "alignment": "left"} if text else {}
    figure.legend(frameon=False, fontsize=8, loc="outside lower left", **options, **heading)


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most so many characters."""
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
