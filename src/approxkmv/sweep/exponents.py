"""Growth of evaluations with n at equal error: one fitted exponent per workload, method and target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from approxkmv.slopes import log_log_line
from approxkmv.sweep.table import COLUMNS, Row

# The columns that identify a profile: all of a row but n and what was measured at it.
PROFILE = (
    *("workload", "batch", "columns", "d", "d_v", "device", "dtype"),
    *("method", "kind", "relative_to", "target"),
)
EXPONENT_COLUMNS = {
    **{name: COLUMNS[name] for name in PROFILE},
    "target": "the error that the method was tuned to at each n; empty for exact rows",
    "lengths": "the n at which the target was reached, JSON",
    "kernel_evaluations": "kernel evaluations at these n, JSON",
    "evaluation_exponent": "slope of log kernel evaluations on log n",
    "evaluation_exponent_error": "its standard error; empty with fewer than three n",
    "inner_products": "all inner products at these n, JSON",
    "product_exponent": "slope of log inner products on log n",
    "product_exponent_error": "its standard error; empty with fewer than three n",
    "times_faster": "speed relative to the fastest exact row that is right enough at these n, JSON",
    "speed_exponent": "slope of log times_faster on log n: above 0, the gain rises with n",
    "speed_exponent_error": "its standard error; empty with fewer than three n",
}


def fit_exponent(lengths: Sequence[float], evaluations: Sequence[float]) -> tuple[float | None, float | None]:
    """Slope of log evaluations on log n by least squares, and its standard error.

    >>> fit_exponent([1000, 2000, 4000], [3e6, 12e6, 48e6])
    (2.0, 0.0)

    The slope is None if there are not two different n or nothing was evaluated; the error is None without a third n,
    since two points say nothing about their distance from a line.
    """
    if len(set(lengths)) < 2 or not min(evaluations) > 0:
        return None, None
    slope, _, error = log_log_line(lengths, evaluations)
    # Twelve digits are more than the counts have.
    return round(slope, 12), None if error is None else round(error, 12)


def _counts(row: Row) -> bool:
    """Whether a row reached its target, in tuning and on the inputs of the evaluation."""
    return bool(row["status"] == "ok" and row.get("reached") != "no")


def evaluation_exponents(rows: Sequence[Row]) -> list[Row]:
    """One row per workload, method and target of a sweep, over the n at which the target was reached."""
    profiles: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if _counts(row):
            profiles.setdefault(tuple(row.get(name) for name in PROFILE), []).append(row)
    fitted = {"evaluation": "kernel_evaluations", "product": "inner_products", "speed": "times_faster"}
    found = []
    for key, some in profiles.items():
        lengths = [row["n"] for row in some]
        found.append({**dict(zip(PROFILE, key, strict=True)), "lengths": json.dumps(lengths)})
        for name, column in fitted.items():
            values: list[Any] = [row.get(column) for row in some]
            # A row has no speed where no exact one is right enough.
            known = None not in values
            slope, error = fit_exponent(lengths, values) if known else (None, None)
            found[-1] |= {column: json.dumps(values) if known else None}
            found[-1] |= {f"{name}_exponent": slope, f"{name}_exponent_error": error}
    return found


def add_exponents(rows: Sequence[Row], exponents: Sequence[Row]) -> None:
    """Write each profile's evaluation exponent and its error into the rows of the sweep that it was fitted to."""
    by_profile = {tuple(row[name] for name in PROFILE): row for row in exponents}
    for row in rows:
        fitted = by_profile.get(tuple(row.get(name) for name in PROFILE)) if _counts(row) else None
        if fitted is not None:
            for name in ("evaluation_exponent", "evaluation_exponent_error"):
                row[name] = fitted[name]
