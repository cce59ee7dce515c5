"""The columns of a sweep's table, and how such tables are written."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from approxkmv.files import written_with_hash

Row = dict[str, Any]

COLUMNS = {
    "workload": "name of the workload, with the head for a model",
    "n": "queries, and keys",
    "batch": "attentions computed in one call",
    "columns": "one value column, or all of them",
    "d": "width of queries and keys",
    "d_v": "width of the values",
    "device": "cpu or cuda",
    "dtype": "type of the inputs",
    "method": "name of the method",
    "kind": "exact, trivial or approximate",
    "target": "largest error |out - exact|_2 / |v|_2 that tuning accepted; empty for exact rows",
    "status": "ok, unreached (the best error is given) or unavailable (the reason is given)",
    "reason": "why a row could not run",
    "parameters": "the chosen parameters, JSON",
    "tuning_error": "largest error over the tuning seeds",
    "head_to_tail": "c of Assumption (A) of the first input's kernel at this n; empty where it was not computed",
    "tuning_inputs": "apart, or shared: rows that tuning used are among those of the evaluation",
    "error_v_mean": "error relative to |v|_2 on other seeds and inputs, against exact-fused in float32, whose own "
    "is 0 here (against float64: in the record): mean",
    "error_v_median": "median",
    "error_v_p95": "95th percentile",
    "held": "whether that mean is within the target, with at most 1 % of the rows recomputed: yes or no",
    "error_exact_mean": "error relative to |exact|_2: mean",
    "error_exact_median": "median",
    "error_exact_p95": "95th percentile",
    "seeds": "number of evaluation seeds",
    "recomputed_share": "mean share of rows whose answer was lost and recomputed exactly; tuning allows at most 1 %",
    "seconds_q1": "first quartile of the timed runs",
    "seconds": "median of the timed runs",
    "seconds_q3": "third quartile of the timed runs",
    "repeats": "number of timed runs",
    "kernel_evaluations": "kernel evaluations of a run over the whole batch: median over the evaluation seeds",
    "inner_products": "those, and the inner products that choose or place points",
    "evaluation_exponent": "slope of log kernel evaluations on log n, over the n at which this target was reached",
    "evaluation_exponent_error": "its standard error",
}


def write_rows(path: Path, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Write rows as CSV, complete or not at all, with the hash beside it; missing values are empty."""
    with written_with_hash(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
