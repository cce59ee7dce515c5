"""The small study as fixtures: its models and texts, a folder to run it in, and one where it has run."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_project import ROOT as ROOT
from small_project import WORDS as WORDS
from small_project import Project as Project
from small_project import environment as environment
from small_project import kill_when as kill_when
from small_project import save_model as save_model
from small_project import save_texts as save_texts
from small_project import save_tokenizer as save_tokenizer


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and eight texts; text 2 is shorter than the minimum, text 5 longer than the maximum."""
    folder = tmp_path_factory.mktemp("inputs")
    for family in ("bert", "llama"):
        save_model(folder / family, family)
    save_texts(folder / "words.jsonl")
    return folder


@pytest.fixture
def project(inputs: Path, tmp_path: Path) -> Project:
    """A fresh project that shares the inputs through links."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    made = Project(tmp_path)
    made.configure()
    return made


@pytest.fixture(scope="session")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str]:
    """A project whose study has run once, without interruption, and what Snakemake printed."""
    folder = tmp_path_factory.mktemp("finished")
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    made = Project(folder)
    made.configure()
    code, output = made.snakemake()
    assert code == 0, output
    return made, output
