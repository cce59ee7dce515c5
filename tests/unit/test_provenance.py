"""The provenance recorded with a result."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from approxkmv import provenance

ROOT = Path(__file__).resolve().parents[2]
SHOW = "from approxkmv.provenance import command; print(command())"


@pytest.mark.parametrize(
    ("flags", "found"),
    [("fpu avx2 avx512_bf16", ["avx2", "avx512_bf16"]), ("fpu amx_bf16 avx2", ["avx2", "amx_bf16"]), ("fpu", [])],
)
def test_the_instructions_that_matter_are_recorded(monkeypatch, flags, found):
    from approxkmv.sweep.measure import machine

    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"model name : A CPU\nflags : {flags}\n")
    assert machine("cpu")["instructions"] == provenance.instructions() == found
    assert machine("cpu")["processor"] == "A CPU"


def test_variables_that_restrict_a_library_are_recorded_where_they_are_set(monkeypatch):
    from approxkmv.sweep.measure import machine

    for name in provenance._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    before = machine("cpu"), provenance.describe()["machine"]
    assert not any("settings" in record for record in before)
    told = {"ONEDNN_MAX_CPU_ISA": "AVX2", "NUMBA_CPU_NAME": "haswell"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert (machine("cpu"), provenance.describe()["machine"]) == tuple(record | {"settings": told} for record in before)


def test_versions_are_those_of_the_packages_that_are_there(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package", "numpy"))
    assert provenance.versions() == {"python": platform.python_version(), "numpy": np.__version__}


def test_a_script_of_the_checkout_is_named_by_its_place(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "findings.py"), "--check"])
    assert provenance.command() == "python benchmarks/findings.py --check"


@pytest.mark.parametrize(
    ("name", "words", "shown"),
    [("one.py", ["{}"], "python {}"), ("approxkmv", ["{}"], "approxkmv"), ("one.py", ["-m", "one"], "python -m one")],
)
def test_the_command_is_the_one_that_was_typed(tmp_path, name, words, shown):
    script = tmp_path / name
    script.write_text(SHOW, encoding="utf-8")
    line = [sys.executable, *(word.format(script) for word in words), "--seed", "3"]
    out = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"{shown.format(script)} --seed 3"
