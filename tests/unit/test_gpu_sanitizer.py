"""The memory checker of the interpreter finds planted faults, and none where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = """
import interpreter, sanitizer, torch, triton, triton.language as tl
interpreter.prepare()

@triton.jit
def sound_kernel(x, out, total, n, BN: tl.constexpr):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    here = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out + at, here, mask=at < n)
    tl.debug_barrier()
    tl.store(x + at, tl.load(out + at, mask=at < n, other=0.0) + 1.0, mask=at < n)
    tl.atomic_add(total, tl.sum(here))

@triton.jit
def outside_kernel(x, out, total, n, BN: tl.constexpr):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(out + at, tl.load(x + at, mask=at <= n, other=0.0), mask=at < n)

@triton.jit
def unwritten_kernel(x, out, total, n, BN: tl.constexpr):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(x + at, tl.load(out + at, mask=at < n, other=0.0), mask=at < n)

@triton.jit
def together_kernel(x, out, total, n, BN: tl.constexpr):
    tl.store(total, tl.load(total) + tl.load(x + tl.program_id(0)))

@triton.jit
def neighbours_kernel(x, out, total, n, BN: tl.constexpr):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    beside = tl.load(x + at + 1, mask=at + 1 < n, other=0.0)
    tl.store(x + at, beside, mask=at < n)

@triton.jit
def added_kernel(x, out, total, n, BN: tl.constexpr):
    tl.atomic_add(total, 1.0)
    tl.store(out + tl.program_id(0), tl.load(total))

@triton.jit
def unfenced_kernel(x, out, total, n, BN: tl.constexpr):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)
    tl.store(out + at, 2.0 * tl.load(out + at, mask=at < n, other=0.0), mask=at < n)

@triton.jit
def twice_kernel(x, out, total, n, BN: tl.constexpr):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(out + at // 2, at.to(tl.float32), mask=at < n)

for kernel in KERNELS:
    with sanitizer.watched() as found:
        x, out, total = torch.ones(40), torch.empty(40), torch.zeros(1)
        globals()[kernel][(3,)](x, out, total, 40, BN=16)
    print(*[fault.partition(": ")[2] for fault in found.faults], sep=";")
"""
FAULTS = {
    "sound_kernel": "",
    "outside_kernel": "load outside the tensors",
    "unwritten_kernel": "load of memory that nothing has written",
    "together_kernel": "load of an element that another program touches;store of an element that another program "
    "touches;store to an element loaded since the last barrier",
    "neighbours_kernel": "store of an element that another program touches;"
    "store to an element loaded since the last barrier",
    "added_kernel": "load of an element that another program touches;add of an element that another program touches",
    "unfenced_kernel": "load of an element stored since the last barrier;store of an element stored since the last "
    "barrier;store to an element loaded since the last barrier",
    "twice_kernel": "store of two values to one element",
}


def test_faults_that_the_interpreter_hides_are_found(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(KERNELS.replace("KERNELS", repr(tuple(FAULTS))))
    tools = str(Path(__file__).parents[1] / "gpu")
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((tools, *sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [set(line.split(";")) for line in done.stdout.split("\n")[:-1]] == [
        set(faults.split(";")) for faults in FAULTS.values()
    ]
