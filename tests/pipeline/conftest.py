"""Fixtures of the small study: its models and texts, a folder to run it in, and one where it has run."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forking import LIBRARIES, OF_THE_HUB, forking_commands
from small_project import Project, save_model, save_texts


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of pytest's processes to ask makes, and the others share."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, whole = root / name, root / f"{name}.whole"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


def link_all(inputs: Path, folder: Path) -> None:
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and eight texts; text 2 is shorter than the minimum, text 5 longer than the maximum."""

    def make(folder: Path) -> None:
        for family in ("bert", "llama"):
            save_model(folder / family, family)
        save_texts(folder / "words.jsonl")

    return made_once(tmp_path_factory, "inputs", make)


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    """Snakemake and approxkmv, without the seconds their imports take."""
    with forking_commands(*LIBRARIES, *OF_THE_HUB) as folder:
        yield folder


@pytest.fixture
def project(inputs: Path, commands: Path, tmp_path: Path) -> Project:
    """A fresh project that shares the inputs through links."""
    link_all(inputs, tmp_path)
    made = Project(tmp_path, commands)
    made.configure()
    return made


@pytest.fixture(scope="session")
def finished(inputs: Path, commands: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str]:
    """A project whose study has run once, without interruption, and what Snakemake printed.

    It is a copy: what tests of one process do to it no other sees.
    """

    def make(folder: Path) -> None:
        link_all(inputs, folder)
        made = Project(folder, commands)
        made.configure()
        code, output = made.snakemake()
        assert code == 0, output
        (folder / "output").write_text(output)

    whole = made_once(tmp_path_factory, "finished", make)
    # Beside the original: Snakemake remembers the sources by their paths relative to the folder.
    copy = whole.with_name(f"finished-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}")
    shutil.copytree(whole, copy, symlinks=True)
    return Project(copy, commands), (copy / "output").read_text()


@pytest.fixture
def copied(finished: tuple[Project, str], tmp_path: Path) -> Project:
    """A finished study of a test's own, which may change it."""
    whole = finished[0].folder.with_name("finished")
    folder = whole.with_name(f"finished-{tmp_path.name}")
    shutil.copytree(whole, folder, symlinks=True)
    return Project(folder, finished[0].commands)
