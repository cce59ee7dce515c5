"""The CUDA path from the command down, on the device of tests/gpu/mock_cuda.py: a wrong call to torch.cuda fails here.

Triton's interpreter must be selected before its first import, so each test is a process.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

MOCK = Path(__file__).parents[1] / "gpu" / "mock_cuda.py"


def in_mock(*arguments, timeout=500):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{MOCK.parent}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


METHODS = ("exact-naive", "exact-sdpa", "exact-fused", "mean", "uniform", "own-key", "hyperattention", "kdeformer")
OURS = {"approxkmv": {"block": 32, "near": 16, "samples": 8}, "local-expansion": {"block": 32, "near": 16}}


def test_a_sweep_from_the_command_down(tmp_path):
    settings = {
        "device": "cuda",
        "dtype": "bfloat16",
        "methods": [*METHODS, *OURS],
        "targets": [0.9],
        "repeats": 2,
        "warmups": 1,
        "inputs": 1,
        "tuning_seeds": [9],
        "seeds": [0],
        "parameters": {"kdeformer": [{}], "hyperattention": [{}], **{name: [given] for name, given in OURS.items()}},
        "workloads": [{"name": "glove-sharp", "lengths": [96], "batches": [2]}],
    }
    given, table = tmp_path / "settings.json", tmp_path / "table.csv"
    given.write_text(json.dumps(settings))
    done = in_mock(MOCK, "approxkmv.sweep", "--settings", given, "--out", table)
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*METHODS, *OURS}
    # A graph that is recorded while it is timed makes its row unavailable.
    assert {row["status"] for name, row in rows.items() if not name.startswith("approxkmv")} == {"ok"}, rows
    assert rows["approxkmv"]["status"] in ("ok", "unreached")
    assert all(float(row["seconds"]) > 0 and float(row["host_seconds"]) > 0 for row in rows.values())
    # bfloat16 keeps 8 bits.
    assert all(float(rows[name]["error_v_mean"]) < 4e-3 for name in METHODS[:3])
    assert [rows[name]["precision"] for name in METHODS[:3]] == ["float32", "bfloat16", "bfloat16"]
    assert {float(rows[name]["kernel_evaluations"]) for name in METHODS[:3]} == {2 * 96**2}
    assert json.loads(table.with_suffix(".json").read_text())["machine"]["gpu"] == "a CPU named cuda"


WRONG = {
    "torch.cuda.set_device(torch.device('cuda'))": ValueError,
    "torch.cuda.synchronize(device=1, wait=True)": TypeError,
    "torch.cuda.Event(timing=True)": TypeError,
    "torch.cuda.get_device_name('cuda', 1)": TypeError,
    "torch.cuda.mem_get_info(0, 1)": TypeError,
    "there + here": RuntimeError,
    "there.numpy()": TypeError,
    "torch.rand(2, device='cuda', generator=torch.Generator())": RuntimeError,
    "kernel[(1,)](here)": ValueError,
    "kernel[(1, 70_000)](there)": RuntimeError,
    "recorded(lambda: bool(there.any()))": RuntimeError,
    "recorded(lambda: there[there > 0])": RuntimeError,
    "recorded(lambda: torch.tensor([1.0], device='cuda'))": RuntimeError,
    "recorded(lambda: there.cpu())": RuntimeError,
}
SCRIPT = """
import sys, mock_cuda, torch, triton
mock_cuda.install()

@triton.jit
def kernel(pointer):
    pass

here, there = torch.ones(3), torch.ones(3, device="cuda")

def recorded(work):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph, found

for wrong in sys.argv[1:]:
    try:
        eval(wrong)
    except Exception as error:
        print(type(error).__name__)
    else:
        print("nothing")
graph, found = recorded(lambda: (there * 2).add_(1))
there.fill_(5)
graph.replay()
assert found.tolist() == [11.0] * 3 and found.device == there.device == torch.device("cuda:0")
"""


def test_what_a_gpu_refuses_the_mock_refuses(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(SCRIPT)
    done = in_mock(script, *WRONG)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [error.__name__ for error in WRONG.values()]


STATISTICS = """
import mock_cuda, sanitizer, torch
from approxkmv import attention_statistics
from approxkmv.statistics.largest import Largest
from approxkmv.statistics.streaming import length_statistics
mock_cuda.install()
from approxkmv.statistics import largest_cuda

generator = torch.Generator().manual_seed(0)
launched = []
for n, d, size in ((150, 64, 1.0), (190, 100, 1.5), (131, 20, 3.0), (140, 16, 0.0)):
    q, k = (size * torch.randn(n, d, generator=generator) for _ in range(2))
    right = length_statistics(q, k)[0][0]
    before = mock_cuda.MODE.launches
    with sanitizer.watched() as watch:
        found = attention_statistics(q.to("cuda"), k.to("cuda"))
        assert found.ratio > 0
    assert watch.accesses and not watch.faults, watch.faults
    gaps = float(found.ratio) / right.ratio - 1, float(found.softmax_ratio) / right.softmax_ratio - 1
    # Which of n^2 equal entries is where does not matter.
    orders = float(found.log_next) - right.log_next, float(found.log_double) - right.log_double
    print(n, d, size, *gaps, *orders, mock_cuda.MODE.launches - before)
    assert max(map(abs, gaps)) < 1e-6
    assert max(map(abs, orders)) < 1e-6
    assert mock_cuda.MODE.launches > before
    everything = length_statistics(q.to("cuda"), k.to("cuda"))[0][0]
    assert abs(everything.ratio / right.ratio - 1) < 1e-6
    assert everything.mean_keys == right.mean_keys or size == 0.0
    own = attention_statistics(q, k)
    for name in ("entropy", "largest_weight", "first_mass", "keys_per_share", "column_norm", "stable_rank"):
        here, there = getattr(own, name), getattr(found, name).cpu()
        assert torch.allclose(here.double(), there.double(), rtol=1e-5, atol=1e-5), name

# Wider than a chip holds
before, wide = mock_cuda.MODE.launches, torch.randn(140, 260, generator=generator)
right, found = (float(attention_statistics(one, one).ratio) for one in (wide, wide.to("cuda")))
assert abs(found / right - 1) < 1e-6
assert mock_cuda.MODE.launches == before

def compared(q, k, scale, terms):
    right = Largest(len(k), torch.device("cpu"))
    right.add_strip(torch.addmm(terms[:, None], q.double(), k.double().mT, alpha=scale))
    found = largest_cuda.largest_of(q.to("cuda"), k.to("cuda"), scale, terms.to("cuda"))
    (ratio, *logs), (right, *right_logs) = found.finish(), right.finish()
    print(ratio / right - 1, [x - y for x, y in zip(logs, right_logs)])
    assert abs(ratio / right - 1) < 1e-6
    assert max(abs(x - y) for x, y in zip(logs, right_logs)) < 1e-6

q, k = (torch.randn(150, 16, generator=generator) for _ in range(2))
q[:, 15] = k[:, 15] = 100.3
compared(q, k, 0.25, q[:, 0].double())
rising = torch.arange(100)
sides = 0.97 - 1.94 * (rising % 2)
compared(torch.full((100, 16), 1.01), sides[:, None].expand(-1, 16), 64.0, 1e-3 * rising.double())
"""


def test_statistics_are_those_of_the_cpu(tmp_path):
    """c, order ratios and softmax c by the kernel, to 1e-6 of the CPU's float64, also where all entries are equal.

    Also where all queries and keys share a long part, and where each row's entries, of logits of 1,000, exceed those of
    all rows before by so little that the kernel's rounding hides it.
    """
    script = tmp_path / "compare.py"
    script.write_text(STATISTICS)
    done = in_mock(script)
    assert done.returncode == 0, done.stdout + done.stderr


GRAPHS = """
import mock_cuda
mock_cuda.install()
import check_kernels
check_kernels.DEVICE = "cuda"
check_kernels.check_graphs()
"""


def test_the_check_that_only_a_gpu_runs_holds(tmp_path):
    """Otherwise it would be wrong there first."""
    script = tmp_path / "graphs.py"
    script.write_text(GRAPHS)
    done = in_mock(script)
    assert done.returncode == 0, done.stdout + done.stderr
