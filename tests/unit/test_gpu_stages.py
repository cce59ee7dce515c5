"""benchmarks/gpu.py on a CPU: every stage runs, finished ones are skipped, and time that is too short is not begun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def gpu(out, *words):
    command = [sys.executable, SCRIPT, "--out", out, *words]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1300, check=False)


def rows(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_every_stage_in_the_interpreter(tmp_path):
    done = gpu(tmp_path, "--interpret", "--minutes", "22", "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path)
    assert [row["stage"] for row in found if row["what"] == "finished"] == list(range(8))
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["commit"] == "abc"
    assert all(value > 0 for value in machine["ceilings"].values())
    assert all(row["holds"] for row in found if "holds" in row)
    errors = [row["error"] for row in found if "error" in row]
    assert errors
    assert max(errors) < 0.1
    exact = [row["times"] for row in found if row["stage"] == 3 and "times" in row]
    assert all(one["seconds"] > 0 and one["host_seconds"] > 0 for times in exact for one in times.values())
    swept = [row for one in found if one["stage"] in (4, 6) for row in one.get("rows", ())]
    assert swept
    assert {row["status"] for row in swept} <= {"ok", "unreached"}
    # A second command with these rows has nothing to do; one with a cut-off row does that again.
    assert gpu(tmp_path, "--interpret").returncode == 0
    assert rows(tmp_path) == found
    kept = [row for row in found if row["stage"] != 7]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"stage": 7, "wh')
    assert gpu(tmp_path, "--interpret").returncode == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(found) + 1
    # A check that does not hold is told at the end, and rows of other code are refused.
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*found, {**found[1], "holds": False}])
    )
    done = gpu(tmp_path, "--interpret")
    assert (done.returncode, done.stderr) == (1, f"gpu: these checks do not hold: {found[1]['what']}\n")
    for other in ({**found[0], "code": "other"}, {key: found[0][key] for key in ("stage", "what")}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(other) + "\n")
        done = gpu(tmp_path, "--interpret")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "rows that other code made" in done.stderr


def test_a_check_that_fails_in_any_way_has_its_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT.parents[1] / "tests" / "gpu")
    import check_kernels
    import gpu as stages

    def breaks():
        raise RuntimeError("an illegal instruction")

    def stops(*sizes):
        raise InterruptedError("the rest of the stage")

    breaks.__name__ = "check_tiles"
    monkeypatch.setattr(check_kernels, "check_tiles", breaks)
    monkeypatch.setattr(check_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(stages, "heads", stops)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stages.kernels(stages.Rows(tmp_path / "rows.jsonl", 1), stages.SMALL, SimpleNamespace(interpret=True))
    assert not any(row["holds"] for row in rows(tmp_path))
    reasons = ["RuntimeError: an illegal instruction", *["InterruptedError: the rest of the stage"] * 4]
    assert [row["reason"] for row in rows(tmp_path)] == reasons


BREAKS = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = sys.argv[2:]
import gpu, mock_cuda, torch
mock_cuda.install()
from approxkmv.attention.blocks.cuda import fused
from approxkmv.statistics import largest_cuda

def breaks(*_, **__):
    raise RuntimeError("an illegal instruction")

fused.steps = largest_cuda.largest_of = gpu.swept = breaks
given = SimpleNamespace(out=Path(sys.argv[1]), interpret=True, commit=None)
with torch.inference_mode():
    for stage in (2, 4, 5, 6, 7):
        gpu.STAGES[stage](gpu.Rows(given.out / "rows.jsonl", stage), gpu.SMALL, given)
"""


def test_what_breaks_has_its_row_and_the_rest_is_measured(tmp_path):
    folders = SCRIPT.parent, SCRIPT.parents[1] / "tests" / "gpu"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", BREAKS, tmp_path, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    broken = [(row["stage"], row["what"].split(" ")[0]) for row in found if not row.get("holds", True)]
    assert set(broken) == {
        *((2, "bfloat16"), (4, "glove-paper"), (5, "local-expansion"), (5, "profile")),
        *((6, "glove-sharp"), (6, "glove-split"), (7, "c"), (7, "attention_statistics")),
    }
    assert {row["reason"] for row in found if not row.get("holds", True)} == {"RuntimeError: an illegal instruction"}
    measured = {(row["stage"], row["what"].split(" ")[0]) for row in found} - set(broken)
    assert measured == {(2, "float32"), (5, "approxkmv"), (7, "length_statistics")}


def test_tables_leave_out_what_was_not_timed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_tables

    ours = {"seconds": 0.001}
    long = {
        "stage": 5,
        "error": 0.1,
        "error_of_answer": 0.2,
        "what": 'local-expansion d_v=1 {"block": 512, "near": 64}',
    }
    found = [
        {"stage": 3, "what": gpu_tables._FIGURE, "holds": False, "reason": "RuntimeError: an illegal instruction"},
        {**long, "times": {"exact-sdpa": {"reason": ""}, "ours": ours}},
        {**long, "what": 'local-expansion d_v=1 {"near": 2}', "times": {"ours": ours, "exact-sdpa": {"seconds": 0.01}}},
        {"stage": 7, "what": "c and order ratios n=131072", "holds": False, "reason": "an illegal instruction"},
    ]
    monkeypatch.setattr(gpu_tables, "FOLDER", tmp_path)
    gpu_tables._write_rows("earlier", [])
    gpu_tables._write_rows("rows", found)
    ends = [line.split(" | ")[-1] for line in gpu_tables.predicted().splitlines()[2:]]
    assert ends == [*["– |"] * 5, "1 |", *["– |"] * 3]
    assert gpu_tables.long().count('`{"near": 2}` | 1 | 10 |') == len(gpu_tables.TARGETS)
    assert "block" not in gpu_tables.long()
    assert gpu_tables.statistics() == gpu_tables._NOT_YET


def test_a_stage_that_broke_goes_on_where_it_got_further(tmp_path, monkeypatch):
    """An error of the device stays until its process ends; a stage that gets no further is not begun for ever."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu as stages

    path, limits = tmp_path / "rows.jsonl", []

    def run(command, timeout, **_):
        limits.append(timeout)
        if len(limits) < 3:
            stages.Rows(path, 1).add(f"check {len(limits)}", holds=False)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    assert stages.exit_code([], {}, path, 1, 60.0) == 1
    assert [row["what"] for row in rows(tmp_path)] == ["check 1", "check 2"]
    assert len(limits) == 3
    assert 0 < limits[2] <= limits[1] <= limits[0] <= 60


def test_a_stage_that_may_not_end_in_time_waits(tmp_path):
    done = gpu(tmp_path, "--interpret", "--minutes", "0.5")
    assert done.returncode == 3
    assert "do not fit into this command" in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_so(tmp_path):
    done = gpu(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--interpret" in done.stderr
