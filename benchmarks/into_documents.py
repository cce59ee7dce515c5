"""Insert the reference results into the documents, between markers: python benchmarks/into_documents.py

The text between `<!-- table: NAME -->` (or `<!-- number: NAME -->` inside a sentence) and `<!-- end -->` is replaced by
what NAME's function computes from the files in results/reference/; the text around it is written by hand. With --check
nothing is written; the exit code is the number of outdated documents.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
from findings import FAMILIES, NUMBERS
from findings import TABLES as OF_FINDINGS
from reference import REFERENCE, ROOT, machine, markdown

from approxkmv.slopes import log_log_line
from approxkmv.statistics.growth import PAPER_BOUND

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBERED = re.compile(r"(<!-- number: ([a-z0-9-]+) -->).*?(<!-- end -->)", re.DOTALL)


def statistics_speed() -> str:
    """The benchmark of the statistics."""
    folder = REFERENCE / "benchmarks"
    table = pd.read_csv(folder / "statistics.csv")
    single = table[table["against"].notna()]
    single = single[single["against"] == "topk float64"]
    shown = pd.DataFrame(
        {
            "one thread": single["what"] + ", n = " + single["n"].astype(str) + ", d = " + single["d"].astype(str),
            "ours, per head": single["ours_ms"].map("{:.2f} ms".format),
            "of which the float64 product": single["product_ms"].map("{:.2f} ms".format),
            "torch.topk of every prefix": single["other_ms"].map("{:.0f} ms".format),
            "times faster (median, lowest to highest)": [
                f"{m:.0f} ({low:.0f} to {high:.0f})"
                for m, low, high in zip(single["times_faster"], single["lowest"], single["highest"], strict=True)
            ],
        }
    )
    whole = table[table["against"].isna()].iloc[0]
    return (
        f"{markdown(shown)}\n\n{whole['what']}: {whole['ours_ms'] / 1e3:.0f} s. "
        f"Measured on {machine(folder / 'statistics.json')} by `make benchmarks`.\n"
    )


BASELINE = "exact-fused"
TARGETS = (0.15, 0.1, 0.05)


def _sweep(study: str) -> pd.DataFrame:
    """A reference sweep with the column `times`: how many times faster than exact-fused on the same inputs."""
    table = pd.read_csv(REFERENCE / study / "tables" / "sweep.csv")
    where = ["workload", "n", "batch", "columns"]
    base = table[table["method"] == BASELINE].set_index(where)["seconds"]
    table = table.join(base.rename("baseline"), on=where)
    table["times"] = table["baseline"] / table["seconds"]
    return table


def _workload(name: str) -> str:
    return name.replace("model-qk-", "model head ")


def _times(here: pd.DataFrame) -> str:
    """Speed relative to exact-fused at each target, from the rows of one method on one workload at one n."""
    if (here["kind"] == "exact").all():
        return " / ".join(f"{times:.1f}" for times in here["times"])
    reached = here[here["status"] == "ok"].groupby("target")["times"].max()
    cells = [f"{reached[target]:.1f}" if target in reached else "–" for target in TARGETS]
    return " / ".join(cells) if set(cells) != {"–"} else "–"


def _about(study: str, table: pd.DataFrame) -> str:
    value_columns = "one value column" if set(table["columns"]) == {"one"} else "as many value columns as d"
    record = REFERENCE / study / "tables" / "sweep.json"
    seconds = json.loads(record.read_text(encoding="utf-8"))["seconds"]
    return (
        f"Times the speed of `{BASELINE}`, at error 0.15 / 0.10 / 0.05; – where no setting reaches it. "
        f"One thread, {value_columns}; {machine(record)}; {seconds / 60:.0f} minutes.\n"
    )


def at_longest() -> str:
    """Every method at the longest n of each workload, a row per method; one table for word vectors, one for heads."""
    table = _sweep("rows")
    table = table[(table["n"] == table.groupby("workload")["n"].transform("max")) & (table["method"] != BASELINE)]
    heads = table["workload"].str.startswith("model-qk")
    parts = []
    for part in (table[~heads], table[heads]):
        lines = [
            {"method": method}
            | {
                f"{_workload(workload)}, n = {n:,}": _times(here)
                for (workload, n), here in rows.groupby(["workload", "n"], sort=False)
            }
            for method, rows in part.groupby("method", sort=False)
        ]
        parts.append(markdown(pd.DataFrame(lines)))
    return "\n\n".join([*parts, _about("rows", table)])


def at_each_length(study: str) -> str:
    """A row per workload and length, a column per method, the fastest trivial method standing for all of them."""
    table = _sweep(study)
    table = table[table["method"] != BASELINE]
    table["column"] = table["method"].where(table["kind"] != "trivial", "trivial")
    lines = [
        {"workload": f"{_workload(workload)}, n = {n:,}"}
        | {column: _times(here) for column, here in rows.groupby("column", sort=False)}
        for (workload, n), rows in table.groupby(["workload", "n"], sort=False)
    ]
    return f"{markdown(pd.DataFrame(lines))}\n\n{_about(study, table)}"


def wins() -> str:
    """In how many cases (workload, length, error) each method beats exact-fused, or is the fastest."""
    table = pd.concat([_sweep("rows"), _sweep("long")])
    table = table[(table["kind"] != "exact") & table["target"].notna()]
    where = ["workload", "n", "batch", "columns", "target"]
    reached = table[table["status"] == "ok"].copy()
    approximate = reached[reached["kind"] == "approximate"].copy()
    approximate["first"] = approximate.groupby(where)["times"].transform("max") == approximate["times"]
    lines = []
    for method, rows in table.groupby("method", sort=False):
        mine = reached[reached["method"] == method]
        first = approximate[approximate["method"] == method]["first"].sum() if len(mine) else 0
        trivial = rows["kind"].iloc[0] == "trivial"
        lines.append(
            {
                "method": method,
                "asked": len(rows),
                "error reached in tuning": len(mine),
                "kept on other inputs": int((mine["held"] == "yes").sum()),
                "faster than exact": int((mine["times"] > 1).sum()),
                "fastest that is not trivial": "trivial" if trivial else int(first),
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


# Targets for the fastest method on one core: workload, length, error, speed relative to exact-fused.
AIMS = [
    *(("local-expansion", f"model-qk-{head}", 8192, 0.1, 8) for head in range(5)),
    *(("local-expansion", f"model-qk-{head}", 8192, 0.05, 5) for head in range(5)),
    ("local-expansion", "glove-split", 16384, 0.05, 14),
    ("local-expansion", "glove-split", 32768, 0.05, 24),
]


def aims() -> str:
    """Targets and measurements."""
    table = _sweep("long").set_index(["method", "workload", "n", "target"])
    lines = []
    for method, workload, n, target, wanted in AIMS:
        row = table.loc[(method, workload, n, target)]
        times = row["times"] if row["status"] == "ok" else 0.0
        lines.append(
            {
                "method": method,
                "workload": f"{_workload(workload)}, n = {n:,}",
                "error": target,
                "aim": f"{wanted} times",
                "measured": f"{times:.1f} times",
                "error on other inputs, mean": f"{row['error_v_mean']:.3f}",
                "reached": "yes" if times >= wanted else "no",
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


def graph_search() -> str:
    """The guarantee of the graph, the doubling dimension, and the recall of the practical graphs."""
    table = pd.read_csv(REFERENCE / "graph_search" / "graph_search.csv")
    lines = []
    for (graph, alpha), rows in table.groupby(["graph", "alpha"], dropna=False, sort=False):
        proven = rows["guarantee"].notna().any()
        lines.append(
            {
                "graph": f"{graph}, alpha = {alpha:g}" if np.isfinite(alpha) else graph,
                "guaranteed ratio": f"{rows['guarantee'].iloc[0]:.0f}" if proven else "–",
                "largest ratio found": f"{rows['largest_ratio'].max():.2f}" if proven else "–",
                "mean degree": f"{rows['mean_degree'].mean():.0f}" if rows["mean_degree"].notna().any() else "–",
                "kernel evaluations per query": (
                    f"{rows['mean_evaluations'].mean():.0f}" if rows["mean_evaluations"].notna().any() else "–"
                ),
                "of the 32 heaviest keys found": "–" if proven else f"{rows['recall'].min():.2f} or more",
            }
        )
    once = table.drop_duplicates("kernel")
    low, high = once["doubling_dimension_at_least"], once["greedy_cover_log2"]
    return (
        f"{markdown(pd.DataFrame(lines))}\n\n{len(once)} kernels of {once['n'].iloc[0]:,} keys. The doubling dimension "
        f"of their keys is at least {low.min():.1f} to {low.max():.1f} and, by a greedy cover, at most "
        f"{high.min():.1f} to {high.max():.1f}. `python benchmarks/graph_search.py`.\n"
    )


def knn_training() -> str:
    """Final losses of training with sampled gradients and with exact ones."""
    table = pd.read_csv(REFERENCE / "knn_training" / "knn_training.csv")
    lines = []
    for problem, rows in table.groupby("problem", sort=False):
        for gradients, mine in rows.groupby("gradients", sort=False):
            ends = mine[mine["step"] == mine["step"].max()]["loss"]
            begins = mine[mine["step"] == 0]["loss"]
            lines.append(
                {
                    "problem": problem,
                    "gradients": gradients,
                    "runs": mine["seed"].nunique(),
                    "loss at the start": f"{begins.mean():.3f}",
                    f"after {mine['step'].max()} steps": f"{ends.min():.3f} to {ends.max():.3f}"
                    if len(ends) > 1
                    else f"{ends.iloc[0]:.3f}",
                }
            )
    return markdown(pd.DataFrame(lines)) + "\n"


def attention_statistics() -> str:
    """The benchmark of attention_statistics."""
    folder = REFERENCE / "benchmarks"
    table = pd.read_csv(folder / "attention_statistics.csv")
    timed = table[table["median_ms"].notna()]
    shown = pd.DataFrame(
        {
            "one head, d = 64, one core": timed["what"],
            "n": timed["n"].map("{:,}".format),
            "ms": timed["median_ms"].map("{:.0f}".format),
            "times sdpa": timed["times_sdpa"].map("{:.2f}".format),
        }
    )
    return (
        f"{markdown(shown)}\n\nMedians of the processor's time, the calls in turn. Measured on "
        f"{machine(folder / 'attention_statistics.json')} by `python benchmarks/attention_statistics.py`.\n"
    )


def spectral_error() -> str:
    """Spectral errors of KDEformer and their bound."""
    table = pd.read_csv(REFERENCE / "benchmarks" / "spectral_error.csv")
    shown = pd.DataFrame(
        {
            "scale": table["scale"],
            "densities": table["densities"],
            "columns drawn": table["samples"],
            "spectral error, mean": table["spectral_error"].map("{:.2f}".format),
            "bound on its expectation": table["bound"].map("{:.2f}".format),
            "kernel evaluations per pair": table["kernel_evaluations_per_pair"].map("{:.0f}".format),
            "sums below the floor, computed exactly": table["sums_made_exactly"].map("{:.0%}".format),
        }
    )
    return markdown(shown) + "\n"


def workload_ratios() -> str:
    """c of the workloads' kernels against n."""
    table = pd.concat([_sweep("rows"), _sweep("long")])
    table = table[table["head_to_tail"].notna()].drop_duplicates(["workload", "n"], keep="last").sort_values("n")
    lines = []
    for workload in table["workload"].drop_duplicates():
        rows = table[table["workload"] == workload]
        growth, *_ = log_log_line(rows["n"], rows["head_to_tail"])
        lines.append(
            {
                "workload": _workload(workload),
                "c at the shortest and longest n": " → ".join(
                    f"{rows['head_to_tail'].iloc[i]:.3g} (n = {rows['n'].iloc[i]:,})" for i in (0, -1)
                ),
                "c ~ n^g, g": f"{growth:.2f}",
                f"c stays below {PAPER_BOUND:g}": "yes" if rows["head_to_tail"].max() < PAPER_BOUND else "no",
            }
        )
    return markdown(pd.DataFrame(lines).sort_values("workload")) + "\n"


def against_paper() -> str:
    """Speed of approxkmv relative to approxkmv-paper, where the latter reaches an error."""
    table = pd.concat([_sweep("rows"), _sweep("long")])
    table = table[(table["status"] == "ok") & table["target"].notna()]
    where = ["workload", "n", "target"]
    # Two sweeps may share a length; one is enough.
    ours, paper = (
        table[table["method"] == name].drop_duplicates(where, keep="last").set_index(where)["seconds"]
        for name in ("approxkmv", "approxkmv-paper")
    )
    times = (paper / ours).dropna().rename("times").reset_index()
    lines = []
    for n, rows in times.groupby("n"):
        lines.append(
            {
                "n": f"{n:,}",
                "workloads and errors that approxkmv-paper reaches": len(rows),
                "approxkmv is faster: lowest": f"{rows['times'].min():.1f} times",
                "median": f"{rows['times'].median():.1f} times",
                "at least twice as fast": int((rows["times"] >= 2).sum()),
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


def figure5() -> str:
    """The paper's Figure 5: batches of 8, times the speed of each exact baseline at error 0.1."""
    table = pd.read_csv(REFERENCE / "figure5" / "tables" / "sweep.csv")
    seconds = {name: rows.set_index("n")["seconds"] for name, rows in table.groupby("method", sort=False)}
    reached = {name: rows.set_index("n")["status"] == "ok" for name, rows in table.groupby("method", sort=False)}
    baselines = ["exact-naive", "exact-fused"]
    lines = []
    for name, mine in seconds.items():
        if name in baselines:
            continue
        line = {"method": name}
        for n in mine.index:
            cells = [f"{seconds[base][n] / mine[n]:.1f}" for base in baselines]
            line[f"n = {n:,}"] = " / ".join(cells) if reached[name][n] else "–"
        lines.append(line)
    record = REFERENCE / "figure5" / "tables" / "sweep.json"
    return (
        f"{markdown(pd.DataFrame(lines))}\n\nTimes the speed of `exact-naive` / of `exact-fused`. All cores, batches "
        f"of 8, one value column, error at most 0.1; {machine(record)}.\n"
    )


def whole_squad() -> str:
    """The pipeline on contexts of the development set, with a model of BERT-base's shape."""
    path = REFERENCE / "benchmarks" / "whole_squad.csv"
    table = pd.read_csv(path)
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    shown = pd.DataFrame(
        {
            "step": table["step"],
            "jobs": table["jobs"],
            "minutes": (table["running"] / 60).map("{:.1f}".format),
        }
    )
    found = record["measured"]
    return (
        f"{markdown(shown)}\n\n{record['settings']['contexts']:,} contexts in {found['seconds'] / 60:.1f} minutes; "
        f"peak memory {found['memory_of_all_processes_gb']:.1f} GB of all processes together and "
        f"{found['memory_of_the_largest_process_gb']:.1f} GB of the largest one; "
        f"activations on disk at most {found['activations_gb']:.1f} GB. "
        f"{machine(path.with_suffix('.json'))}, `python benchmarks/whole_squad.py`.\n"
    )


def rising(heads: bool) -> str:
    """Slope of log(exact-fused's time / the method's time) on log n, at error 0.10: above 0, the ratio rises with n."""
    table = pd.concat([_sweep("rows"), _sweep("long")])
    table = table[(table["kind"] == "approximate") & (table["target"] == 0.1) & (table["status"] == "ok")]
    table = table[table["workload"].str.startswith("model-qk") == heads]
    # Two sweeps may share a length; one is enough.
    table = table.drop_duplicates(["method", "workload", "n"], keep="last")
    lines = []
    for method in table["method"].drop_duplicates():
        line = {"method": method}
        for workload in table["workload"].drop_duplicates():
            here = table[(table["method"] == method) & (table["workload"] == workload)].sort_values("n")
            if len(here) < 3:
                line[_workload(workload)] = "–"
                continue
            slope, *_ = log_log_line(here["n"], here["times"])
            line[_workload(workload)] = f"{slope:+.2f} ({here['n'].iloc[0]:,} to {here['n'].iloc[-1]:,})"
        lines.append(line)
    return markdown(pd.DataFrame(lines)) + "\n"


def evaluations() -> str:
    """Exponents of kernel evaluations in n, per method: the range over workloads and errors."""
    table = pd.read_csv(REFERENCE / "rows" / "tables" / "sweep_exponents.csv")
    lines = []
    for method, rows in table.groupby("method", sort=False):
        e = rows["evaluation_exponent"].dropna()
        if e.empty:
            continue
        lines.append(
            {
                "method": method,
                "fits": len(e),
                "lowest": f"{e.min():.2f}",
                "median": f"{e.median():.2f}",
                "highest": f"{e.max():.2f}",
                "below 2 by two standard errors": int(
                    (rows["evaluation_exponent"] + 2 * rows["evaluation_exponent_error"] < 2).sum()
                ),
                "with all inner products: median": f"{rows['product_exponent'].median():.2f}",
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


def perplexity() -> str:
    """Perplexity with a method in place of a model's attention."""
    path = REFERENCE / "perplexity" / "tables" / "perplexity.csv"
    table = pd.read_csv(path)
    shown = pd.DataFrame(
        {
            "method": table["method"],
            "parameters": table["parameters"],
            "tokens": table["tokens"],
            "perplexity": table["perplexity"].map("{:.2f}".format),
            "exact": table["exact_perplexity"].map("{:.2f}".format),
            "seconds": table["seconds"].map("{:.1f}".format),
            "exact, seconds": table["exact_seconds"].map("{:.1f}".format),
        }
    )
    return f"{markdown(shown)}\n\n{machine(path.with_suffix('.json'))}.\n"


def families() -> str:
    """c of every model of the study families; for a causal model also over the entries that its attention uses."""
    folder = REFERENCE / "families"
    lines = []
    for model in FAMILIES:
        facts = json.loads((folder / "tables" / f"overview_{model}.json").read_text(encoding="utf-8"))
        heads = facts["layers"] * facts["heads"]
        for before, entries in (("", "all"), ("masked_", facts["mask"])):
            if f"{before}largest_ratio" not in facts:
                continue
            layer, head = facts[f"{before}largest_ratio_layer"], facts[f"{before}largest_ratio_head"]
            lines.append(
                {
                    "model": facts["label"],
                    "entries": entries,
                    "heads with c ≤ 4.6": f"{facts[f'{before}heads_within_bound']} of {heads}",
                    "median c over heads": f"{facts[f'{before}median_ratio']:.2f}",
                    "largest c": f"{facts[f'{before}largest_ratio']:.3g} (layer {layer}, head {head})",
                }
            )
    return markdown(pd.DataFrame(lines)) + "\n"


def reliability() -> str:
    """How many kills, bad inputs and random calls were tried, and how many passed."""
    folder = REFERENCE / "reliability"
    lines = []

    def add(what: str, table: pd.DataFrame, tried: str, good: str, command: str) -> None:
        for row in table.to_dict("records"):
            bad = row["failures"] if isinstance(row["failures"], str) else ""
            bad = bad if len(bad) <= 200 else f"{bad[:200]} …"
            cells = {"kind": row["kind"], "tried": f"{row[tried]:,}", "passed": f"{row[good]:,}"}
            lines.append({"": what, **cells, "failures": bad.replace("|", "\\|"), "command": f"`{command}`"})

    kills = pd.read_csv(folder / "kills.csv") if (folder / "kills.csv").exists() else pd.DataFrame()
    if len(kills):
        kills["kind"] = kills["aimed_at"].str.startswith("sweep").map({True: "inside a sweep", False: "inside a study"})
        kills["failures"] = (kills["aimed_at"] + "; ").where(kills["survived"] == "no", "")
        kills["survived"] = (kills["survived"] == "yes").astype(int)
        kills["tried"] = 1
        counts = kills.groupby("kind")[["tried", "survived", "failures"]].sum().reset_index()
        add("kills", counts, "tried", "survived", "python benchmarks/reliability_kills.py")
    inputs = pd.read_csv(folder / "bad_inputs.csv")
    add("bad inputs", inputs, "tried", "one_line", "python benchmarks/reliability.py bad-inputs")
    calls = pd.read_csv(folder / "fuzz.csv", keep_default_na=False)
    calls["good"] = calls["answered"] + calls["refused"]
    groups = {"method": "attention", "causal": "causal attention", "statistics": "statistics"}
    groups |= {"texts": "readers", "tables": "readers"}
    first = calls["kind"].str.split().str[0]
    calls["kind"] = [groups.get(word, "kernels and ApproxKMV") for word in first]
    counts = calls.groupby("kind", sort=False)[["calls", "good", "failures"]].sum().reset_index()
    add("random calls", counts, "calls", "good", "python benchmarks/reliability.py fuzz")
    killed = f"{len(kills):,} kills, " if len(kills) else ""
    return (
        f"{markdown(pd.DataFrame(lines))}\n\nIn total {killed}{inputs['tried'].sum():,} bad inputs and "
        f"{calls['calls'].sum():,} random calls, of which {calls['answered'].sum():,} were answered and "
        f"{calls['refused'].sum():,} refused. "
        f"{machine(folder / 'fuzz.json')}.\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    "statistics-speed": statistics_speed,
    "attention-statistics": attention_statistics,
    "families": families,
    "methods-at-equal-error": at_longest,
    "methods-long": lambda: at_each_length("long"),
    "methods-columns": lambda: at_each_length("columns"),
    "methods-wins": wins,
    "methods-rising": lambda: f"{rising(heads=False)}\n{rising(heads=True)}",
    "methods-aims": aims,
    "methods-graph-search": graph_search,
    "methods-knn-training": knn_training,
    "methods-spectral-error": spectral_error,
    "methods-workloads": workload_ratios,
    "methods-against-paper": against_paper,
    "methods-figure5": figure5,
    "whole-squad": whole_squad,
    "methods-evaluations": evaluations,
    "methods-perplexity": perplexity,
    "reliability": reliability,
    **OF_FINDINGS,
}


def filled(text: str) -> str:
    """The document with every marked table and number regenerated."""
    text = MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)
    return NUMBERED.sub(lambda found: found[1] + NUMBERS[found[2]]() + found[3], text)


def main() -> int:
    """Write the documents, or with --check compare them."""
    stale = [path for path in DOCUMENTS if (text := path.read_text(encoding="utf-8")) != filled(text)]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run python {sys.argv[0]}")
        return len(stale)
    for path in stale:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
