"""Comparisons within one cell of a sweep: which rows reach their target, and how much faster than exact they are.

A cell is a workload at one n, batch and choice of columns. The exact row that the others are compared with is the
fastest whose own error is at most half the target, whatever its precision; the ratios to the fastest exact row of each
precision stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from approxkmv.sweep.table import Row
from approxkmv.sweep.tuning import MOST_RECOMPUTED

CELL = ("workload", "n", "batch", "columns", "device", "dtype")
PRECISIONS = ("float32", "bfloat16")
# The columns with the error of a row, by what its target is relative to.
ERRORS = {"values": "error_v", "answer": "error_exact"}


def error_of(row: Row, statistic: str) -> float:
    """A row's error, p95, mean or median, relative to what its target is relative to."""
    return float(row[f"{ERRORS.get(row.get('relative_to', ''), 'error_v')}_{statistic}"])


def add_ratios(rows: Sequence[Row]) -> None:
    """Write into each timed row with a target: reached, fastest_exact, times_faster and those of each precision."""
    cells: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        # A row that could not run has no seconds; as read from a table they are NaN.
        if row.get("seconds") is not None and row["seconds"] > 0:
            cells.setdefault(tuple(row[name] for name in CELL), []).append(row)
    for some in cells.values():
        exact = [row for row in some if row["kind"] == "exact"]
        for row in some:
            if row["kind"] != "exact":
                row.update(_compared(row, exact))


def _compared(row: Row, exact: Sequence[Row]) -> Row:
    target, relative_to = row["target"], row.get("relative_to", "values")
    reached = error_of(row, "p95") <= target and row.get("recomputed_share", 0.0) <= MOST_RECOMPUTED
    found: Row = {"reached": "yes" if reached else "no"}
    right = [one for one in exact if error_of({**one, "relative_to": relative_to}, "p95") <= target / 2]
    if right:
        fastest = min(right, key=lambda one: one["seconds"])
        found |= {"fastest_exact": fastest["method"], "times_faster": fastest["seconds"] / row["seconds"]}
        found["times_faster_q1"] = fastest["seconds_q1"] / row["seconds_q3"]
        found["times_faster_q3"] = fastest["seconds_q3"] / row["seconds_q1"]
    for precision in PRECISIONS:
        seconds = [one["seconds"] for one in exact if one.get("precision", one["dtype"]) == precision]
        if seconds:
            found[f"times_faster_{precision}"] = min(seconds) / row["seconds"]
    return found
