"""What all figures share: their style, and byte-reproducible PDF and PNG output."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from approxkmv.files import written_whole
from approxkmv.progress import LOG
from approxkmv.results.tables import MASKED
from approxkmv.statistics.entries import EVERY_KEY, OWN_MASK
from approxkmv.statistics.growth import ENOUGH_TEXTS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours (the yellow, too light for lines, replaced), in an order in which neighbours also differ to
# those who do not see red from green. Colour is never alone: entry i has the marker and the line style i too. Markers
# that resemble each other are far apart, and all can be hollow.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#D55E00", "#009E73", "#56B4E9", "#882255")
MARKERS = (
    *("o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "d", "p", (4, 1, 0), r"$\spadesuit$", r"$\clubsuit$", "h"),
    (6, 1, 0),
)
LINES = ("-", "--", "-.", ":")
# Points of the letters of a headline.
HEADLINE = 9.5
# The line of the paper's bound, always dotted and named.
BOUND = "#A00000"
# Which heads a line shows, as quantiles over a model's heads.
HEADS = ((0.5, "median head"), (0.9, "90th percentile of heads"), (1.0, "largest head"))
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
            "hatch.color": "#999999",
            "hatch.linewidth": 0.6,
        }
    )
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _silent_about_glyphs() -> Iterator[None]:
    """`save` says in one line which characters the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.pdf and STEM.png, which know their title but not when; log the characters that the font lacks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    if missing := missing_glyphs(figure):
        LOG.info("  %s: %s drawn as boxes, since the font lacks them", stem.name, " ".join(missing))
    paths = []
    title = {"Title": " ".join(figure.get_suptitle().replace(r"\$", "$").split())}
    for suffix, metadata in ((".pdf", title | {"CreationDate": None}), (".png", title | {"Software": None})):
        path = Path(f"{stem}{suffix}")
        with written_whole(path) as temporary, _silent_about_glyphs():
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
    missing = sorted(mark for mark in used if mark != "\n" and not font.get_char_index(ord(mark)))
    return [mark if mark.isprintable() else f"U+{ord(mark):04X}" for mark in missing]


def look(i: int, **more: Any) -> dict[str, Any]:
    """The colour and marker of a figure's entry i, and more options of a line."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} | more


def entries(before: str, facts: Mapping[str, Any]) -> str:
    """The entries of K that a model's statistic covers, from the prefix of its column and the model's overview."""
    return wrapped(facts["mask"], 60) if before else ENTRIES[before]


def not_in_kernel(facts: Mapping[str, Any]) -> str:
    """A line for under a model's figures: what its attention includes but K does not. Empty if nothing."""
    return f"not in K: {', '.join(facts['left_out'])}" if facts["left_out"] else ""


def draw_points(axes: Axes, x: Any, y: Any, solid: Any, **style: Any) -> None:
    """Draw a line through the points where `solid` is true, and the others hollow and not joined.

    x, y and solid are arrays of one length; `style` has the colour, marker and so on; without a line: linestyle="none".
    """
    x, y, solid = (np.asarray(array) for array in (x, y, solid))
    axes.plot(x, np.where(solid, y, np.nan), **style)
    hollow = style | {"label": None, "linestyle": "none", "markerfacecolor": "white"}
    axes.plot(x[~solid], y[~solid], **hollow)


def mark_beyond(axes: Axes, x: Any, y: Any, solid: Any = True, **style: Any) -> bool:
    """Mark points that lie outside the axes of y, whose limits are final, on their edge. Whether there are any.

    `style` has the points' own colour and marker: a triangle of one colour could be any entry's to some readers. Those
    where `solid` is false are hollow, as by `draw_points`.
    """
    x, y = np.asarray(x), np.asarray(y, dtype=np.float64)
    solid = np.broadcast_to(np.asarray(solid, dtype=bool), y.shape)
    low, high = axes.get_ylim()
    for beyond, place in ((y < low, 0.0), (y > high, 1.0)):
        for these, fill in ((beyond & solid, {}), (beyond & ~solid, {"markerfacecolor": "white"})):
            # An empty line outside the axes would still take room in the layout.
            if these.any():
                at = {"transform": axes.get_xaxis_transform(), "clip_on": False, "linestyle": "none", "zorder": 5}
                axes.plot(x[these], np.full(these.sum(), place), **(style | at | fill))
    return bool(((y < low) | (y > high)).any())


def label_ends(figure: Figure, named: Iterable[tuple[Axes, Sequence[tuple[float, float, str, str]]]]) -> None:
    """Write each (x, y, text, colour) to the right of its axes at the height of y, apart where they would overlap.

    The limits of the axes must be final.
    """
    # Where the axes are; to lay out a figure takes longer than all else.
    with _silent_about_glyphs():
        figure.draw_without_rendering()
    for axes, ends in named:
        if ends:
            _label_ends_of(axes, ends)


def _label_ends_of(axes: Axes, ends: Sequence[tuple[float, float, str, str]], size: float = 7.5) -> None:
    figure: Any = axes.get_figure()
    height = axes.bbox.height / figure.dpi * 72
    places = axes.transAxes.inverted().transform(axes.transData.transform([(x, y) for x, y, *_ in ends]))[:, 1]
    order = np.argsort(places)
    gap = min(1.3 * size / height, 1 / max(1, len(ends) - 1))
    steps = gap * np.arange(len(ends))
    # Pushed up and pushed down from the least crowded end; the mean of the two keeps the gaps.
    wanted = np.clip(places[order], 0, 1) - steps
    apart = (np.maximum.accumulate(wanted) + np.minimum.accumulate(wanted[::-1])[::-1]) / 2 + steps
    apart = np.clip(apart, steps, 1 - steps[::-1])
    for i, place in zip(order, apart, strict=True):
        x, y, text, colour = ends[i]
        axes.annotate(
            text,
            (x, y),
            (1.03, place),
            textcoords="axes fraction",
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )


def ticks_at(axis: Axis, places: Iterable[float]) -> None:
    """Ticks at these places alone, whatever the axis shows."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}".replace("-", "−")))


def logarithmic_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis in one format, plain numbers or powers of ten. The limits must be final."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    # Not for seconds and errors: panels side by side would have unlike labels.
    powers = high > 300 * low and (low < 9e-6 or high > 9e4)
    steps: tuple[float, ...] = (1.0,) if high > 300 * low else (1.0, 3.0) if high > 30 * low else (1.0, 2.0, 5.0)
    # Within a factor of four those would give an axis one or two numbers.
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 4 * low else steps
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    extreme = low < 9e-6 or high > 9e6

    def shown(x: float, _: object) -> str:
        power = math.floor(math.log10(x) + 1e-9)
        if powers:
            return f"$10^{{{power}}}$"
        if extreme:
            return f"${10 ** (math.log10(x) - power):.2g}\\times10^{{{power}}}$"
        return f"{x:,.10f}".rstrip("0").rstrip(".")

    axis.set_major_formatter(FuncFormatter(shown))
    axis.set_minor_formatter(NullFormatter())


def headline(figure: Figure, finding: str, *details: str) -> int:
    """Write what a figure shows above it, then lines that explain it; returns the number of lines."""
    width = figure.get_figwidth()
    lines = [line for text in (finding, *details) if text for line in _fitted(text, int(13.5 * width), 70 * width)]
    figure.suptitle("\n".join(lines), fontsize=HEADLINE, x=0.02, ha="left")
    return len(lines)


def _fitted(text: str, width: int, room: float) -> list[str]:
    """The text in lines of at most `width` characters and, of wide letters fewer, `room` points."""
    from matplotlib.cbook import is_math_text
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    lines = textwrap.wrap(text, width, break_on_hyphens=False)
    font = FontProperties(size=HEADLINE)
    with _silent_about_glyphs():
        sizes = [text_to_path.get_text_width_height_descent(line, font, is_math_text(line)) for line in lines]
    widest = max((wide for wide, *_ in sizes), default=0.0)
    return lines if widest <= room else _fitted(text, int(min(width - 1, width * room / widest)), room)


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


def legend_under(axes: Axes, drop: float, title: str, **options: Any) -> None:
    """Put the legend of axes below them, by `drop` of their height, with a title unless it is empty."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -drop), "frameon": False}
    axes.legend(fontsize=7, title=title, title_fontsize=7, **place, **options)


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width))


def abridged(text: str, most: int) -> str:
    """The text, or its beginning and end with dots between them: at most this many characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[most // 2 + 1 - most :]}"


def near(bound: float) -> Callable[[float], str]:
    """`short`, but near a bound with two to four decimals, so that the side on which a value lies can be read."""

    def write(value: float) -> str:
        if not abs(value / bound - 1) < 0.05:
            return short(value)
        shown = [f"{value:.{places}f}" for places in (2, 3, 4)]
        return next((text for text in shown if (float(text) > bound) == (value > bound)), shown[0])

    return write


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
