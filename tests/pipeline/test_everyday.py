"""Of the everyday things in docs/index.md those that no other test does, by the commands that stand there.

The others: leave out a model (test_old_results), a text of one's own (test_check), only figures (test_study), one core
and Ctrl-C (test_messages), another folder (test_elsewhere), a typo (test_bad_input), a plain wheel (test_install), and
q and k in four dimensions and the notebook (tests/unit/test_site.py).
"""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from small_project import ROOT, Project

PROFILE = ["--profile", str(ROOT / "profiles" / "default")]


def commands_to(what: str) -> list[str]:
    """What docs/index.md says to do that, with the small study's name."""
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {what} \| (.*) \|$", text, re.M)
    assert row, what
    return [code.replace("embedded", "tiny") for code in re.findall(r"`([^`]+)`", row[1])]


@pytest.mark.slow
def test_fewer_texts_are_read_and_a_dry_run_says_what_it_would_do(project: Project):
    _, fewer, command = commands_to("read fewer texts")
    assert "contexts" in fewer
    (project.folder / "fewer.yaml").write_text(fewer.replace("32", "3"))
    assert shlex.split(command)[-2:] == ["--configfile", "FILE"]
    counts, whole = commands_to("see what would run")
    for said in (counts, whole):
        code, output = project.snakemake(*PROFILE, "--configfile", "fewer.yaml", *shlex.split(said)[1:])
        assert code == 0, output
        if said is counts:
            assert re.search(r"^fetch +2$", output, re.M), output
            assert len(output.splitlines()) < 60, output
        assert ("results/tiny/models/llama.json" in output) == (said is whole)
    # Options in one word, as Snakemake allows them
    code, output = project.snakemake(*PROFILE, "-nF")
    assert code == 0, output
    assert re.search(r"^fetch +2$", output, re.M), output
    assert not project.results.exists(), "a dry run leaves nothing"
    code, output = project.snakemake("results/tiny/texts.parquet", "--configfile", "fewer.yaml")
    assert code == 0, output
    assert "3 texts" in output
    assert yaml.safe_load((project.results / "config.yaml").read_text())["studies"]["tiny"]["contexts"] == 3
