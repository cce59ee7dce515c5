"""Shared by the figures of a sweep: its table, its workloads, a look per method, and how figures are saved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.errors import TableError
from approxkmv.figures import style
from approxkmv.figures.style import MARKERS
from approxkmv.files import read_table
from approxkmv.sweep.ratios import ERRORS, add_ratios
from approxkmv.sweep.table import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

# No figure needs these in a table, so that tables from before they were recorded can still be drawn.
NOT_DRAWN = (
    *("kernel_evaluations", "inner_products", "evaluation_exponent", "evaluation_exponent_error", "recomputed_share"),
    *("queries", "mask", "precision", "relative_to", "reached", "mean_error_v", "mean_error_exact"),
    *("fastest_exact", "host_seconds"),
    *("times_faster_q1", "times_faster", "times_faster_q3", "times_faster_float32", "times_faster_bfloat16"),
)
# The error at which figures compare, or the nearest to it of those that were asked for.
TARGET = 0.10
# What every row that could run has.
MEASURED = (
    *("seconds_q1", "seconds", "seconds_q3"),
    *(f"{error}_{name}" for error in ERRORS.values() for name in ("median", "p95")),
)
# Contents of the columns that are drawn, in every row: a row that could not run has no parameters.
DRAWN = {
    **dict.fromkeys(("workload", "columns", "method", "kind", "status"), "text"),
    **dict.fromkeys(("n", "batch"), "whole"),
    **dict.fromkeys(("target", *MEASURED), "at least 0 or empty"),
}
# The order in which methods take their looks: they are the same in every figure and table.
METHODS = (
    *("approxkmv", "local-expansion", "approxkmv-paper", "kdeformer", "hyperattention", "clustered", "vkde-lsh"),
    *("window", "hnsw", "vamana", "balancekv", "vattention", "top-k", "mean", "uniform", "own-key", "knn"),
    *("exact-fused", "exact-sdpa", "exact-naive", "exact-sdpa-bf16", "exact-tiles-bf16"),
)
# One for each of METHODS, and one more, since colour alone would not tell points apart. Exact methods, which never miss
# and so are never hollow, have the strokes.
SHAPES = (*MARKERS, "+", "x", "1", "2", "3", r"$\heartsuit$")
# Shows what a choice of keys can reach.
ORACLE = "top-k"


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
# Of float32; a method that leaves anything out errs more.
_ROUNDING = 1e-5


def read_sweep(table: Path, relative_to: str | None = None) -> pd.DataFrame:
    """The table of a sweep: the rows tuned for an error relative to the answer or, without such rows, to the values.

    `relative_to` asks for one of the two. What a cell's rows say together (`add_ratios`) is computed anew. The frame's
    attrs say what errors are relative to, by `relative_to`, and the prefix of their columns, by `error`. Raises
    TableError when the table is missing, truncated or not from a sweep.
    """
    frame = read_table(table, {name: DRAWN.get(name, "anything") for name in COLUMNS if name not in NOT_DRAWN})
    # A row of another status could not run.
    found = frame.loc[frame["status"].isin(("ok", "unreached")), list(MEASURED)]
    timed = found["seconds"].between(0, math.inf, inclusive="neither")
    if found.empty or found.isna().any(axis=None) or not timed.all() or not (frame["n"] > 0).all():
        raise TableError(f"{table}: rows need a length, times above 0 and errors: delete it and run the sweep again")
    rows = [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
    add_ratios(rows)
    frame = type(frame)(rows)
    frame = frame.reindex(columns=[*frame, *(name for name in NOT_DRAWN if name not in frame)])
    shown = relative_to or ("answer" if frame["relative_to"].eq("answer").any() else "values")
    frame = frame[~frame["relative_to"].isin(set(ERRORS) - {shown})].reset_index(drop=True)
    # Of two that are as near, the smaller
    asked = sorted(frame["target"].dropna().unique(), key=lambda target: (round(abs(target - TARGET), 9), target))
    frame.attrs |= {"relative_to": shown, "error": ERRORS[shown], "target": float(asked[0]) if asked else TARGET}
    return frame


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


def contenders(frame: pd.DataFrame) -> pd.DataFrame:
    """The approximate rows that can win.

    Not the oracle's, which computes every score, nor one that evaluates every pair: exact attention by another name.
    With a causal mask every pair is n (n + 1) / 2, which other methods may exceed.
    """
    import pandas as pd

    queries, evaluations = (pd.to_numeric(frame[name]) for name in ("queries", "kernel_evaluations"))
    whole = evaluations >= frame["batch"] * frame["n"] * queries.fillna(frame["n"])
    whole |= frame["mask"].eq("causal") & evaluations.eq(frame["batch"] * frame["n"] * (frame["n"] + 1) / 2)
    whole |= frame["error_exact_p95"] < _ROUNDING
    return frame[frame["kind"].eq("approximate") & frame["method"].ne(ORACLE) & ~whole]


def uncounted(frame: pd.DataFrame) -> str:
    """A clause that names the methods that are faster than exact attention but, as `contenders` says, cannot win."""
    faster = frame[frame["kind"].eq("approximate") & (frame["times_faster"] > 1)]
    names = [name for name in looks(frame) if name in set(faster.drop(contenders(faster).index)["method"])]
    return f"; not counted where every score is computed: {', '.join(names)}" if names else ""


def looks(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The methods of a table and how a line of each is drawn: those in METHODS in its order, then the others."""
    kinds = dict(zip(frame["method"].astype(str), frame["kind"], strict=True))
    order = [*METHODS, *(name for name in kinds if name not in METHODS)]
    lines = {"approximate": "-", "trivial": "--"}
    return {
        name: style.look(i, marker=SHAPES[i % len(SHAPES)], linestyle=lines.get(kinds[name], ":"))
        for i, name in enumerate(order)
        if name in kinds
    }


def new_panels(count: int, sharey: Any, width: float = 2.9, height: float = 2.5) -> tuple[Any, Any]:
    """A figure of `count` panels, at most four in a row; unused places of the last row stay empty."""
    columns = min(count, _PANELS_IN_A_ROW)
    rows = -(-count // columns)
    figure = style.new_figure(max(4.5, width * columns), 1.5 + height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flat[:count]


def save(figure: Any, axes: Any, output_stem: Path, note: str) -> list[Path]:
    """Add the lines' legend, if they have labels, and an explanation below the panels, then write PDF and PNG."""
    handles: dict[str, Any] = {}
    for axis in axes:
        axis.grid(True, which="major", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=7)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    note = style.wrapped(note, int(16 * figure.get_figwidth()))
    if handles:
        columns = 3 if figure.get_figwidth() < 7 else 6
        style.legend_below(figure, note, ncols=columns, handles=handles.values(), labels=handles.keys())
    else:
        style.footnote(figure, note)
    return style.save(figure, output_stem)


def count_of(count: int, total: int, what: str) -> str:
    """In words of how many: "its one workload", "3 of 8 workloads"."""
    if total == 1:
        return f"{'the' if count else 'not the'} one {what}"
    return f"{count} of {total} {what}s"
