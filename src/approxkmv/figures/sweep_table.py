"""Shared by the figures of a sweep: its table, its workloads, a colour per method, and how figures are saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.errors import TableError
from approxkmv.figures import style
from approxkmv.files import read_table
from approxkmv.sweep.table import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("exact-fused", "exact-sdpa", "exact-naive")
NAMES_OF_BASELINES = {
    "exact-fused": "exact, fused",
    "exact-sdpa": "exact, torch",
    "exact-naive": "exact, matrix stored",
}
# No figure needs these, so tables from before they were recorded can still be drawn.
NOT_DRAWN = (
    "kernel_evaluations",
    "inner_products",
    "evaluation_exponent",
    "evaluation_exponent_error",
    "recomputed_share",
)
# Contents of the columns that are drawn, in every row: a row that could not run has no parameters.
DRAWN = {
    **dict.fromkeys(("workload", "columns", "method", "kind", "status"), "text"),
    **dict.fromkeys(("n", "batch"), "whole"),
    **dict.fromkeys(("target", "seconds_q1", "seconds", "seconds_q3", "error_v_median", "error_v_p95"), "number"),
}
# Okabe and Ito's colours, which colour-blind readers can tell apart, and darker ones between them. A method not listed
# here gets a colour in `colours`.
COLOURS = {
    "local-expansion": "#D55E00",
    "approxkmv": "#0072B2",
    "approxkmv-paper": "#009E73",
    "kdeformer": "#B8A200",
    "hyperattention": "#882255",
    "clustered": "#44AA99",
    "vkde-lsh": "#AA7744",
    "balancekv": "#AA3377",
    "top-k": "#F0A0A0",
    "vattention": "#117733",
    "knn": "#332288",
    "hnsw": "#66A61E",
    "vamana": "#666633",
    "mean": "#999999",
    "uniform": "#CC79A7",
    "own-key": "#E69F00",
    "exact-naive": "#000000",
    "exact-sdpa": "#444444",
    "exact-fused": "#56B4E9",
}


@dataclass(frozen=True)
class Conditions:
    """A workload with its batch and columns, drawn as one panel."""

    workload: str
    batch: int
    columns: str

    @property
    def title(self) -> str:
        """The title of a panel, in one line."""
        columns = "one column" if self.columns == "one" else "all columns"
        return f"{self.workload}, batch {self.batch}, {columns}"

    def rows(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of a table under these conditions."""
        return frame[
            (frame["workload"] == self.workload) & (frame["batch"] == self.batch) & (frame["columns"] == self.columns)
        ]


_PANELS_IN_A_ROW = 4


def read_sweep(table: Path) -> pd.DataFrame:
    """The table of a sweep. Raises TableError when it is missing, truncated or not from a sweep."""
    frame = read_table(table, {name: DRAWN.get(name, "anything") for name in COLUMNS if name not in NOT_DRAWN})
    timed = frame["seconds"].notna()
    if not timed.any() or not (frame.loc[timed, "seconds"] > 0).all() or not (frame["n"] > 0).all():
        raise TableError(f"{table}: rows need a length and times above 0: delete it and run the sweep again")
    return frame


def conditions(frame: pd.DataFrame) -> list[Conditions]:
    """The panels of a table, in table order."""
    kept = frame[["workload", "batch", "columns"]].drop_duplicates()
    return [Conditions(str(w), int(b), str(c)) for w, b, c in kept.itertuples(index=False)]


def select(frame: pd.DataFrame, method: str, target: float) -> pd.DataFrame:
    """The timed rows of a method, by n: those tuned to the target, or all rows of an exact method."""
    some = frame[(frame["method"] == method) & frame["seconds"].notna()]
    if not some.empty and some["kind"].iloc[0] != "exact":
        some = some[(some["target"] - target).abs() < 1e-9]
    return some.sort_values("n")


def colours(frame: pd.DataFrame) -> dict[str, str]:
    """The methods of a table and their colours: those in COLOURS in its order, then the others in table order."""
    from matplotlib.colors import TABLEAU_COLORS, to_hex, to_rgb

    def distance(one: str, other: str) -> float:
        return sum((a - b) ** 2 for a, b in zip(to_rgb(one), to_rgb(other), strict=True))

    names = [str(name) for name in frame["method"].unique()]
    found = {name: colour for name, colour in COLOURS.items() if name in names}
    others = [to_hex(colour) for colour in TABLEAU_COLORS.values()]
    for name in names:
        if name not in found:
            taken = {*COLOURS.values(), *found.values()}
            # Of matplotlib's ten colours, the one least like any that is taken
            found[name] = max(others, key=lambda new: min(distance(new, old) for old in taken))
    return found


def new_figure(rows: int, columns: int, sharey: Any) -> tuple[Any, Any]:
    """A figure of rows x columns panels; use axes[row][column]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.5, 2.9 * columns), 0.9 + 2.5 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def new_panels(count: int, sharey: Any, height: float = 2.5) -> tuple[Any, Any]:
    """A figure of `count` panels, at most four in a row; unused places of the last row stay empty."""
    from matplotlib.figure import Figure

    columns = min(count, _PANELS_IN_A_ROW)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(4.5, 2.9 * columns), 0.9 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flat[:count]


def save(figure: Any, axes: Any, output_stem: Path, note: str) -> list[Path]:
    """Add one legend and one line of explanation below the panels, then write PDF and PNG."""
    handles: dict[str, Any] = {}
    for axis in getattr(axes, "flat", axes):
        axis.grid(True, which="major", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=7)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = 3 if figure.get_figwidth() < 7 else 6
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=7, title=note)
    figure.legends[0].get_title().set_fontsize(6.5)
    return style.save(figure, output_stem)
