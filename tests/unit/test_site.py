"""The documents as a site, and the notebook and examples in them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def pages(part: object) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [page for item in (part.values() if isinstance(part, dict) else part) for page in pages(item)]


def test_every_document_has_a_place_on_the_site():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(pages(yaml.safe_load(settings)["nav"])) == sorted(path.name for path in DOCS.glob("*.md"))
    # Nothing is fetched from elsewhere, neither at the build nor by a reader.
    assert "font: false" in settings


def test_the_reference_has_every_public_name():
    import approxkmv

    named = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.M)
    assert {f"approxkmv.{module}.{name}" for module, names in approxkmv._NAMES.items() for name in names} <= set(named)


@pytest.mark.slow
def test_the_site_is_built_without_a_network_and_has_no_dead_link(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    # A proxy that nothing answers at stands for no network; strict makes each warning, as of a dead link, an error.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    bare = {
        "PATH": str(Path(sys.executable).parent),
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    built = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', text), page


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, tmp_path):
    cells = json.loads((DOCS / "own-queries-and-keys.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)


@pytest.mark.slow
def test_the_examples_on_your_own_queries_and_keys_run(monkeypatch, tmp_path):
    examples = re.findall(r"^```python\n(.*?)^```$", (DOCS / "python.md").read_text(encoding="utf-8"), re.S | re.M)
    assert len(examples) == 4
    # The last two need a model; the notebook and the tests of plans have them with one.
    exec("".join(examples[:2]), {})
