"""Insert the reference results into the documents, between markers: python benchmarks/into_documents.py

The text between `<!-- table: NAME -->` (or `<!-- number: NAME -->` inside a sentence) and `<!-- end -->` is replaced by
what NAME's function computes from the files in results/reference/; the text around it is written by hand. With --check
nothing is written; the exit code is the number of outdated documents.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from findings import FAMILIES, NUMBERS
from findings import TABLES as OF_FINDINGS
from gpu_tables import TABLES as OF_A_GPU
from operator_tables import NUMBERS as NUMBERS_OF_THE_OPERATOR
from operator_tables import TABLES as OF_THE_OPERATOR
from race import NUMBERS as NUMBERS_OF_THE_RACE
from race import TABLES as OF_THE_RACE
from reference import REFERENCE, ROOT, machine, markdown, number
from whole_squad import STEPS

from approxkmv.config import load_config, study_of
from approxkmv.files import read_json

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


def graph_search() -> str:
    """The guarantee of the graph, the doubling dimension, and the recall of the practical graphs."""
    path = REFERENCE / "graph_search" / "graph_search.csv"
    table, near = pd.read_csv(path), read_json(path.with_suffix(".json"))["settings"]["near"]
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
                f"of the {near} heaviest keys found": "–" if proven else f"{rows['recall'].min():.2f} or more",
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
    d = read_json(folder / "attention_statistics.json")["settings"]["d"]
    timed = table[table["median_ms"].notna()]
    shown = pd.DataFrame(
        {
            f"one head, d = {d}, one core": timed["what"],
            "n": timed["n"].map("{:,}".format),
            "ms": timed["median_ms"].map("{:.0f}".format),
            "times sdpa": timed["times_sdpa"].map("{:.2f}".format),
        }
    )
    return (
        f"{markdown(shown)}\n\nMedians of the processor's time, the calls in turn. Measured on "
        f"{machine(folder / 'attention_statistics.json')} by `python benchmarks/attention_statistics.py`.\n"
    )


def exact_peers() -> str:
    """Exact attention of other libraries beside the exact rows of a sweep."""
    path = REFERENCE / "benchmarks" / "exact_peers.csv"
    table, settings = pd.read_csv(path), read_json(path.with_suffix(".json"))["settings"]
    lines = []
    for what, rows in table.groupby("what", sort=False):
        line = {f"one head, d = {settings['d']}, one core": what}
        for row in rows.to_dict("records"):
            shape = f"{row['n']:,} keys{', causal' if row['causal'] == 'yes' else ''}"
            line[shape] = f"{number(row['ms'])} ms [{row['error']:.1g}], {row['times_our_fastest']:.2f}"
        lines.append(line)
    versions = ", ".join(f"{name} {version}" for name, version in settings["peers"].items())
    single = table[~table["what"].str.contains("bf16|bfloat16")]
    fastest = single.groupby(["n", "causal", "ours"])["ms"].min().unstack("ours")
    faster = sorted(set(table[table["ours"].eq("no") & table["times_our_fastest"].lt(1)]["what"]))
    least, most = (number(value) for value in (fastest["no"] / fastest["yes"]).agg(["min", "max"]))
    found = (
        f"Faster than the fastest of ours: {', '.join(faster) or 'none of the others'}. Among the float32 rows the "
        f"fastest of the others takes {least} to {most} times as long as the fastest of ours."
    )
    return (
        f"{markdown(pd.DataFrame(lines).fillna('–'))}\n\nMedians of the processor's time, the calls in turn, with the "
        "error in brackets, and then how many times the time of the fastest of the first "
        f"{table[table['ours'].eq('yes')]['what'].nunique()} rows. "
        f"Measured on {machine(path.with_suffix('.json'))}, {versions}, by "
        f"`python benchmarks/exact_peers.py`.\n\n{found}\n"
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


def whole_squad() -> str:
    """The pipeline on contexts of the development set, with a model of BERT-base's shape."""
    path = REFERENCE / "benchmarks" / "whole_squad.csv"
    table = pd.read_csv(path)
    record = read_json(path.with_suffix(".json"))
    contexts = record["settings"]["contexts"]
    shown = pd.DataFrame(
        {
            "step": table["step"],
            "jobs": table["jobs"],
            "processor, s": table["processor"].map("{:.0f}".format),
            "per context, s": (table["processor"] / contexts).map("{:.2f}".format),
        }
    )
    found = record["measured"]
    return (
        f"{markdown(shown)}\n\n{contexts:,} contexts; "
        f"peak memory {found['memory_of_all_processes_gb']:.1f} GB of all processes together and "
        f"{found['memory_of_the_largest_process_gb']:.1f} GB of the largest one; "
        f"activations on disk at most {found['activations_gb']:.1f} GB. "
        f"{machine(path.with_suffix('.json'))}, `{record['command']}`.\n"
    )


def predicted(study: str) -> str:
    """How long a study of the paper's models takes by the times of whole_squad(), in words.

    Two are encoders; GPT's masked statistics are over a second kind of entries, for which as much again is counted.
    """
    path = REFERENCE / "benchmarks" / "whole_squad.csv"
    made_of = read_json(path.with_suffix(".json"))["settings"]["contexts"]
    seconds = pd.read_csv(path).set_index("step")["processor"] / made_of
    config = load_config(ROOT / "config.yaml")
    asked = study_of(config, study)
    # SQuAD 1.1 has 18,896 contexts for training and 2,067 for development.
    contexts = {"squad-dev": 2_067, "squad": 20_963}[asked.corpus.name]
    counts = dict.fromkeys(STEPS, contexts) | {"readings": asked.readings_texts or contexts}
    kinds = dict.fromkeys(STEPS, len(asked.models) + 1) | {"extract": len(asked.models)}
    hours = sum(seconds[step] * counts[step] * kinds[step] for step in STEPS) / 3600
    return f"about {hours:.2g} hours of one core"


def takes(study: str) -> str:
    """How long a study takes, in words: predicted, by the steps of its reference run, or not known."""
    if study in PREDICTED:
        return predicted(study)
    path = REFERENCE / "benchmarks" / "study_times.csv"
    seconds = pd.read_csv(path, index_col="study")["seconds"]
    if study not in seconds:
        return "not timed"
    cores = read_json(path.with_suffix(".json"))["machine"]["cores"]
    took = seconds[study]
    span = f"{took / 60:.0f} minutes" if took < 5400 else f"{took / 3600:.1f} hours"
    span = f"{round(took, -1)} seconds" if took < 100 else span
    return f"about {span} on {cores} cores"


def families() -> str:
    """c of every model of the study families; for a causal model also over the entries that its attention uses."""
    folder = REFERENCE / "families"
    lines = []
    for model in FAMILIES:
        facts = read_json(folder / "tables" / f"overview_{model}.json")
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

    kills = pd.read_csv(folder / "kills.csv")
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
    calls["failures"] += np.where(calls["failures"] == "", "", "; ")
    groups = {"method": "attention", "causal": "causal attention", "statistics": "statistics"}
    groups |= {"texts": "readers", "tables": "readers"}
    first = calls["kind"].str.split().str[0]
    calls["kind"] = [groups.get(word, "kernels and ApproxKMV") for word in first]
    counts = calls.groupby("kind", sort=False)[["calls", "good", "failures"]].sum().reset_index()
    add("random calls", counts, "calls", "good", "python benchmarks/reliability.py fuzz")
    return (
        f"{markdown(pd.DataFrame(lines))}\n\nIn total {len(kills):,} kills, {inputs['tried'].sum():,} bad inputs and "
        f"{calls['calls'].sum():,} random calls, of which {calls['answered'].sum():,} were answered and "
        f"{calls['refused'].sum():,} refused. "
        f"Random calls: {machine(folder / 'fuzz.json')}. "
        f"Bad inputs: {machine(folder / 'bad_inputs.json').split(', Python')[0]}. "
        f"Kills: {machine(folder / 'kills.json').split(', Python')[0]}.\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    "statistics-speed": statistics_speed,
    "attention-statistics": attention_statistics,
    "exact-peers": exact_peers,
    "families": families,
    "methods-graph-search": graph_search,
    "methods-knn-training": knn_training,
    "methods-spectral-error": spectral_error,
    "whole-squad": whole_squad,
    "reliability": reliability,
    **OF_FINDINGS,
    **OF_THE_RACE,
    **OF_A_GPU,
    **OF_THE_OPERATOR,
}
PREDICTED = ("paper", "paper-dev")
STUDIES = load_config(ROOT / "config.yaml").studies
TIMES = {f"time-{study}": partial(takes, study) for study in STUDIES}


def filled(text: str) -> str:
    """The document with every marked table and number regenerated."""
    text = MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)
    numbers = NUMBERS | NUMBERS_OF_THE_OPERATOR | NUMBERS_OF_THE_RACE | TIMES
    return NUMBERED.sub(lambda found: found[1] + numbers[found[2]]() + found[3], text)


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
