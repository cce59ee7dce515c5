"""benchmarks/ on small tables made by hand: each number follows from them as the documents say that it does."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"machine": {"cores": 2, "processor": "a CPU"}, "versions": dict.fromkeys(("python", "torch", "numpy"), "1")}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def columns_of(name):
    """Those of a reference table, which today's code writes too."""
    return list(pd.read_csv(ROOT / "results" / "reference" / name, nrows=0).columns)


def cells(text):
    """The cells of each line of a Markdown table but its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_a_stale_document_is_told_and_then_written(monkeypatch, tmp_path, capsys):
    import into_documents

    document = tmp_path / "a.md"
    document.write_text("Above <!-- number: needed -->0.99<!-- end --> of all.\n")
    monkeypatch.setattr(into_documents, "DOCUMENTS", [document])
    monkeypatch.setattr(into_documents, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["into_documents.py", "--check"])
    assert into_documents.main() == 1
    assert "a.md is out of date" in capsys.readouterr().out
    assert "0.99" in document.read_text()
    monkeypatch.setattr(sys, "argv", ["into_documents.py"])
    assert into_documents.main() == 0
    assert document.read_text() == "Above <!-- number: needed -->0.61<!-- end --> of all.\n"
    monkeypatch.setattr(sys, "argv", ["into_documents.py", "--check"])
    assert into_documents.main() == 0


def test_every_number_that_a_document_may_name_can_be_computed():
    from findings import NUMBERS

    assert [name for name, compute in NUMBERS.items() if not compute()] == []


def test_what_failed_is_not_counted_as_passed(monkeypatch, tmp_path):
    import into_documents

    folder = tmp_path / "reliability"
    folder.mkdir()
    kills = [("extract", "yes"), ("summary", "no"), ("sweep, case 2", "yes")]
    pd.DataFrame(kills, columns=["aimed_at", "survived"]).to_csv(folder / "kills.csv", index=False)
    inputs = [("texts", 4, 3, "an empty one"), ("tables", 5, 5, "")]
    pd.DataFrame(inputs, columns=["kind", "tried", "one_line", "failures"]).to_csv(
        folder / "bad_inputs.csv", index=False
    )
    calls = [("method mean", 10, 5, 2, 3, "seed 1: NaN"), ("method knn", 10, 9, 0, 1, "seed 2: a|b")]
    calls += [("causal mean", 10, 6, 4, 0, ""), ("log_kernel", 10, 10, 0, 0, "")]
    names = ["kind", "calls", "answered", "refused", "failed", "failures"]
    pd.DataFrame(calls, columns=names).to_csv(folder / "fuzz.csv", index=False)
    for name in ("kills", "fuzz", "bad_inputs"):
        (folder / f"{name}.json").write_text(json.dumps(MACHINE))
    monkeypatch.setattr(into_documents, "REFERENCE", tmp_path)
    text = into_documents.reliability()
    assert [line[:5] for line in cells(text.replace("\\|", "/"))] == [
        ["kills", "inside a study", "2", "1", "summary;"],
        ["kills", "inside a sweep", "1", "1", ""],
        ["bad inputs", "texts", "4", "3", "an empty one"],
        ["bad inputs", "tables", "5", "5", ""],
        ["random calls", "attention", "20", "16", "seed 1: NaN; seed 2: a/b;"],
        ["random calls", "causal attention", "10", "10", ""],
        ["random calls", "kernels and ApproxKMV", "10", "10", ""],
    ]
    assert "3 kills, 9 bad inputs and 40 random calls, of which 30 were answered and 6 refused" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0, "0"), (0.01, "0.01"), (0.0099, "9.9e-03"), (999.4, "999"), (1000, "1,000"), (2e6, "2.0e+06")),
        *((math.inf, "∞"), (-math.inf, "–"), (math.nan, "–")),
    ],
)
def test_numbers_have_two_to_three_digits(value, shown):
    from reference import number

    assert number(value) == shown


@pytest.mark.parametrize(
    ("more", "shown"),
    [({}, ""), ({"settings": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}, " without AMX under ONEDNN_MAX_CPU_ISA=AVX2")],
)
def test_a_machine_that_was_told_to_run_as_another_is_named_so(more, shown, tmp_path):
    from reference import machine

    about = {"cores": 2, "processor": "A CPU"} | ({"instructions": ["avx2"]} if more else {}) | more
    record = {"machine": about, "versions": dict.fromkeys(("python", "torch", "numpy"), "1")}
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert machine(tmp_path / "r.json") == f"2 cores of A CPU{shown}, Python 1, torch 1, NumPy 1"


def gauge_of(heads):
    """Rows of a gauge, of heads with c and ε* at t = 0, 1 and 2; at t = 0 nothing is known of the error."""
    rows = []
    for head, of_t in enumerate(heads):
        for t, (ratio, bound) in zip((0.0, 1.0, 2.0), of_t, strict=True):
            row = dict.fromkeys(("log10_largest_row", "log10_norm", "log10_zero_for_ones", "log10_sufficient"), bound)
            row |= {"layer": 0, "head": head, "t": t, "entries": "all", "tokens": 100, "participation": ratio}
            rows.append(row | {"ratio": ratio, "log10_bound": bound, "mean_error": 0.1 if head == 0 else 0.2})
    return pd.DataFrame(rows)


def test_the_gauge_counts_the_papers_bound_and_takes_each_heads_best(monkeypatch, tmp_path):
    import findings

    nan = math.nan
    heads = [((4.6, nan), (1.0, -3.0), (9.0, -2.0)), ((4.7, nan), (5.0, -1.0), (2.0, -6.0))]
    heads += [((0.2, nan), (60.0, -8.0), (1.0, -7.0))]
    folder = tmp_path / "embedded" / "tables"
    folder.mkdir(parents=True)
    for model in (findings.MINILM, findings.SMOLLM):
        gauge_of(heads).to_csv(folder / f"gauge_{model}.csv", index=False)
    monkeypatch.setattr(findings, "REFERENCE", tmp_path)
    # t, median and largest c, heads within 4.6, rows that carry K, medians of the logarithms
    assert cells(findings.gauge(findings.MINILM)) == [
        ["→ 0 (A)", "4.6", "4.7", "2", "5", "–", "–", "–"],
        ["1", "5", "60", "1", "5", "−3.0", "−3.0", "−3.0"],
        ["2", "2", "9", "2", "2", "−6.0", "−6.0", "−6.0"],
    ]
    at_one, best = cells(findings.tolerances())[:2]
    assert at_one[1:] == ["1", "−3.0", "−3.0", "−1.0", "−3.0", "−3.0", "1 of 3 heads"]
    # −2, −1 and −7
    assert best[1:] == ["best of each head", "−2.0", "−2.0", "−1.0", "−2.0", "−2.0", "1 of 3 heads"]
    assert findings.NUMBERS["spread-error"]() == "1"


def test_growth_is_counted_above_its_limits_and_predictions_on_both_sides(monkeypatch):
    import findings

    size, trend = ["small", "small", "large", "undecided"], ["flat", "grows", "grows", "undecided"]
    rows = {"texts": 8, "length": 8192, "size": size, "trend": trend, "ratio": [1.0, 2.0, 10.0, 1.0]}
    rows |= {"exponent": [0.1, 0.11, 0.5, 0.6], "exponent_high": 1.0, "predicted_ratio": [0.05, 1.0, 10.0, 2.0]}
    rows |= {"predicted_low": [0.1, 0.2, 0.2, -1.0], "predicted_high": [0.1, 0.4, 0.5, 0.1]}
    monkeypatch.setattr(findings, "GROWTH", (("lengths", findings.SMOLLM),))
    monkeypatch.setattr(findings, "table_of", lambda study, name: pd.DataFrame(rows))
    assert cells(findings.verdicts()) == [
        ["SmolLM2, all", "8,192", "8", "2 / 1 / 1", "1 / 1 / 2", "3", "1", "10"],
    ]
    # Factors of 0.05, 0.5, 1 and 2; the first and third exponent lie on the edges of their intervals.
    assert cells(findings.predictions()) == [
        ["SmolLM2, all", "8,192", "0.75", "0.39 to 1.25", "75%", "25%", "50%", "0.25"],
    ]
    assert (findings.foretold(), findings.flat_foretold()) == ("2 of 4", "2")


def test_a_length_that_families_do_not_share_is_told(monkeypatch):
    import findings

    lengths = dict(zip(findings.FAMILIES, (250, 250, 200, 250, 250, 300), strict=True))
    tables = {f"growth_{model}": pd.DataFrame({"length": [n], "trend": ["grows"]}) for model, n in lengths.items()}
    monkeypatch.setattr(findings, "table_of", lambda study, name: tables[name])
    assert findings.families_length() == "200 to 300"
    assert findings.families_growing() == "6 of 6"


def product(n, method, seconds, error=0.0, **more):
    row = {"x": "ones", "n": n, "method": method, "seconds": seconds, "error": error, "epsilon": math.nan}
    row |= {"bound": math.nan, "near": math.nan, "way": None, "preparation": math.nan, "times_faster": math.nan}
    return row | {"times_best_exact": math.nan} | more


def test_products_are_told_beside_the_best_exact_and_the_best_trivial_one(monkeypatch, tmp_path):
    import operator_tables

    plain = operator_tables.PLAIN
    rows = [product(10, plain, 2.0, times_faster=1.0), product(10, "exact, bfloat16", 1.0, times_faster=2.0)]
    rows += [product(10, "KeOps", 20.0, times_faster=0.1)]
    rows += [product(20, plain, 8.0, times_faster=1.0), product(20, "exact, bfloat16", 10.0, times_faster=0.8)]
    for n, seconds in ((10, 0.5), (20, 2.0)):
        best = {10: 1.0, 20: 8.0}[n] / seconds
        ours = {"epsilon": 0.1, "bound": 0.06, "way": "blocks", "near": 64, "preparation": 1.5}
        ours |= {"times_faster": 4.0, "times_best_exact": best}
        rows += [product(n, "KernelOperator", seconds, 0.05, **ours)]
        rows += [product(n, "zero", 0.0, 0.7 if n == 10 else 1.0), product(n, "mean", 0.0, 0.9)]
    for folder in ("operator", "amx/operator"):
        path = tmp_path / folder / "tables" / "operator.csv"
        path.parent.mkdir(parents=True)
        pd.DataFrame(rows).to_csv(path, index=False)
        path.with_suffix(".json").write_text(json.dumps(MACHINE))
    monkeypatch.setattr(operator_tables, "REFERENCE", tmp_path)
    text = operator_tables.gains()
    assert cells(text) == [
        ["ones", "10", "0.7", "0.1", "0.05 (0.06)", "64 near keys", "4", "2", "0.5"],
        ["ones", "20", "0.9", "0.1", "0.05 (0.06)", "64 near keys", "4", "4", "2.29"],
    ]
    # At the longest n plain torch is the best.
    assert f"at the longest n is `{plain}`, 1 times torch. KeOps, at n = 10: 0.1 (x ones)" in text
    assert operator_tables.single() == "0.5 at n = 10 and 2.3 at n = 20"
    assert text.rstrip().endswith("x ones, n = 20: 4 (the first product: 2.3).")


def row_of(workload, n, method, times, quartile=None, target=0.1, **more):
    """A row of a sweep, as far as the race reads it."""
    first = times if quartile is None else quartile
    row = {"workload": workload, "n": n, "method": method, "kind": "approximate", "reached": "yes", "target": target}
    row |= {"times_faster": times, "times_faster_q1": first, "times_faster_q3": times, "fastest_exact": "exact-sdpa"}
    row |= {"times_faster_float32": times, "times_faster_bfloat16": times, "seconds": 1 / times}
    row |= {"batch": 1, "columns": "all", "mask": "none", "queries": None, "kernel_evaluations": 1.0}
    return row | {"error_exact_p95": 0.05, "tuning_inputs": "apart", "mean_error_exact": 0.5} | more


@pytest.fixture
def race(monkeypatch):
    """The race over given tables of studies, from a machine that is not named."""
    import race

    tables = {}

    def sweep(study, relative_to=None):
        if study not in tables:
            return None
        table = pd.DataFrame(tables[study])
        table.attrs |= {"error": "error_exact", "relative_to": "answer"}
        return table

    monkeypatch.setattr(race, "_sweep", sweep)
    monkeypatch.setattr(race, "_everywhere", lambda: "Times: none.")
    monkeypatch.setattr(race, "tables", tables, raising=False)
    return race


def test_the_winner_is_the_fastest_of_those_beyond_the_noise(race):
    rows = [row_of("glove", 64, "knn", 3.0, 0.9), row_of("glove", 64, "window", 2.5, 1.0)]
    rows += [row_of("glove", 64, "approxkmv", 2.0, 1.2), row_of("glove", 64, "balancekv", 1.5, 1.4)]
    # Where no exact row is right enough there is nothing to beat.
    rows += [row_of("glove", 64, "hnsw", math.nan), row_of("glove", 64, "uniform", 5.0, kind="trivial", reached="no")]
    # As in a table from before masks were recorded
    race.tables["rows"] = [row | {"mask": None} for row in rows]
    table = race._sweep("rows")
    assert race._winner(table).startswith("**approxkmv** 2.0 (1.2 to 2.0) against exact-sdpa")
    assert "†" not in race._winner(table)
    line = {cell[0]: cell for cell in cells(race.counts())}
    # Cells, error reached, faster beyond the noise, faster than float32, first of these, largest gain
    assert line["knn"][1:] == ["1", "1", "0", "1", "0", "3.0"]
    assert line["window"][1:] == ["1", "1", "0", "1", "0", "2.5"]
    assert line["approxkmv"][1:] == ["1", "1", "1", "1", "1", "2.0"]
    assert line["balancekv"][1:] == ["1", "1", "1", "1", "0", "1.5"]
    # Nor does a gain that may be none pass exact attention.
    assert race._passes(table[table["method"] == "window"], 64) == "> 64"
    assert line["hnsw"][1:] == ["1", "1", "0", "0", "0", "–"]
    assert line["uniform"][1:] == ["1", "0", "0", "0", "0", "–"]


def test_inputs_shared_with_tuning_are_marked_and_not_counted(race):
    race.tables["rows"] = [row_of("glove", 64, "knn", 3.0, tuning_inputs="shared")]
    race.tables["rows"] += [row_of("glove", 64, "uniform", 3.0, kind="trivial", reached="no", tuning_inputs="shared")]
    table = race._sweep("rows")
    assert race._lines_of_winners(table)[0]["workload"] == "glove*"
    assert race._passes(table[table["method"] == "knn"], 64) == "≤ 64*"
    assert race._count(table) == (0, 0, 0)
    assert cells(race.counts()) == []


@pytest.mark.parametrize(
    ("other", "says"), [({}, True), ({"columns": "one"}, False), ({"mask": "causal"}, False), ({"target": 0.2}, False)]
)
def test_uniform_speaks_for_another_study_only_in_the_same_cell(race, other, says):
    rows = [row_of("glove", 64, "uniform", 0.5, **{"kind": "trivial", **other})]
    rows += [row_of("glove", 64, "uniform", 0.5, kind="trivial", reached="no")] if other else []
    race.tables |= {"rows": rows, "long": [row_of("glove", 128, "knn", 3.0)]}
    assert race._trivial(race._sweep("long")) is says


def test_a_gain_rises_where_its_interval_says_so_whatever_the_method(race):
    gains = {"window": (1.0, 2.0, 4.0), "approxkmv": (4.0, 2.0, 1.0), "balancekv": (1.0, 3.0, 2.0)}
    rows = [row_of("glove", n, name, g) for name, some in gains.items() for n, g in zip((2, 4, 8), some, strict=True)]
    # Two lengths say nothing about their distance from a line.
    rows += [row_of("glove", n, "knn", float(n), reached="yes" if n > 2 else "no") for n in (2, 4, 8)]
    race.tables["long"] = rows
    lines = [line for line in cells(race.rising()) if line[0] == "long"]
    assert [(line[2], line[4], line[6]) for line in lines] == [
        ("window", "+1.00", "yes"),
        ("approxkmv", "-1.00", "no"),
        ("balancekv", "+0.50", "undecided"),
    ]
    assert lines[0][5] == "+1.00 to +1.00"
    # Residuals of a third, -2/3 and a third of log2(3) - 1/2, one degree of freedom: t = 12.706
    half = 12.706 * math.sqrt(6 * ((math.log2(3) - 0.5) / 3) ** 2 / 2)
    assert lines[2][5] == f"{0.5 - half:+.2f} to {0.5 + half:+.2f}"


def test_twice_as_fast_as_the_papers_recipe_counts_from_twice_on(race):
    paper = [row_of(f"head {i}", 64, "approxkmv-paper", 1.0) for i in range(4)]
    ours = [row_of(f"head {i}", 64, "approxkmv", gain) for i, gain in enumerate((1.5, 2.0, 4.0, 8.0))]
    ours[3]["reached"] = "no"
    race.tables |= {"rows": paper + ours, "columns": []}
    race.tables["columns"] = [row_of("head 9", 64, "knn", 1.0)]
    assert cells(race.against_paper()) == [["64", "3", "1.5 times", "2.0 times", "2"]]


def test_a_pass_with_a_perplexity_that_is_too_low_is_not_the_models_own(race):
    rows = [("exact-sdpa", 1.0, 10.0), ("local-expansion", 0.98, 4.0), ("window", 1.009, 8.0)]
    table = pd.DataFrame(rows, columns=["method", "ratio", "seconds"])
    table = table.assign(tokens=64, parameters="{}", seconds_q1=table["seconds"], seconds_q3=table["seconds"])
    assert "is that of `window`, 8 (8–8) s." in race._plan_wins(table)


def test_numbers_of_the_race_in_sentences(race, monkeypatch, tmp_path):
    monkeypatch.setattr(race, "REFERENCE", tmp_path)
    for study in ("amx/perplexity", "complexity"):
        (tmp_path / study / "tables").mkdir(parents=True)
    heads = json.dumps({"heads": {"window": 2, "exact-sdpa": 1, "knn": 3}})
    rows = [("exact-sdpa", "{}", 3.0), ("exact-sdpa-bf16", "{}", 2.5), ("window", "{}", 1.0), ("plan", heads, 2.0)]
    table = pd.DataFrame([(n, *row) for row in rows for n in (32, 64)], columns=["tokens", "method", "parameters", "s"])
    table["seconds"] = table["s"].where(table["tokens"] == 64, 9.0)
    table.to_csv(tmp_path / "amx" / "perplexity" / "tables" / "perplexity.csv")
    said = "1.25 times as fast as with exact attention (heads: `knn` 3, `window` 2, `exact-sdpa` 1)"
    assert race.NUMBERS["plan-amx"]() == said
    costs = {"quantity": ["total", "heavy", "total"], "over_n_squared": [1367.3, 3.9, 813.3]}
    pd.DataFrame(costs).to_csv(tmp_path / "complexity" / "tables" / "complexity_fits.csv")
    pd.DataFrame({"n": [256, 1024]}).to_csv(tmp_path / "complexity" / "tables" / "complexity.csv")
    (tmp_path / "complexity" / "tables" / "complexity.json").write_text('{"settings": {"epsilon": 0.2}}')
    said = "813 to 1,367 times as often as the exact product (n = 1,024, epsilon = 0.2, 2 synthetic kernels)"
    assert race.NUMBERS["printed-cost"]() == said
    # A cell that two studies have is one, and within the noise nothing wins.
    name = "approxkmv-paper"
    race.tables["long"] = [row_of("glove", 64, name, 1.2, 0.9), row_of("glove", 128, name, 3.0, reached="no")]
    race.tables["rows"] = [row_of("glove", 64, name, 1.2, 0.9), row_of("glove", 64, "knn", 2.0)]
    assert race.NUMBERS["paper-wins"]() == "none of 2"
    race.tables["few"] = [row_of("glove", 256, name, 1.2)]
    assert race.NUMBERS["paper-wins"]() == "1 of 3"
    # The paper's own figure is told apart, beside the mean of the values.
    race.tables["figure5"] = [row_of("glove", n, name, 3.0, reached=word) for n, word in ((64, "no"), (128, "yes"))]
    race.tables["figure5"] += [row_of("glove", n, "mean", 9.0, kind="trivial") for n in (64, 128)]
    said = "1 of 2 lengths (the mean of all values, also within the error, is faster still at 1 of them)"
    assert race.NUMBERS["paper-wins-figure5"]() == said
    race.tables["figure5"][3]["reached"] = "no"
    assert race.NUMBERS["paper-wins-figure5"]() == "1 of 2 lengths"
    # The machine with AMX: how noisy it is, over what both machines ran, and what a second run says.
    middle = {"long": (0.98, 1.02), "amx/long": (0.9, 1.1), "amx/causal-gemma": (0.1, 9.0)}
    for study, (low, high) in middle.items():
        row = row_of("model-qk-0", 64, "window", 1.0)
        race.tables[study] = [{**row, "seconds_q1": low, "seconds_q3": high}, row | {"seconds": None}]
    assert race.NUMBERS["noise-amx"]() == "20 % of their median there, 4 % without AMX (medians over rows)"
    for study, gains in {"amx/columns": (2.0, 3.0), "amx-again/columns": (2.0, 0.9)}.items():
        race.tables[study] = [row_of(f"model-qk-{i}", 64, "window", gain) for i, gain in enumerate(gains)]
    for place in ("amx", "amx-again"):
        race.tables[f"{place}/causal"] = race.tables["amx/columns"]
    said = "1 of 2 heads of `columns` (the first: 2 of 2) and 2 of 2 heads of `causal` (the first: 2 of 2)"
    assert race.NUMBERS["again-amx"]() == said


def test_seconds_of_a_study_are_those_of_its_steps_and_of_short_pauses(tmp_path):
    from study_times import seconds_in, spans_of

    assert seconds_in([]) == 0
    # One within another; a pause of 15 s, which counts, and one of 16, which does not
    assert seconds_in([(25, 30), (0, 10), (5, 8)]) == 30
    assert seconds_in([(0, 10), (26, 30)]) == 14
    log = "2026-01-02 10:00:00,500 reading\n  half of it  3.0 s\n2026-01-02 10:01:40,500 summary of bert  90.0 s\n"
    (tmp_path / "summary_bert.log").write_text(log)
    (tmp_path / "figure.log").write_text("2026-01-02 10:01:50,000 growth  4.0 s  of which drawing 3.0 s\n")
    (tmp_path / "other.txt").write_text(log)
    spans = sorted(spans_of(tmp_path))
    assert [end - start for start, end in spans] == [90, 4]
    assert spans[1][1] - spans[0][1] == 9.5
    assert seconds_in(spans) == 99.5


def test_times_of_studies_that_are_not_given_stay(monkeypatch, tmp_path):
    import study_times

    monkeypatch.setattr(study_times, "OUT", tmp_path / "study_times.csv")
    for study, seconds in (("rows", [5.0]), ("long", [5.0, 3.0]), ("rows", [7.6])):
        folder = tmp_path / study
        for name in ("logs", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for place, took in enumerate(seconds):
            (folder / "logs" / f"{place}.log").write_text(f"2026-01-02 10:00:00,000 a step  {took} s\n")
        made = {"commit": f"of {study}", "machine": {"processor": f"a CPU for {study}"}}
        (folder / "tables" / "sweep.json").write_text(json.dumps({"machine": {}, "provenance": made}))
        monkeypatch.setattr(sys, "argv", ["study_times.py", str(folder)])
        study_times.main()
    table = pd.read_csv(tmp_path / "study_times.csv")
    assert list(table.columns) == columns_of("benchmarks/study_times.csv")
    known = [["long", 2, 5, "a CPU for long", "of long"], ["rows", 1, 8, "a CPU for rows", "of rows"]]
    assert table.to_numpy().tolist() == known
    assert json.loads((tmp_path / "study_times.json").read_text())["machine"]["cores"] == os.cpu_count()


@pytest.fixture
def documents(monkeypatch, tmp_path):
    """The functions of into_documents, and what writes the tables that they read, with a record."""
    import into_documents
    import operator_tables

    for module in (into_documents, operator_tables):
        monkeypatch.setattr(module, "REFERENCE", tmp_path)

    def known(name, rows, record=MACHINE):
        path = tmp_path / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False)
        path.with_suffix(".json").write_text(json.dumps(record))

    monkeypatch.setattr(into_documents, "known", known, raising=False)
    return into_documents


def test_the_speed_of_the_statistics_is_shown_against_topk_in_float64(documents):
    row = {"what": "sharp heads", "n": 50, "d": 8, "ours_ms": 0.126, "other_ms": 8.6, "product_ms": 0.054}
    rows = [row | {"against": "topk float64", "times_faster": 67.6, "lowest": 60.4, "highest": 70.6}]
    rows += [row | {"against": "topk float32", "times_faster": 1, "lowest": 1, "highest": 1}]
    rows += [{"what": "9 contexts x 2 heads, all cores", "n": 3, "d": 4, "ours_ms": 154_400.0}]
    documents.known("benchmarks/statistics", rows)
    text = documents.statistics_speed()
    assert cells(text) == [["sharp heads, n = 50, d = 8", "0.13 ms", "0.05 ms", "9 ms", "68 (60 to 71)"]]
    assert "\n\n9 contexts x 2 heads, all cores: 154 s. Measured on 2 cores of a CPU, Python 1" in text


def test_graphs_are_shown_by_their_worst_kernel_and_their_mean_cost(documents):
    rows = []
    for place, name in enumerate("ab"):
        facts = {"kernel": name, "n": 2048, "doubling_dimension_at_least": 4.21 + place, "greedy_cover_log2": 9 + place}
        of_greedy = {"guarantee": 5.0, "largest_ratio": 1.111 + place, "median_ratio": 1.0}
        rows.append(facts | {"graph": "exhaustive", "alpha": 1.5, "mean_degree": 10.0 + 4 * place} | of_greedy)
        rows[-1] |= {"mean_evaluations": 30.0 + 4 * place}
        rows.append(facts | {"graph": "vamana", "alpha": 1.2, "mean_degree": 5.0, "recall": 0.9 + 0.054 * place})
        rows[-1] |= {"mean_evaluations": 7.0}
        rows.append(facts | {"graph": "hnsw", "recall": 0.8 - 0.054 * place})
    documents.known("graph_search/graph_search", rows, MACHINE | {"settings": {"near": 7}})
    text = documents.graph_search()
    assert cells(text) == [
        ["exhaustive, alpha = 1.5", "5", "2.11", "12", "32", "–"],
        ["vamana, alpha = 1.2", "–", "–", "5", "7", "0.90 or more"],
        ["hnsw", "–", "–", "–", "–", "0.75 or more"],
    ]
    assert "| of the 7 heaviest keys found |" in text
    assert "2 kernels of 2,048 keys" in text
    assert "at least 4.2 to 5.2 and, by a greedy cover, at most 9.0 to 10.0." in text


def test_training_is_shown_by_its_ends_over_seeds(documents):
    losses = {("exact", 0): (0.4, 0.3, 0.1234), ("sampled", 0): (0.4, 0.3, 0.2), ("sampled", 1): (0.5, 0.3, 0.1)}
    rows = [
        {"problem": "convex", "gradients": gradients, "seed": seed, "step": 5 * place, "loss": loss}
        for (gradients, seed), some in losses.items()
        for place, loss in enumerate(some)
    ]
    documents.known("knn_training/knn_training", rows)
    text = documents.knn_training()
    assert cells(text) == [
        ["convex", "exact", "1", "0.400", "0.123"],
        ["convex", "sampled", "2", "0.450", "0.100 to 0.200"],
    ]
    assert "| after 10 steps |" in text


def test_attention_statistics_are_shown_beside_sdpa_where_they_were_timed(documents):
    row = {"what": "first pass", "n": 8192, "median_ms": 171.6, "least_ms": 1.0, "times_sdpa": 1.214}
    rows = [row | {"times_sdpa_least": 9.0}, {"what": "entropy", "n": 4}]
    documents.known("benchmarks/attention_statistics", rows, MACHINE | {"settings": {"d": 8}})
    text = documents.attention_statistics()
    assert cells(text) == [["first pass", "8,192", "172", "1.21"]]
    assert text.startswith("| one head, d = 8, one core |")


def test_spectral_errors_are_shown_beside_their_bound(documents):
    row = {"scale": "1", "densities": "levels", "samples": 32, "spectral_error": 0.5049, "largest": 0.9, "bound": 0.567}
    documents.known(
        "benchmarks/spectral_error", [row | {"kernel_evaluations_per_pair": 1008.4, "sums_made_exactly": 0.216}]
    )
    assert cells(documents.spectral_error()) == [["1", "levels", "32", "0.50", "0.57", "1008", "22%"]]


def test_times_of_studies_are_those_of_a_context_times_contexts_and_of_logs(documents, monkeypatch):
    measured = {"memory_of_all_processes_gb": 1.62, "memory_of_the_largest_process_gb": 1.44, "activations_gb": 0.26}
    made = MACHINE | {"settings": {"contexts": 20}, "measured": measured, "command": "python whole_squad.py"}
    steps = {"extract": 15.4, "statistics": 7.0, "attention": 8.0, "readings": 28.4}
    rows = [{"step": step, "jobs": 1 + (step == "extract"), "processor": took} for step, took in steps.items()]
    documents.known("benchmarks/whole_squad", rows, made)
    text = documents.whole_squad()
    assert cells(text)[0] == ["extract", "2", "15", "0.77"]
    assert cells(text)[3] == ["readings", "1", "28", "1.42"]
    assert "20 contexts; peak memory 1.6 GB of all processes together and 1.4 GB of the largest one; " in text
    assert "on disk at most 0.3 GB. 2 cores of a CPU, Python 1, torch 1, NumPy 1, `python whole_squad.py`." in text
    study = SimpleNamespace(corpus=SimpleNamespace(name="squad-dev"), models=["a", "b"], readings_texts=None)
    monkeypatch.setattr(documents, "study_of", lambda config, name: study)
    # Of three kinds of entries, as one of two models is causal; hours
    of_all = 2067 / 20 * (2 * 15.4 + 3 * (7.0 + 8.0 + 28.4)) / 3600
    assert documents.takes("paper") == f"about {of_all:.1f} hours of one core"
    study.readings_texts, study.corpus.name = 100, "squad"
    of_all = (20_963 / 20 * (2 * 15.4 + 3 * (7.0 + 8.0)) + 100 / 20 * 3 * 28.4) / 3600
    assert documents.takes("paper") == f"about {of_all:.0f} hours of one core"
    times = {"a": 99, "b": 100, "c": 5399, "d": 5400}
    documents.known("benchmarks/study_times", [{"study": name, "seconds": took} for name, took in times.items()])
    spans = ["100 seconds", "2 minutes", "90 minutes", "1.5 hours"]
    assert [documents.takes(name) for name in times] == [f"about {span} on 2 cores" for span in spans]
    assert documents.takes("e") == "not timed"


def test_families_are_shown_over_all_entries_and_over_those_of_a_causal_model(documents, monkeypatch, tmp_path):
    facts = {"label": "A", "layers": 2, "heads": 3, "mask": "no key after its query", "largest_ratio": 57.84}
    facts |= {"largest_ratio_layer": 1, "largest_ratio_head": 2, "heads_within_bound": 4, "median_ratio": 4.726}
    causal = {"label": "B", "masked_largest_ratio": 26.0, "masked_largest_ratio_layer": 0}
    causal |= {"masked_largest_ratio_head": 1, "masked_heads_within_bound": 5, "masked_median_ratio": 0.19}
    monkeypatch.setattr(documents, "FAMILIES", ["a", "b"])
    (tmp_path / "families" / "tables").mkdir(parents=True)
    for name, some in (("a", facts), ("b", facts | causal)):
        (tmp_path / "families" / "tables" / f"overview_{name}.json").write_text(json.dumps(some))
    assert cells(documents.families()) == [
        ["A", "all", "4 of 6", "4.73", "57.8 (layer 1, head 2)"],
        ["B", "all", "4 of 6", "4.73", "57.8 (layer 1, head 2)"],
        ["B", "no key after its query", "5 of 6", "0.19", "26 (layer 0, head 1)"],
    ]


def test_densities_are_shown_with_what_only_an_operator_says(documents):
    import operator_tables

    row = {"queries": 1000, "method": "KernelOperator", "seconds": 0.2345, "error": 9.62e-5, "times_faster": 1.094}
    row |= {"seconds_first": 5.0, "bound": 1.2e-4, "way": "blocks", "evaluated": 0.034, "times_faster_first": 0.4152}
    plain = {"queries": 1000, "method": "torch", "seconds": 37.04, "error": 0.0, "times_faster": 1.0}
    documents.known("benchmarks/density", [plain, row], MACHINE | {"settings": {"points": 3000}})
    text = operator_tables.density()
    assert "\n\n3,000 points. " in text
    assert cells(text) == [
        ["1,000", "torch", "", "", "37", "0", "", "1", ""],
        ["1,000", "KernelOperator", "blocks", "3%", "0.234", "9.6e-05", "1.2e-04", "1.09", "0.415"],
    ]


def test_calls_are_timed_in_turn_after_a_round_that_is_not_counted(monkeypatch):
    from writing import times

    now, order = [0.0], []

    def call(name, seconds):
        def made():
            order.append(name)
            now[0] += 100.0 if len(order) <= 2 else seconds

        return made

    assert times({"a": call("a", 1.0), "b": call("b", 2.0)}, 3, lambda: now[0]) == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert order == ["a", "b"] * 4


def test_the_direct_implementation_of_the_statistics_is_right(monkeypatch):
    import statistics_speed

    monkeypatch.setattr(statistics_speed, "FIRST", 1)
    # With queries and keys of 0 every entry is 1: of i² entries i are the head.
    zero = torch.zeros(4, 2)
    assert statistics_speed.topk_of_every_prefix(zero, zero, torch.float64).tolist() == [0, 1, 2, 3]


def test_entropies_of_the_n_by_n_reference_are_right():
    from attention_statistics import entropy_of, head

    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3] * 3, [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(entropy_of(p.log()), torch.tensor([1.5 * math.log(2), math.log(3), 0.0]).double())
    q, k = head(50, 4, 12.0)
    assert float((q @ k.mT / 2).abs().max()) == pytest.approx(12.0, rel=1e-5)


def test_recall_is_the_share_of_the_right_keys():
    from graph_search import recall

    assert recall(torch.tensor([[1, 2, 9], [5, 7, 6]]), torch.tensor([[2, 1], [6, 8]])) == 0.75


def test_jobs_are_counted_by_their_logs(tmp_path):
    import whole_squad

    for step, names in {"extract": ["_0000", "_0001"], "statistics": ["_0000"], "attention": [""]}.items():
        for name in names:
            (tmp_path / f"{step}_{whole_squad.MODEL}{name}.log").touch()
    seconds = {"extract": 1.5, "statistics": 2.5, "attention": 3.5, "readings": 4.5}
    with pytest.raises(ValueError, match="lacks the log of a step"):
        whole_squad.table_of(tmp_path, seconds)
    (tmp_path / f"readings_{whole_squad.MODEL}_0000.log").touch()
    table = whole_squad.table_of(tmp_path, dict(reversed(seconds.items())))
    assert table["jobs"].tolist() == [2, 1, 1, 1]
    assert dict(zip(table["step"], table["processor"], strict=True)) == seconds
    assert list(table.columns) == columns_of("benchmarks/whole_squad.csv")
    assert len(whole_squad.targets(101)) == 2 * len(whole_squad.MADE)


def test_the_time_of_a_product_is_the_median(monkeypatch):
    pytest.importorskip("sklearn")
    import density

    # Products of 1, 9 and 2 seconds
    clock = iter((0.0, 1.0, 1.0, 10.0, 10.0, 12.0))
    monkeypatch.setattr(density, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    taken, answer = density.seconds_of(lambda: np.ones(1, np.float32), 3)
    assert taken == 2
    assert answer.dtype == np.float64


def test_random_calls_and_bad_inputs_are_counted_by_how_they_end(monkeypatch):
    import reliability

    ends = {"a": ["answered", "failed", "refused"], "b": ["answered"] * 3}
    monkeypatch.setattr(reliability, "kinds", lambda: list(ends))
    monkeypatch.setattr(reliability, "call", lambda kind, seed: (ends[kind][seed], "why"))
    # Five calls of two kinds are three of each.
    found = reliability.fuzz(5)
    assert list(found.columns) == columns_of("reliability/fuzz.csv")
    assert found.to_numpy().tolist() == [["a", 3, 1, 1, 1, "seed 1: why"], ["b", 3, 3, 0, 0, ""]]
    endings = {"good": (2, "approxkmv: no\n"), "two lines": (2, "approxkmv: no\n, no\n"), "an answer": (0, "")}
    cases = [SimpleNamespace(kind="texts", name=name, run=lambda folder, e=e: e) for name, e in endings.items()]
    monkeypatch.setattr(reliability, "all_cases", lambda: cases)
    found = reliability.bad_inputs()
    assert list(found.columns) == columns_of("reliability/bad_inputs.csv")
    assert found.to_numpy().tolist() == [["texts", 3, 1, "two lines; an answer"]]


def test_a_kill_leaves_nothing_running_and_what_it_cut_short_is_found(tmp_path):
    import reliability_kills as kills

    process = subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    row = kills.kill_at(process, lambda: True)
    assert row is not None
    assert row["running"] == "none"
    assert process.returncode == -9
    ended = subprocess.Popen(["true"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert kills.kill_at(ended, lambda: False) is None
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "a.json").write_text('{"x": 1, "provenance": {"commit": "a"}}')
    whole = kills.fingerprints(tmp_path)
    assert kills.cut_short(tmp_path) == []
    (tables / "a.json").write_text('{"x": 1, "provenance": {"commit": "b"}}')
    assert kills.fingerprints(tmp_path) == whole
    (tables / "a.json").write_text('{"x": 2}')
    assert kills.fingerprints(tmp_path) != whole
    (tables / "a.json").write_text('{"x": ')
    assert kills.cut_short(tmp_path) == [str(tables / "a.json")]


SWEEP = """
import sys, time
from pathlib import Path

out = Path(sys.argv[1])
part = Path(f"{out}.part")
if out.stem == "undisturbed" or part.exists():
    print("resumes after the 1 finished by an earlier run")
    out.write_text("workload,n,method,status\\nw,1,mean,measured\\n")
    part.unlink(missing_ok=True)
else:
    part.write_text("a line about the run\\nand one of a case\\n")
    time.sleep(60)
"""


def test_a_kill_is_told_in_the_columns_of_the_reference(monkeypatch, tmp_path):
    import reliability_kills as kills

    def start(*words):
        return subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True, start_new_session=True)

    project = SimpleNamespace(results=tmp_path / "results", snakemake=lambda: (0, ""), start=start)
    monkeypatch.setattr(kills, "project_in", lambda folder: project)
    monkeypatch.setattr(kills, "running", lambda group: kills.STEPS)
    monkeypatch.setattr(kills, "WITHIN", 0.0)
    (tmp_path / "sweep.py").write_text(SWEEP)
    monkeypatch.setattr(kills, "SWEEP", f"{sys.executable} {tmp_path / 'sweep.py'} sweep.csv")
    monkeypatch.setattr(sys, "argv", ["kills.py", "--kills", "4", "--out", str(tmp_path / "kills.csv")])
    with pytest.raises(SystemExit) as ended:
        kills.main()
    assert ended.value.code == 0
    table = pd.read_csv(tmp_path / "kills.csv")
    assert list(table.columns) == columns_of("reliability/kills.csv")
    assert table["kill"].tolist() == [1, 2, 3, 4]
    assert table["aimed_at"].tolist() == ["sweep, case 2", "texts", "fetch", "extract"]
    assert (table["survived"] == "yes").all()
    record = json.loads((tmp_path / "kills.json").read_text())
    assert (record["kills"], record["survived"], record["settings"]) == (4, 4, {"kills": 4, "seed": 0})
    # What was cut short under its final name, or left behind under another, is a loss.
    for name, text in (("cut.json", "{"), (".half.json", "{}")):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / name).write_text(text)
        with pytest.raises(SystemExit) as ended:
            kills.main()
        assert ended.value.code == 1
        table = pd.read_csv(tmp_path / "kills.csv")
        assert table["survived"].tolist() == ["yes", "no", "no", "no"]
        assert table["whole_files"].tolist()[1:] == [name.startswith(".")] * 3
        assert json.loads((tmp_path / "kills.json").read_text())["survived"] == 1


def test_what_kernels_need_is_told_for_a_pair_of_a_query_and_a_key(monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    import gpu_code

    made = SimpleNamespace(metadata=SimpleNamespace(shared=512, num_warps=4))
    launches = {"rows_kernel": {"BM": 16, "BN": 32}}
    compiled = {"FUSED": ("keys_kernel", "rows_kernel"), "of_the_fused_form": lambda *sizes, summing: made}
    compiled |= {"resources": lambda made: (40, 0), "instructions_of_the_loop": lambda made: 300}
    compiled |= {"fused": SimpleNamespace(launches=lambda d, d_v, clusters: launches)}
    monkeypatch.setitem(sys.modules, "ahead_of_time", SimpleNamespace(**compiled))
    monkeypatch.setattr(gpu_code, "OUT", tmp_path / "code.csv")
    monkeypatch.setattr(gpu_code, "SIZES", ((64, 1),))
    names = columns_of("gpu/tables/code.csv")
    pd.DataFrame([["3.0", *[1] * 8], [triton.__version__, *[2] * 8]], columns=names).to_csv(gpu_code.OUT, index=False)
    gpu_code.main()
    table = pd.read_csv(gpu_code.OUT, dtype={"triton": str})
    assert list(table.columns) == names
    # Of the other version as it was; 300 instructions of 128 threads for 512 pairs
    assert table.drop(columns="kernel").fillna(-1).to_numpy().tolist() == [
        ["3.0", *[1] * 7],
        [triton.__version__, 64, 1, 40, 0, 512, 128, -1],
        [triton.__version__, 64, 1, 40, 0, 512, 128, 75],
    ]


@pytest.mark.parametrize("name", ["operator/tables/operator.csv", "complexity/tables/complexity.csv"])
def test_reference_tables_of_a_study_have_the_columns_of_today(name):
    from approxkmv.kmv import complexity
    from approxkmv.steps import operator

    columns = {"operator": operator.COLUMNS, "complexity": complexity.COLUMNS}[Path(name).stem]
    for path in (ROOT / "results" / "reference").glob(f"**/{name}"):
        assert columns_of(path) == list(columns)


SWEEPS = sorted((ROOT / "results" / "reference").glob("**/sweep.csv"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parents[1].name)
def test_what_the_reference_sweeps_derive_from_their_rows_is_what_todays_code_derives(path, tmp_path):
    from gpu_tables import _typed

    from approxkmv.sweep.exponents import EXPONENT_COLUMNS, add_exponents, evaluation_exponents
    from approxkmv.sweep.ratios import add_ratios
    from approxkmv.sweep.table import COLUMNS, write_rows

    with path.open(encoding="utf-8", newline="") as file:
        rows = [_typed(row) for row in csv.DictReader(file)]
    derived = ("reached", "fastest_exact", "times_faster", "evaluation_exponent")
    for row in rows:
        for name in [name for name in row if name.startswith(derived)]:
            del row[name]
    add_ratios(rows)
    exponents = evaluation_exponents(rows)
    add_exponents(rows, exponents)
    write_rows(tmp_path / "sweep.csv", rows, COLUMNS)
    write_rows(tmp_path / "sweep_exponents.csv", exponents, EXPONENT_COLUMNS)
    for name in ("sweep.csv", "sweep_exponents.csv"):
        same_table(tmp_path / name, path.with_name(name))


def same_table(made: Path, known: Path) -> None:
    """Equal but for the last digits, which depend on NumPy's version and the CPU."""
    pd.testing.assert_frame_equal(pd.read_csv(made), pd.read_csv(known), rtol=1e-12, atol=0)


@pytest.mark.parametrize("study", ["embedded", "families"])
def test_the_reference_comparison_with_the_paper_is_what_todays_code_finds_in_the_tables(study, tmp_path):
    from approxkmv.steps.compare import compare

    tables = ROOT / "results" / "reference" / study / "tables"
    known = tables / "paper_comparison.csv"
    compare(tables, pd.read_csv(known)["model"].unique(), tmp_path / known.name)
    same_table(tmp_path / known.name, known)


def test_the_reference_fits_of_costs_are_what_todays_code_fits():
    from approxkmv.kmv.complexity import fit_exponents

    tables = ROOT / "results" / "reference" / "complexity" / "tables"
    found = fit_exponents(pd.read_csv(tables / "complexity.csv"))
    # Least squares round otherwise on other processors.
    pd.testing.assert_frame_equal(found, pd.read_csv(tables / "complexity_fits.csv"), rtol=1e-6)
