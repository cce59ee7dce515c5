"""Documents agree with the reference tables, and every file that they link to exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
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


@pytest.mark.parametrize(("name", "most"), [("findings", 1500), ("methods", 2500)])
def test_documents_are_short_and_their_tables_narrow(name, most):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert max(line.count(" | ") + 1 for line in rows) <= 8
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
        settings = SweepSettings.from_mapping({**asked, "workloads": [workload | more]})
        run_sweep(settings, table, describe(), lambda line: None)
    try:
        won = race.winners()
        assert "with the mask of a language model): errors of the answer; one thread" in won
        assert "Not measured yet: `snakemake --cores all --config study=few`." in won
        assert reference.machine(tmp_path / "rows" / "tables" / "sweep.json") in won
        assert "few queries" in race.answer()
        # Three lengths and three targets of one workload, of three studies that are one, and of the causal one
        assert "| local-expansion | 18 |" in race.counts()
        assert "| hyperattention | 18 |" in race.counts()
        # Where every key is near, a method is exact attention, and wins nothing however fast it is.
        table = race._sweep("rows")
        approximate = table[table["kind"] == "approximate"].assign(reached="yes", times_faster=9.0)
        pairs = approximate["n"] ** 2
        assert len(race._raced(approximate.assign(kernel_evaluations=pairs - 1))) == len(approximate)
        assert race._raced(approximate.assign(kernel_evaluations=pairs)).empty
        of_bfloat16 = [line for line in race.costs().splitlines() if "(columns)" in line]
        assert len(of_bfloat16) == 1
        assert of_bfloat16[0].count("ms [") == 2
        for name in ("race-passing", "race-rising", "race-against-paper", "methods-evaluations", "methods-workloads"):
            assert race.TABLES[name]()
        assert race.claim().startswith("On one thread of ")
        for make in (race.winners, race.passing, race.costs, race.counts):
            assert max(line.count(" | ") + 1 for line in make().splitlines()) <= 8
    finally:
        race._sweep.cache_clear()


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "report").glob("*.rst")), ids=lambda path: path.stem)
def test_captions_of_the_report_are_what_docutils_reads(path: Path):
    docutils = pytest.importorskip("docutils.core")
    docutils.publish_doctree(path.read_text(), settings_overrides={"halt_level": 2, "report_level": 5})


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.stem)
def test_no_line_begins_with_the_mark_of_a_number(path):
    # In Markdown a comment at the start of a line ends the paragraph, and its line is not read as Markdown.
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("<!-- number")] == []
