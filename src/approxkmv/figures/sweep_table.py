"""Shared by the figures of a sweep: its table, its workloads, a colour per method, and how figures are saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.errors import TableError
from approxkmv.figures import style
from approxkmv.files import read_table
from approxkmv.sweep.ratios import CELL, ERRORS, add_ratios
from approxkmv.sweep.table import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

# Columns with a row's speed relative to an exact one, and that one in words.
BASELINES = {
    "times_faster": "the fastest exact row",
    "times_faster_float32": "the fastest in float32",
    "times_faster_naive": "exact, matrix stored",
}
# No figure needs these in a table, so that tables from before they were recorded can still be drawn.
NOT_DRAWN = (
    *("kernel_evaluations", "inner_products", "evaluation_exponent", "evaluation_exponent_error", "recomputed_share"),
    *("queries", "mask", "precision", "relative_to", "reached", "mean_error_v", "mean_error_exact", "fastest_exact"),
    *("times_faster_q1", "times_faster", "times_faster_q3", "times_faster_float32", "times_faster_bfloat16"),
)
# Contents of the columns that are drawn, in every row: a row that could not run has no parameters.
DRAWN = {
    **dict.fromkeys(("workload", "columns", "method", "kind", "status"), "text"),
    **dict.fromkeys(("n", "batch"), "whole"),
    **dict.fromkeys(("target", "seconds_q1", "seconds", "seconds_q3"), "number"),
    **dict.fromkeys((f"{error}_{name}" for error in ERRORS.values() for name in ("median", "p95")), "number"),
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
    "exact-sdpa-bf16": "#BBBBBB",
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
    """The table of a sweep: the rows tuned for an error relative to the answer or, without such rows, to the values.

    What a cell's rows say together (`add_ratios`) is computed anew, beside times_faster_naive. The frame's attrs say
    what errors are relative to, by `relative_to`, and the prefix of their columns, by `error`. Raises TableError when
    the table is missing, truncated or not from a sweep.
    """
    frame = read_table(table, {name: DRAWN.get(name, "anything") for name in COLUMNS if name not in NOT_DRAWN})
    timed = frame["seconds"].notna()
    if not timed.any() or not (frame.loc[timed, "seconds"] > 0).all() or not (frame["n"] > 0).all():
        raise TableError(f"{table}: rows need a length and times above 0: delete it and run the sweep again")
    rows = [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
    add_ratios(rows)
    frame = type(frame)(rows)
    frame = frame.reindex(columns=[*frame, *(name for name in NOT_DRAWN if name not in frame)])
    naive = frame[frame["method"] == "exact-naive"].drop_duplicates(list(CELL)).set_index(list(CELL))["seconds"]
    of_naive = frame.join(naive.rename("naive"), on=list(CELL))["naive"] / frame["seconds"]
    frame["times_faster_naive"] = of_naive.where(frame["kind"] != "exact")
    shown = "answer" if frame["relative_to"].eq("answer").any() else "values"
    frame = frame[~frame["relative_to"].isin(set(ERRORS) - {shown})].reset_index(drop=True)
    frame.attrs |= {"relative_to": shown, "error": ERRORS[shown]}
    return frame


def baselines(frame: pd.DataFrame) -> dict[str, str]:
    """The columns of BASELINES that the table has; in float32 alone the first two are one."""
    found = {name: words for name, words in BASELINES.items() if frame[name].notna().any()}
    if frame["times_faster_bfloat16"].isna().all():
        found.pop("times_faster_float32", None)
    return found or {"times_faster": BASELINES["times_faster"]}


def of_what(frame: pd.DataFrame) -> str:
    """What the errors of the table are relative to, as in "0.1 of |v|"."""
    return "of the answer" if frame.attrs["relative_to"] == "answer" else "of |v|"


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
