"""Documents agree with the reference tables, and every file that they link to exists."""

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


def test_the_findings_are_short_and_their_tables_narrow():
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert max(line.count(" | ") + 1 for line in rows) <= 8
    prose = re.sub(r"<!-- .*? -->", "", "\n".join(line for line in text.splitlines() if not line.startswith("|")))
    assert len(prose.split()) <= 1500


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "report").glob("*.rst")), ids=lambda path: path.stem)
def test_captions_of_the_report_are_what_docutils_reads(path: Path):
    docutils = pytest.importorskip("docutils.core")
    docutils.publish_doctree(path.read_text(), settings_overrides={"halt_level": 2, "report_level": 5})
