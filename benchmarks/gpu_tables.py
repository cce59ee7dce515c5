"""The reference results of a GPU, from a folder that benchmarks/gpu.py filled, and the tables of docs/gpu.md.

    python benchmarks/gpu_tables.py OUT [--earlier OUT]

--earlier: the rows of an earlier commit, with which the predictions are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from gpu import STAGES, read_rows
from reference import REFERENCE, markdown, number

from approxkmv.files import write_text
from approxkmv.sweep.exponents import EXPONENT_COLUMNS, add_exponents, evaluation_exponents
from approxkmv.sweep.table import COLUMNS, write_rows
from approxkmv.sweep.tuning import MOST_RECOMPUTED

FOLDER = REFERENCE / "gpu"
LONG = 131_072
TARGETS = (0.15, 0.10, 0.05)
# Of a stage in which everything broke
_NOT_YET = "Not measured yet.\n"
# What was predicted from the earlier code, in ms: what, n, its row, and the name there.
_FIGURE = "n=16384 batch=8 d=100 d_v=1 bfloat16"
_PREDICTED = (
    ("`exact-naive`, n = 16,384, batch 8, d = 100, one column, bfloat16", "20", _FIGURE, "exact-naive"),
    ("`exact-sdpa`, the same", "2 to 2.5", _FIGURE, "exact-sdpa"),
    ("`exact-fused`, the same", "1.2 to 1.4", _FIGURE, "exact-fused"),
    ("`exact-sdpa`, n = 131,072, d = 64", "8 to 11", f"n={LONG} batch=1 d=64 d_v=1 bfloat16", "exact-sdpa"),
    ("`exact-fused`, the same, one column", "8.5 to 10", f"n={LONG} batch=1 d=64 d_v=1 bfloat16", "exact-fused"),
    ("`local-expansion`, blocks of 512, 64 near keys, the same", "2.1", '{"block": 512, "near": 64}', ""),
    ("`local-expansion`, blocks of 128, 512 near keys, the same", "5.2", '{"block": 128, "near": 512}', ""),
    ("`approxkmv`, blocks of 96, 512 near keys, the same", "11.8", '{"block": 96, "near": 512, "samples": 64}', ""),
    ("c of one head, the same", "60", f"c and order ratios n={LONG}", ""),
)


def _rows(name: str = "rows") -> list[dict[str, Any]]:
    path = FOLDER / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _milliseconds(rows: list[dict[str, Any]], what: str, name: str) -> str:
    for row in rows:
        times = row.get("times", {})
        # Earlier rows name our own by its setting; what broke has no seconds.
        one = times.get(name, {}) if name else times.get("ours") or times.get(row["what"], row)
        if row["what"].endswith(what) and "seconds" in one:
            return number(1e3 * one["seconds"])
    return "–"


def about() -> str:
    """The machine and the commit."""
    found = json.loads((FOLDER / "machine.json").read_text(encoding="utf-8"))
    machine, ceilings = found["machine"], found["ceilings"]
    finished = {row["stage"]: row["seconds"] for row in _rows() if row["what"] == "finished"}
    missing = [str(stage) for stage in range(len(STAGES)) if stage not in finished]
    those = f"stage{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
    together = f"not finished: {those}; the others together" if missing else "all stages together"
    return (
        f"Measured on one {machine['gpu']}: torch {machine['torch']}, Triton {machine['triton']}, NumPy "
        f"{machine['numpy']}; commit {found['commit']}; {together} {sum(finished.values()) / 60:.1f} minutes. Its "
        f"ceilings: {ceilings['copy_bytes_per_second'] / 1e12:.1f} TB/s in a copy, "
        f"{ceilings['bfloat16_flops'] / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{ceilings['float32_flops'] / 1e12:.0f} in float32, "
        f"{1e6 * ceilings['seconds_per_graph_node']:.2f} us a node of a CUDA graph.\n"
    )


def checks() -> str:
    """What held against float64, and what did not."""
    found = [row for row in _rows() if "holds" in row]
    failed = [row["what"] for row in found if not row["holds"]]
    errors = [row["error"] for row in _rows() if row["stage"] == 1 and "error" in row]
    return (
        f"Of {len(found)} checks {len(found) - len(failed)} hold"
        + (f"; not: {', '.join(f'`{name}`' for name in failed)}" if failed else "")
        + (f". Exact kernels at n = {LONG:,} err by at most {number(max(errors))} |v|.\n" if errors else ".\n")
    )


def predicted() -> str:
    """Predicted and measured, before the fused form and with it."""
    earlier, now = _rows("earlier"), _rows()
    lines = []
    for what, expected, row, name in _PREDICTED:
        one_column = [r for r in now if "d_v=64" not in r["what"] or row.startswith("n=")]
        lines.append((what, expected, _milliseconds(earlier, row, name), _milliseconds(one_column, row, name)))
    then = [row["machine"]["gpu"] for row in earlier if row["what"] == "machine"]
    gpus = [*(then or ["GPU"])[:1], json.loads((FOLDER / "machine.json").read_text(encoding="utf-8"))["machine"]["gpu"]]
    # As H200 of NVIDIA H200, or H100 of NVIDIA H100 80GB HBM3
    before, after = (name.removeprefix("NVIDIA ").split(" ")[0] for name in gpus)
    columns = ["what", "predicted for an H100, ms", f"{before}, that code, ms", f"{after}, fused form, ms"]
    return f"{markdown(pd.DataFrame(lines, columns=columns))}\n"


def figure5() -> str:
    """The paper's Figure 5: the naive product, the fastest exact attention, the mean, and ours."""
    table = pd.read_csv(FOLDER / "tables" / "sweep.csv")
    lines = []
    for (workload, n), rows in table.groupby(["workload", "n"], sort=False):
        exact = rows[rows["kind"] == "exact"]
        fastest = exact.sort_values("seconds").iloc[:1]
        for target in TARGETS:
            some = rows[(rows["target"] == target) & (rows["relative_to"] == "values")]
            ours, mean = (some[some["method"] == name] for name in ("local-expansion", "mean"))
            if workload == "glove-paper" and target != TARGETS[1]:
                continue
            reached = "" if ours.empty or ours["reached"].iloc[0] == "yes" else " (not reached)"
            naive = exact.loc[exact["method"] == "exact-naive", "seconds"].sum(min_count=1)
            star = "*" if (rows["tuning_inputs"] == "shared").any() else ""
            lines.append(
                {
                    "workload": f"`{workload}`, batch {rows['batch'].iloc[0]}",
                    "n": f"{n:,}{star}",
                    "error asked": f"{target:g}",
                    "fastest exact, ms": f"{_of(1e3 * fastest['seconds'], '.3g')} (`{_of(fastest['method'])}`)",
                    "`mean` errs by": _of(mean["error_v_p95"].map(number)),
                    "`local-expansion` errs by": _of(ours["error_v_p95"].map(number)) + reached,
                    "ms": _of(1e3 * ours["seconds"], ".3g"),
                    "times faster than the fastest exact": _of(ours["times_faster"], ".2g"),
                    "than `exact-naive`": _of(naive / ours["seconds"], ".3g"),
                }
            )
    shared = any(line["n"].endswith("*") for line in lines)
    note = "\n\\*: settings are tuned on words that are also measured; there are too few for both.\n" if shared else ""
    return f"{markdown(pd.DataFrame(lines))}\n{note}" if lines else _NOT_YET


def _of(values: pd.Series, form: str = "") -> str:
    """The only one, or a dash where a method has no row or was not timed."""
    return "–" if values.dropna().empty else format(values.iloc[0], form)


def long() -> str:
    """The cheapest setting at the longest length for each error."""
    rows = [row for row in _rows() if row["stage"] == 5 and "times" in row]
    rows = [row for row in rows if all("seconds" in one for one in row["times"].values())]
    if not rows:
        return _NOT_YET
    lines = []
    for start in dict.fromkeys(row["what"].split(" {")[0] for row in rows):
        method, columns = start.split(" d_v=")
        for target in TARGETS:
            mine = [row for row in rows if row["what"].startswith(f"{start} {{")]
            # Rows that were lost are made again exactly: an error that they make small is not the method's.
            own = [row for row in mine if row.get("recomputed_rows", 0) <= MOST_RECOMPUTED * row["n"]]
            some = [row for row in own if row["error"] <= target]
            if not some:
                best = min(own or mine, key=lambda row: row["error"])
                lines.append((f"`{method}`", columns, f"{target:g}", *_of_setting(best, " (not reached)")))
                continue
            fastest = min(some, key=lambda row: row["times"]["ours"]["seconds"])
            lines.append((f"`{method}`", columns, f"{target:g}", *_of_setting(fastest, "")))
    errors = ["errs by, of \\|v\\|", "of the answer"]
    columns = ["method", "columns", "error asked", *errors, "setting", "ms", "times faster"]
    zero = {row["what"].split(" {")[0].split("=")[1]: row["error"] / row["error_of_answer"] for row in rows}
    nothing = ", ".join(f"{number(size)} with {wide} column{'' if wide == '1' else 's'}" for wide, size in zero.items())
    return f"{markdown(pd.DataFrame(lines, columns=columns))}\n\nAn answer of 0 would err by {nothing} (of |v|).\n"


def _of_setting(row: dict[str, Any], note: str) -> tuple[str, ...]:
    ours, exact = (row["times"][name] for name in ("ours", "exact-sdpa"))
    setting = "{" + row["what"].split(" {")[1]
    return (
        number(row["error"]) + note,
        number(row["error_of_answer"]),
        f"`{setting}`",
        number(1e3 * ours["seconds"]),
        f"{exact['seconds'] / ours['seconds']:.2g}",
    )


def statistics() -> str:
    """Seconds of the statistics of one head."""
    rows = [row for row in _rows() if row["stage"] == 7 and "seconds" in row and " n=" in row["what"]]
    if not rows:
        return _NOT_YET
    table = pd.DataFrame([(*row["what"].split(" n="), row["seconds"]) for row in rows], columns=["what", "n", "s"])
    wide = table.pivot(index="what", columns="n", values="s").reindex(columns=sorted(table["n"].unique(), key=int))
    wide = wide.loc[table["what"].unique()].map(lambda s: "–" if pd.isna(s) else f"{s:.3g}")
    wide.columns = [f"n = {int(n):,}, s" for n in wide.columns]
    return f"{markdown(wide.reset_index())}\n"


def code() -> str:
    """What the kernels of the fused form need, as compiled by benchmarks/gpu_code.py."""
    table = pd.read_csv(FOLDER / "tables" / "code.csv", dtype={"triton": str})
    versions = list(table["triton"].unique())
    lines = []
    for kernel, rows in table[table["triton"] == versions[-1]].groupby("kernel", sort=False):
        pairs = rows["instructions_per_pair"].dropna().map("{:.0f}".format)
        lines.append((f"`{kernel}`", ", ".join(rows["registers"].astype(str)), ", ".join(pairs) or "–"))
    spills = sorted(set(table.loc[table["stack"] > 0, "kernel"]))
    said = f"Spills: {', '.join(spills)}" if spills else "No kernel spills"
    sizes = ", ".join(f"{d} and {d_v}" for d, d_v in table[["d", "d_v"]].drop_duplicates().to_numpy())
    columns = ["kernel", "registers of a thread", "instructions for a pair"]
    return (
        f"{markdown(pd.DataFrame(lines, columns=columns))}\n\nAt d and d_v of {sizes}. {said} by Triton "
        f"{' or '.join(versions)}; the numbers are of {versions[-1]}, for sm_90 (`python benchmarks/gpu_code.py`).\n"
    )


def collect(out: Path, earlier: Path | None) -> None:
    """Copy what a GPU measured into the reference results; the cases of its sweeps become one table."""
    # The last may have been cut off with the command.
    rows = read_rows(out / "rows.jsonl")
    swept = [_typed(row) for one in rows for row in one.get("rows", ())]
    collect_sweeps(swept, [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("glove-*.json"))])
    machine = json.loads((out / "machine.json").read_text(encoding="utf-8"))
    write_text(FOLDER / "machine.json", json.dumps({**machine, "nvidia-smi": None}, indent=2))
    _write_rows("rows", rows)
    if earlier is not None:
        _write_rows("earlier", read_rows(earlier / "rows.jsonl"))


def collect_sweeps(swept: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    """One table of the rows of all cases, with one record, none if no case ended."""
    exponents = evaluation_exponents(swept)
    add_exponents(swept, exponents)
    (FOLDER / "tables").mkdir(parents=True, exist_ok=True)
    write_rows(FOLDER / "tables" / "sweep.csv", swept, COLUMNS)
    write_rows(FOLDER / "tables" / "sweep_exponents.csv", exponents, EXPONENT_COLUMNS)
    if not records:
        (FOLDER / "tables" / "sweep.json").unlink(missing_ok=True)
        return
    whole = records[0] | {"seconds": sum(one["seconds"] for one in records)}
    whole["settings"]["workloads"] = [workload for one in records for workload in one["settings"]["workloads"]]
    checked = [check for one in records for check in one["reference"]["error_against_float64"]]
    whole["reference"]["error_against_float64"] = checked
    write_text(FOLDER / "tables" / "sweep.json", json.dumps(whole, indent=2))


def _typed(row: dict[str, str]) -> dict[str, Any]:
    """A row of a CSV file with numbers where there are numbers, and without what is empty."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if not value:
            continue
        try:
            found[key] = value if key == "parameters" else json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    short = [{key: value for key, value in row.items() if key not in ("rows", "nvidia-smi")} for row in rows]
    write_text(FOLDER / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in short))


TABLES: dict[str, Callable[[], str]] = {
    "gpu-about": about,
    "gpu-checks": checks,
    "gpu-predicted": predicted,
    "gpu-figure5": figure5,
    "gpu-long": long,
    "gpu-code": code,
    "gpu-statistics": statistics,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--earlier", type=Path)
    arguments = parser.parse_args()
    for folder, file in (
        (arguments.out, "rows.jsonl"),
        (arguments.out, "machine.json"),
        (arguments.earlier, "rows.jsonl"),
    ):
        if folder is not None and not (folder / file).is_file():
            parser.error(f"{folder} has no {file}: run benchmarks/gpu.py with this folder first (stage 0 writes both)")
    collect(arguments.out, arguments.earlier)
