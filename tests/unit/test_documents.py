"""Documents agree with the reference tables, and every file that they link to exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from approxkmv.config import load_config, study_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_tables_in_documents_are_those_of_the_reference_results():
    done = subprocess.run(
        [sys.executable, "benchmarks/into_documents.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_and_pictures_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert documents
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_a_sentence_can_be_edited_and_a_number_in_it_cannot(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from into_documents import filled

    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert filled(text) == text
    edited = text.replace("Six small models", "A few small models")
    assert edited != text
    assert filled(edited) == edited
    wrong = re.sub(r"(<!-- number: needed -->).*?(<!-- end -->)", r"\g<1>0.99\g<2>", text)
    assert wrong != text
    assert filled(wrong) == text


def test_what_a_study_says_that_it_takes_follows_from_measured_times(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from into_documents import takes

    config = load_config(ROOT / "config.yaml")
    said = {study: study_of(config, study).takes or "not timed" for study in config.studies}
    assert said == {study: takes(study) for study in config.studies}


def test_the_readme_lists_every_study_and_every_document():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    studies = text.partition("## Studies\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([a-z0-9-]+)`", studies, re.M)) == sorted(load_config(ROOT / "config.yaml").studies)
    linked = set(re.findall(r"\]\(docs/([a-z-]+\.md)", text))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == linked


def cells(line: str) -> int:
    """The cells of a line of a Markdown table."""
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize(("name", "most"), [("findings", 1500), ("methods", 2500)])
def test_documents_are_short_and_their_tables_narrow(name, most):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert max(cells(line) for line in rows) <= 8
    # A header with more cells than the line below it is no table.
    lines = text.splitlines()
    ruled = [i for i, line in enumerate(lines) if line.startswith("| --- |")]
    assert [lines[i - 1] for i in ruled if cells(lines[i - 1]) != cells(lines[i])] == []
    prose = re.sub(r"<!-- .*? -->", "", "\n".join(line for line in text.splitlines() if not line.startswith("|")))
    assert len(prose.split()) <= most


@pytest.mark.slow
def test_tables_of_the_race_follow_from_new_tables_of_sweeps(monkeypatch, tmp_path):
    """Tiny sweeps of two studies, one causal; the others are not measured."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import numpy as np
    import race
    import reference

    from approxkmv.provenance import describe
    from approxkmv.sweep import SweepSettings, run_sweep

    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32))
    monkeypatch.setattr(race, "REFERENCE", tmp_path)
    race._sweep.cache_clear()
    asked = {"methods": ["exact-sdpa", "exact-sdpa-bf16", "exact-fused", "mean", "hyperattention", "local-expansion"]}
    asked |= {"relative_to": "answer", "repeats": 1, "warmups": 0, "tuning_seeds": [100], "seeds": [0], "threads": 1}
    few = {"block": 64, "samples": 64}
    asked |= {"parameters": {"hyperattention": [few], "local-expansion": [{"block": 64, "near": 16}]}}
    workload = {"name": "glove-split", "lengths": [64, 96, 128], "path": str(tmp_path / "vectors.npy")}
    workload |= {"columns": ["all"]}
    for study, more in (("rows", {}), ("long", {}), ("columns", {}), ("causal", {"causal": True})):
        table = tmp_path / study / "tables" / "sweep.csv"
        both = {"relative_to": ["values", "answer"]} if study == "long" else {}
        settings = SweepSettings.from_mapping({**asked, **both, "workloads": [workload | more]})
        run_sweep(settings, table, describe(), lambda line: None)
    try:
        won = race.winners()
        assert "with the mask of a language model): errors of the answer; " in won
        # The machine is the same for all.
        assert won.count("one thread, wall time, on ") == 1
        assert "Not measured yet: `snakemake --cores all --config study=few`." in won
        assert reference.machine(tmp_path / "rows" / "tables" / "sweep.json") in won
        assert "few queries" in race.answer()
        # Every study here leaves `balancekv` out.
        assert all(line.endswith("|  |") for line in race.passing().splitlines() if line.startswith("| long"))
        assert race._everywhere() in race.against_paper()
        # Three lengths and three targets of one workload, of three studies that are one, and of the causal one
        assert "| local-expansion | 18 |" in race.counts()
        assert "| hyperattention | 18 |" in race.counts()
        # Where every key is near, a method is exact attention, and wins nothing however fast it is.
        table = race._sweep("rows")
        approximate = table[table["kind"] == "approximate"].assign(reached="yes", times_faster=9.0, error_exact_p95=0.1)
        pairs = approximate["n"] ** 2
        assert len(race._raced(approximate.assign(kernel_evaluations=pairs - 1))) == len(approximate)
        assert race._raced(approximate.assign(kernel_evaluations=pairs)).empty
        of_bfloat16 = [line for line in race.costs().splitlines() if "(columns)" in line]
        assert len(of_bfloat16) == 1
        assert of_bfloat16[0].count("ms [") == 2
        for name in ("race-passing", "race-rising", "race-against-paper", "methods-evaluations", "methods-workloads"):
            assert race.TABLES[name]()
        assert race.claim().count(f"| {race._on('columns')} | SmolLM2, a novel | none | 128 |") == 1
        assert race.claim().count(f"| {race._on('causal')} | SmolLM2, a novel | causal | 128 |") == 1
        assert race.of_the_values().splitlines()[0] == "| workload | n | mean errs | at 0.15 | at 0.1 | at 0.05 |"
        assert "errors of |v|" in race.of_the_values()
        # A second machine is told beside the first, and what only one of them ran is left out.
        assert race._on("columns") in race.answer()
        assert " (on " not in race.answer().splitlines()[0]
        for study in ("columns", "causal"):
            shutil.copytree(tmp_path / study, tmp_path / race.ELSEWHERE / study)
        shutil.copytree(tmp_path / "causal", tmp_path / "causal-articles")
        race._sweep.cache_clear()
        beside = race.elsewhere()
        assert [line.split(" | ")[0] for line in beside.splitlines()[2:4]] == [
            "| glove-split (columns)",
            "| glove-split, causal (causal)",
        ]
        assert beside.splitlines()[2].count(" ms, `exact-") == 2
        assert race.claim().count(f"| {race._on('causal')} | SmolLM2, a novel | causal | 128 |") == 2
        answer = race.answer()
        for study, what in {"causal": "SmolLM2, a novel", "causal-articles": race.OTHERS["causal-articles"]}.items():
            line = f"| {what} | `{study}` | {race._on('causal')} | exact attention on 1 of 1 heads |"
            # The other text was measured on one machine only.
            assert answer.count(line) == (2 if study == "causal" else 1)
        assert race.claim().count(f"| {race.OTHERS['causal-articles']} | causal | 128 |") == 1
        assert "Not measured yet: `snakemake --cores all --config study=causal-gemma`." in race.others()
        for make in (race.winners, race.passing, race.costs, race.counts):
            assert max(map(cells, make().splitlines())) <= 8
    finally:
        race._sweep.cache_clear()


def test_a_library_faster_than_every_exact_row_of_ours_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import into_documents
    import pandas as pd

    (tmp_path / "benchmarks").mkdir()
    for suffix in ("csv", "json"):
        shutil.copy(into_documents.REFERENCE / "benchmarks" / f"exact_peers.{suffix}", tmp_path / "benchmarks")
    table = pd.read_csv(tmp_path / "benchmarks" / "exact_peers.csv")
    fast = table["what"].eq("JAX, float32") & table["n"].eq(8192) & table["causal"].eq("yes")
    ours = table[table["ours"].eq("yes") & ~table["what"].str.contains("bf16") & table["n"].eq(8192)]
    table.loc[fast, "ms"] = ours.loc[ours["causal"].eq("yes"), "ms"].min() / 10
    table.loc[fast, "times_our_fastest"] = 0.5
    table.to_csv(tmp_path / "benchmarks" / "exact_peers.csv", index=False)
    monkeypatch.setattr(into_documents, "REFERENCE", tmp_path)
    said = into_documents.exact_peers().splitlines()[-1]
    assert said.startswith("Faster than the fastest of ours: JAX, float32. ")
    assert "the fastest of the others takes 0.1 to " in said


PASSES = [
    # method, parameters, ratio of perplexities, seconds
    ("exact-sdpa", "{}", 1.0, 20.0),
    ("exact-sdpa-bf16", "{}", 1.0, 10.0),
    ("local-expansion", "{}", 1.2, 5.0),
]


@pytest.mark.parametrize(
    ("heads", "says", "says_not"),
    [
        (
            {"exact-sdpa-bf16": 270},
            ["every one of 270 heads", "no method wins within an error of 0.05"],
            "the speed of",
        ),
        ({"exact-sdpa": 1, "local-expansion": 269}, ["269 of 270 heads", "1.25 times the speed of"], "no method wins"),
    ],
)
def test_a_plan_that_is_all_exact_is_not_said_to_win(monkeypatch, heads, says, says_not):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pandas as pd
    from race import _plan_wins

    plan = ("plan", json.dumps({"target": 0.05, "tokens": 64, "heads": heads}), 1.001, 8.0)
    rows = [(tokens, *row, row[3] - 0.5, row[3] + 1) for tokens in (32, 64) for row in (*PASSES, plan)]
    names = ["tokens", "method", "parameters", "ratio", "seconds", "seconds_q1", "seconds_q3"]
    text = _plan_wins(pd.DataFrame(rows, columns=names))
    # Neither the plan, which is no method, nor one whose perplexity is 20 % higher.
    assert "is that of `exact-sdpa-bf16`, 10 (9.5–11) s" in text
    assert [words for words in says if words not in text] == []
    assert says_not not in text


def raced(workload, n, method, times, reached="yes", kind="approximate"):
    """A row of a sweep, as far as the race reads it."""
    row = {"workload": workload, "n": n, "method": method, "kind": kind, "reached": reached, "times_faster": times}
    row |= {
        "times_faster_q1": times,
        "batch": 1,
        "columns": "all",
        "error_exact_p95": 0.05,
        "mask": "causal",
        "target": 0.1,
        "queries": None,
        "kernel_evaluations": 1.0,
    }
    return row | {"tuning_inputs": "apart"}


@pytest.fixture
def two_sweeps(monkeypatch):
    """The race over two short causal sweeps, the second at one long n and without `uniform`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pandas as pd
    import race

    short = [raced("model-qk-0", n, "approxkmv", n / 8192) for n in (1024, 2048, 4096)]
    short += [raced("model-qk-0", n, "balancekv", n / 131072) for n in (1024, 2048, 4096)]
    short += [raced("model-qk-0", n, "uniform", 0.5, "yes" if n == 4096 else "no", "trivial") for n in (2048, 4096)]
    short += [raced("model-qk-2", n, "uniform", 0.5, "no" if n == 4096 else "yes", "trivial") for n in (2048, 4096)]
    long = [raced("model-qk-0", 32768, name, 2.0) for name in ("approxkmv", "balancekv")]
    long += [raced("model-qk-2", 32768, "approxkmv", 2.0)]
    tables = {"causal": pd.DataFrame(short), "causal-long": pd.DataFrame(long)}
    monkeypatch.setattr(race, "_sweep", tables.get)
    return race, tables


def test_a_winner_is_told_with_the_exact_row_that_it_beats_and_both_precisions(two_sweeps):
    race, tables = two_sweeps
    ratios = {"times_faster_q3": 3.1, "times_faster_float32": 3.0, "times_faster_bfloat16": 1.2}
    rows = tables["causal-long"].tail(1).assign(times_faster=3.0, times_faster_q1=2.9, **ratios)
    told = race._winner(rows.assign(fastest_exact="exact-fused"))
    assert told == "**approxkmv** 3.0 (2.9 to 3.1) against exact-fused, 1.2 against bfloat16"
    told = race._gain(rows.assign(fastest_exact="exact-sdpa-bf16").iloc[0])
    assert (told["over bfloat16"], told["over float32"]) == ("1.2", "3.0")
    assert told["where"] == "head 2, n = 32,768, error 0.1"


def test_no_length_is_told_beyond_those_measured(two_sweeps):
    race, tables = two_sweeps
    mine = tables["causal"][tables["causal"]["method"] == "approxkmv"].assign(times_faster_q1=1.05)
    assert race._passes(mine, 1024) == "> 4,096"
    risen = mine.assign(times_faster=[0.5, 0.9, 1.1])
    assert race._passes(risen, 1024) == "2,900"
    # Within the noise
    assert race._passes(risen.assign(times_faster_q1=0.95), 1024) == "> 4,096"
    assert race._passes(mine.assign(times_faster=2.0), 1024) == "≤ 1,024"
    # What is faster at a shorter n, and misses the error at the longest, passes nothing.
    assert race._passes(mine.assign(times_faster=2.0, reached=["yes", "yes", "no"]), 1024) == "–"


def test_a_cell_counts_once_and_a_gain_within_the_noise_is_none(two_sweeps):
    race, tables = two_sweeps
    long = tables["causal-long"]
    assert race._count(long)[:2] == (2, 2)
    assert race._count(long.assign(times_faster_q1=0.99))[:2] == (2, 0)
    assert race._count(long.assign(tuning_inputs="shared"))[:2] == (0, 0)


def test_a_setting_that_tuning_accepts_is_kept_if_it_reaches_the_error_on_the_other_text(two_sweeps):
    race, tables = two_sweeps
    rows = tables["causal-long"].assign(status="ok", reached=["no", "yes", "yes"])
    trivial = rows.assign(kind="trivial")
    # What tuning did not accept is nothing to keep; what computes every pair or errs by rounding alone keeps it anyway.
    pairs = rows["n"] * (rows["n"] + 1) / 2
    others = [rows.assign(status="unreached"), rows.assign(kernel_evaluations=pairs), rows.assign(error_exact_p95=1e-7)]
    # Of the first head the fastest does not keep it.
    found = race._tuned(race.pd.concat([rows, trivial, *others], ignore_index=True))
    assert [race._kept(rows) for rows in found] == ["2 of 3", "1 of 2"]


def test_a_gain_is_trivial_if_uniform_reaches_the_error_in_another_study(two_sweeps):
    race, tables = two_sweeps
    long = tables["causal-long"]
    heads = dict(list(long.groupby("workload")))
    # Only at the longest n: with few keys a sample may be nearly all of them.
    assert {name: race._trivial(rows) for name, rows in heads.items()} == {"model-qk-0": True, "model-qk-2": False}
    assert race._count(long) == (2, 2, 1)
    # A study that runs `uniform` speaks for itself.
    missed = heads["model-qk-0"].assign(method="uniform", kind="trivial", reached="no")
    assert not race._trivial(missed)


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "report").glob("*.rst")), ids=lambda path: path.stem)
def test_captions_of_the_report_are_what_docutils_reads(path: Path):
    docutils = pytest.importorskip("docutils.core")
    docutils.publish_doctree(path.read_text(), settings_overrides={"halt_level": 2, "report_level": 5})


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.stem)
def test_no_line_begins_with_the_mark_of_a_number(path):
    # In Markdown a comment at the start of a line ends the paragraph, and its line is not read as Markdown.
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.lstrip().startswith("<!-- number")] == []
