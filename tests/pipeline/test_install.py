"""The wheel, installed with what it declares and nothing else: the library, the command line, README's examples."""

from __future__ import annotations

import importlib.metadata
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from small_project import ROOT, WORDS, save_model


def run(command: list[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, env=bare, capture_output=True, text=True, **options)


def pip(*arguments: str | Path) -> None:
    done = run([sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-index"])
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools builds within the folder and takes what an earlier build left there.
    shutil.copytree(
        ROOT / "src", folder / "project" / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "project")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "project")
    return next(folder.glob("*.whl"))


def needed(requirements: Iterable[str], extras: set[str]) -> set[str]:
    """The installed distributions that requirements need, with what these need in turn."""
    found: set[str] = set()
    waiting = [(Requirement(text), extras) for text in requirements]
    while waiting:
        requirement, wanted = waiting.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in wanted | {""}):
            continue
        key = f"{requirement.name.lower()}{sorted(requirement.extras)}"
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            # Such as the CUDA libraries of another build of torch.
            continue
        if key not in found:
            found.add(key)
            waiting += [(Requirement(text), requirement.extras) for text in distribution.requires or []]
    return {key.partition("[")[0] for key in found}


def environment(folder: Path, wheel: Path, extras: set[str]) -> Path:
    """An environment that pip put the wheel in, with links to the distributions that its metadata asks for."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    pip("--python", folder / "bin" / "python", "install", wheel)
    metadata = next(site.glob("approxkmv-*.dist-info/METADATA")).read_text(encoding="utf-8")
    requirements = re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)
    for name in needed(requirements, extras):
        for file in importlib.metadata.distribution(name).files or []:
            top = file.parts[0]
            source = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(source)
    return folder / "bin"


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("bare"), wheel, set())


@pytest.mark.slow
def test_the_bare_wheel_runs_the_examples_of_the_readme(bare, tmp_path):
    examples = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert len(examples) >= 2
    ran = run([bare / "python", "-c", "".join(examples)], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    home = run([bare / "python", "-c", "import approxkmv; print(approxkmv.__file__)"], cwd=tmp_path).stdout
    assert home.startswith(str(bare.parent))


@pytest.mark.slow
def test_the_bare_wheel_has_a_command_line_and_the_schema(bare, tmp_path):
    assert "Usage: approxkmv" in run([bare / "approxkmv", "--help"], cwd=tmp_path).stdout
    schema = run([bare / "approxkmv", "config", "schema"], cwd=tmp_path).stdout
    assert schema == (ROOT / "workflow" / "schemas" / "config.schema.yaml").read_text(encoding="utf-8")
    checked = run([bare / "approxkmv", "config", "check"], cwd=ROOT)
    assert checked.returncode == 0, checked.stderr
    # What needs the extra says so in one line.
    tables = ROOT / "results" / "reference" / "complexity" / "tables"
    figure = run([bare / "approxkmv", "figure", "complexity", "--tables", tables, "--out", "x"], cwd=tmp_path)
    assert figure.returncode == 2
    assert re.fullmatch(
        r"approxkmv: this needs the package \w+: pip install 'approxkmv\[pipeline\]'", figure.stderr.strip()
    )


@pytest.mark.slow
def test_the_wheel_with_the_pipeline_checks_a_model(wheel, tmp_path):
    programs = environment(tmp_path / "environment", wheel, {"pipeline"})
    save_model(tmp_path / "model", "bert")
    draw = random.Random(1)
    (tmp_path / "texts.txt").write_text("\n\n".join(" ".join(draw.choices(WORDS, k=90)) for _ in range(8)))
    checked = run(
        [programs / "approxkmv", "check", "path:model", "--text", "texts.txt", "--out", "found"], cwd=tmp_path
    )
    assert checked.returncode == 0, checked.stderr
    assert (tmp_path / "found" / "index.html").is_file()
