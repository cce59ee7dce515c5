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
    "n": "keys",
    "queries": "queries, as many as keys unless the workload has few",
    "mask": "none, or causal: query i attends to keys 0 to i",
    "batch": "attentions computed in one call",
    "columns": "one value column, or all of them",
    "d": "width of queries and keys",
    "d_v": "width of the values",
    "device": "cpu or cuda",
    "dtype": "type of the inputs",
    "method": "name of the method",
    "kind": "exact, trivial or approximate",
    "precision": "type in which an exact row computes; empty for the others",
    "relative_to": "what the target is relative to: values, |v|_2, or answer, |exact|_2; empty for exact rows",
    "target": "largest such error that tuning accepted; empty for exact rows",
    "status": "ok, unreached (the best error is given), unavailable or refused, as for too few queries (the reason is "
    "given)",
    "reason": "why a row could not run",
    "parameters": "the chosen parameters, JSON",
    "tuning_error": "largest error over the tuning seeds",
    "head_to_tail": "c of Assumption (A) of the first input's kernel at this n; empty where it was not computed",
    "tuning_inputs": "apart, or shared: rows that tuning used are among those of the evaluation",
    "error_v_mean": "error relative to |v|_2 (of as many rows as queries) on other seeds and inputs, against "
    "exact-fused in float32, whose own "
    "is 0 here (against float64: in the record): mean",
    "error_v_median": "median",
    "error_v_p95": "95th percentile",
    "held": "whether the mean error is within the target, with at most 1 % of the rows recomputed: yes or no",
    "reached": "the same of the 95th percentile: yes or no",
    "error_exact_mean": "error relative to |exact|_2: mean",
    "error_exact_median": "median",
    "error_exact_p95": "95th percentile",
    "mean_error_v": "95th percentile of the error of the method mean on the same inputs, relative to |v|_2",
    "mean_error_exact": "relative to |exact|_2",
    "seeds": "number of evaluation seeds",
    "recomputed_share": "mean share of rows whose answer was lost and recomputed exactly; tuning allows at most 1 %",
    "seconds_q1": "first quartile of the timed runs",
    "seconds": "median of the timed runs",
    "seconds_q3": "third quartile of the timed runs",
    "repeats": "number of timed runs",
    "host_seconds": "on CUDA, where seconds are the device's: median wall time of a call with its waits for Python",
    "fastest_exact": "the fastest exact row here whose 95th percentile of the error is at most half the target",
    "times_faster_q1": "the first quartile of its seconds over the third of this row's",
    "times_faster": "its seconds over those of this row",
    "times_faster_q3": "the third quartile over the first",
    "times_faster_float32": "the same of the fastest exact row in float32, whatever its error",
    "times_faster_bfloat16": "in bfloat16",
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
