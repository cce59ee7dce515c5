"""Formatting, lint and types are clean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["snakefmt", "--check", "Snakefile", "workflow"],
        ["mypy"],
    ],
    ids=" ".join,
)
def test_is_clean(command):
    done = subprocess.run(command, cwd=ROOT, env=HERE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_workflow_has_no_lint_but_one_that_is_left_aside():
    # All rules run in the one environment from which Snakemake is started. A `conda:` in each would promise what
    # `--sdm conda` cannot make: environment.yml installs this folder, and the copies made of it lie elsewhere.
    left_aside = "Specify a conda environment or container for each rule."
    done = subprocess.run(["snakemake", "--lint"], cwd=ROOT, env=HERE, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    found = {line.strip(" *:") for line in output.splitlines() if line.startswith("    * ")}
    assert found == {left_aside}, output
