"""The CUDA kernels, in Triton's interpreter and, if there is one, on a GPU.

The interpreter must be selected before the first import, so each run is a separate process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "gpu" / "check_kernels.py"


def check_kernels(interpret: str, timeout: int) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    check_kernels("1", 300)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_a_gpu():
    check_kernels("0", 600)


BREAKS = """
import sys
sys.path.insert(0, sys.argv[1])
import check_kernels

def check_one():
    raise RuntimeError("an illegal instruction")

def check_other():
    print("the other ran")

check_kernels.CHECKS = (check_one, check_other)
check_kernels.main()
"""


@pytest.mark.slow
def test_a_check_that_fails_hides_none_after_it():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", BREAKS, SCRIPT.parent]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the other ran" in done.stdout
    assert "RuntimeError: an illegal instruction" in done.stderr
    assert done.stderr.endswith("check_kernels: these do not hold: check_one\n")


# Of what the tests use, packages that a machine with torch, Triton and transformers need not have
FEW = """
import sys
sys.modules.update(dict.fromkeys(["pydantic", "snakemake", "gguf", "datasets", "faiss"]))
import pytest
sys.exit(pytest.main(["-q", "-m", "gpu", "--collect-only", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_the_tests_for_a_gpu_need_few_packages():
    """As docs/gpu.md runs them: with a module that cannot be imported none would run."""
    files = [path for path in sorted(SCRIPT.parents[1].glob("unit/*.py")) if "@pytest.mark.gpu" in path.read_text()]
    done = subprocess.run([sys.executable, "-c", FEW, *files], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(files) == 3
