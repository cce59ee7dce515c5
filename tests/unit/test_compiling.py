"""Cached machine code: it always matches the present sources, and everything works without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

PACKAGE = Path(__file__).parents[2] / "src" / "approxkmv"

# A loop whose constant and callee are of another file.
_PART = """
from approxkmv.compute.compiling import cached_njit
FACTOR = 2.0
@cached_njit(nogil=True)
def shifted(x):
    return x + 1.0
"""
_WHOLE = """
from approxkmv.compute.compiling import cached_njit
from approxkmv.part import FACTOR, shifted
@cached_njit(nogil=True)
def answer(x):
    return FACTOR * shifted(x)
"""
_ASK = "from approxkmv.whole import answer; print(answer(1.0), answer(1), sum(answer.stats.cache_hits.values()))"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with the two files above, whose cache is the folder `cache` beside it."""
    copy = tmp_path / "approxkmv"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "part.py").write_text(_PART)
    (copy / "whole.py").write_text(_WHOLE)
    return copy


def said(program: str, **environment: str) -> list[str]:
    """What a program prints, run in a process of its own; it must end well and say nothing else."""
    # Python's own bytecode is trusted by its file's time in seconds and size, which an edit in a test may keep.
    given = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    ran = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    return ran.stdout.split()


def ask(package: Path, program: str = _ASK) -> list[str]:
    """What a program says of the copy."""
    return said(program, PYTHONPATH=str(package.parent), NUMBA_CACHE_DIR=str(package.parent / "cache"))


def kept(package: Path) -> list[Path]:
    return sorted((package.parent / "cache").rglob("*answer*"))


@pytest.mark.slow
def test_code_is_kept_and_an_edit_of_what_it_was_made_of_runs(package: Path):
    assert ask(package) == ["4.0", "4.0", "0"]
    assert ask(package) == ["4.0", "4.0", "2"]
    part = package / "part.py"
    part.write_text(_PART.replace("FACTOR = 2.0", "FACTOR = 3.0"))
    assert ask(package) == ["6.0", "6.0", "0"]
    part.write_text(_PART.replace("x + 1.0", "x + 2.0"))
    assert ask(package) == ["6.0", "6.0", "0"]
    part.write_text(_PART)
    assert ask(package) == ["4.0", "4.0", "2"]


@pytest.mark.slow
def test_an_edit_of_exponential_changes_the_statistics_that_use_it(package: Path):
    program = """
import numpy as np
from approxkmv.statistics.softmax import softmax_statistics
out = np.zeros(3)
softmax_statistics(9 * np.eye(4), False, out)
print(out)
"""
    # Doubled sums halve every share; each row's largest, nearly 1, still counts as one of the n largest.
    before = ask(package, program)
    file = package / "statistics" / "exponential.py"
    text = file.read_text()
    assert text.count("return total") == 1
    file.write_text(text.replace("return total", "return 2.0 * total"))
    assert ask(package, program) != before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "a folder"])
def test_damaged_code_is_made_again(package: Path, damage: str):
    ask(package)
    assert len(kept(package)) == 2
    for file in kept(package):
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 1
        if damage == "a folder":
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes({"cut": whole[:-9], "changed": whole, "empty": b""}[damage])
    assert ask(package) == ["4.0", "4.0", "0"]
    if damage != "a folder":
        assert ask(package) == ["4.0", "4.0", "2"]


@pytest.mark.slow
def test_without_a_writable_place_nothing_is_kept(package: Path):
    (package.parent / "cache").write_text("a file where the folder would be")
    assert ask(package) == ["4.0", "4.0", "0"]
    assert ask(package) == ["4.0", "4.0", "0"]


@pytest.mark.slow
def test_code_that_nobody_loaded_for_long_goes(package: Path):
    ask(package)
    old, loaded = kept(package)
    for file in (old, loaded):
        os.utime(file, (0, 0))
    # The first signature is loaded, the second is new, and to keep it clears away.
    ask(package, _ASK.replace("answer(1), ", "answer(1j), "))
    assert len(kept(package)) == 2
    assert len({old, loaded} & set(kept(package))) == 1


@pytest.mark.slow
def test_processes_at_once_keep_whole_code(package: Path):
    command = [sys.executable, "-c", _ASK]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "NUMBA_CACHE_DIR": str(package.parent / "cache")}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        out, _ = process.communicate()
        assert out.split()[:2] == ["4.0", "4.0"]
    assert ask(package) == ["4.0", "4.0", "2"]


@pytest.mark.slow
def test_numba_without_its_compiler_gives_the_same_answers():
    program = """
import torch
from approxkmv import head_to_tail_ratios, order_ratios
from approxkmv.attention import get, methods
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 60, 8, generator=generator) for _ in range(3))
print(float(head_to_tail_ratios(q, k).sum()), float(order_ratios(q, k).log_next.sum()))
exact = get("exact-naive")(q, k, v, scale=0.3, seed=0)
few = dict.fromkeys(("local-expansion", "approxkmv"), {"block": 16, "near": 8})
for name in ("exact-fused", "clustered", "local-expansion", "approxkmv", "knn"):
    print(float((get(name)(q, k, v, scale=0.3, seed=0, **few.get(name, {})) - exact).norm() / exact.norm()))
"""
    # The package itself, whose code the other tests keep.
    path = str(PACKAGE.parent)
    compiled, python = said(program, PYTHONPATH=path), said(program, PYTHONPATH=path, NUMBA_DISABLE_JIT="1")
    compiled, python = ([float(value) for value in values] for values in (compiled, python))
    assert python[:2] == pytest.approx(compiled[:2], rel=1e-9)
    # Errors of float32 answers: rounding may give a point of `clustered` to another centre.
    assert python[2:] == pytest.approx(compiled[2:], abs=1e-3)
    assert 0.0 < max(python[2:]) < 1.0


def test_no_loop_asks_numba_for_its_own_cache():
    for file in PACKAGE.rglob("*.py"):
        assert "cache=True" not in file.read_text(), (
            f"{file}: cached_njit of approxkmv/compute/compiling.py keeps the code"
        )


@pytest.mark.slow
def test_loops_for_another_cpu_have_none_of_the_bfloat16_instructions_that_this_one_may_have(tmp_path):
    """The assembler would end the process."""
    program = """
import torch
from approxkmv.attention import get
from approxkmv.attention.blocks import trials
from approxkmv.compute import trial
torch.cpu._is_avx512_bf16_supported = lambda: True
q, k, v = torch.randn(3, 1, 300, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
with trial.forced({trials._LOOPS: "compiled", trials.NEAR_KEYS_MANY: "bfloat16"}):
    out = get("local-expansion")(q, k, v, scale=0.25, seed=0, block=32, near=40, products="bfloat16")
print(bool(out.isfinite().all()))
"""
    assert said(program, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME="generic") == ["True"]
