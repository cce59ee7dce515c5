"""Documents say what the reference tables say, and name nothing that is not there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_findings_are_what_the_reference_tables_say():
    if not list((ROOT / "results" / "reference" / "embedded" / "tables").glob("growth_*.csv")):
        pytest.skip("results/reference has no growth tables yet: run the studies embedded and lengths")
    done = subprocess.run(
        [sys.executable, "benchmarks/findings.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "report").glob("*.rst")), ids=lambda path: path.stem)
def test_captions_of_the_report_are_what_docutils_reads(path: Path):
    docutils = pytest.importorskip("docutils.core")
    docutils.publish_doctree(path.read_text(), settings_overrides={"halt_level": 2, "report_level": 5})
