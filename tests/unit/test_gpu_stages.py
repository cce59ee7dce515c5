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
    assert [row["stage"] for row in found if row["what"] == "finished"] == [0, 4, 5, 7, 3, 1, 2, 6]
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["commit"] == "abc"
    assert all(value > 0 for value in machine["ceilings"].values())
    assert all(row["holds"] for row in found if "holds" in row)
    errors = [row["error"] for row in found if "error" in row]
    assert errors
    assert max(errors) < 0.1
    exact = [row["times"] for row in found if row["stage"] == 3 and "times" in row]
    assert all(one["seconds"] > 0 and one["host_seconds"] > 0 for times in exact for one in times.values())
    # The choices that a GPU settles: each side is timed, and those that change the answer have its error.
    settled = [row for row in found if "compared" in row]
    assert [list(row["compared"]) for row in settled[1:]] == [["call", "graph", "copies"], ["with", "without"]]
    assert len(settled[0]["compared"]) == 7
    assert all(side["seconds"] > 0 for row in settled for side in row["compared"].values())
    assert all(gap < 0.1 for gap in settled[0]["errors"].values())
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
    for stage in (1, 5):
        stages.STAGES[stage](stages.Rows(tmp_path / "rows.jsonl", stage), stages.SMALL, SimpleNamespace(interpret=True))
    assert not any(row["holds"] for row in rows(tmp_path))
    reasons = ["RuntimeError: an illegal instruction", *["InterruptedError: the rest of the stage"] * 11]
    assert [row["reason"] for row in rows(tmp_path)] == reasons
    names = [row["what"] for row in rows(tmp_path) if row["stage"] == 5]
    assert names[:4] == ["local-expansion d_v=1", "local-expansion d_v=16", "approxkmv d_v=1", "profile"]


def test_ceilings(monkeypatch):
    """A copy reads and writes 4 bytes a number; a product multiplies and adds."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu as stages

    seconds = {"copy": 0.5, "bfloat16 product": 0.25, "float32 product": 4.0, "graph": 2e-4}
    found = stages.ceilings_of(seconds, 10, 200)
    assert list(found.values()) == pytest.approx([1600.0, 8000.0, 500.0, 1e-6])


def test_a_setting_whose_rows_are_made_exactly_is_not_the_last(tmp_path, monkeypatch):
    """A broken kernel whose rows are all lost errs by nothing; the settings after it would not be measured."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu as stages

    from approxkmv.compute.counting import count

    lost, grid = iter([190, 0, 0]), [{"block": 32, "near": near} for near in (8, 16, 32)]

    def compute(q, k, v, **_):
        count(recomputed_rows=next(lost))
        return v

    method = SimpleNamespace(grid=grid, parameters=lambda setting: setting, compute=compute)
    exact = SimpleNamespace(compute=lambda *_, **__: None)
    found = {"local-expansion": method, "exact-sdpa": exact, "exact-fused": lambda q, k, v: v.bfloat16()}
    monkeypatch.setattr("approxkmv.attention.get", found.__getitem__)
    monkeypatch.setattr(stages, "timed", lambda *_: {})
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    out = stages.Rows(tmp_path / "rows.jsonl", 5)
    stages.settings_of("local-expansion", 1, out, stages.SMALL, SimpleNamespace(interpret=False))
    assert [(row["error"] < 1e-6, row["recomputed_rows"]) for row in rows(tmp_path)] == [(True, 190), (True, 0)]


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
        *(
            (2, "bfloat16"),
            (4, "glove-paper"),
            (5, "local-expansion"),
            (5, "profile"),
            (5, "iterations"),
            (5, "copies"),
        ),
        *((6, "glove-sharp"), (6, "glove-split"), (7, "c"), (7, "attention_statistics")),
    }
    assert {row["reason"] for row in found if not row.get("holds", True)} == {"RuntimeError: an illegal instruction"}
    measured = {(row["stage"], row["what"].split(" ")[0]) for row in found} - set(broken)
    assert measured == {(2, "float32"), (5, "approxkmv"), (5, "near"), (7, "length_statistics")}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """benchmarks/gpu_tables.py with no results yet."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_tables

    monkeypatch.setattr(gpu_tables, "FOLDER", tmp_path)
    (tmp_path / "machine.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA H100 80GB HBM3"}}))
    return gpu_tables


def of_long(setting, seconds=0.001, exact=0.01, **others):
    """A row of stage 5 of local-expansion."""
    row = {"stage": 5, "what": f"local-expansion d_v=1 {setting}", "n": 131072, "error": 0.1, "error_of_answer": 0.2}
    return {**row, "times": {"ours": {"seconds": seconds}, "exact-sdpa": {"seconds": exact}}, **others}


def cells(table):
    """The cells of the rows of a Markdown table."""
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:] if line.startswith("|")]


def test_tables_leave_out_what_was_not_timed(tables):
    ours, sdpa = {"seconds": 0.001}, {"exact-sdpa": {"seconds": 0.01}}
    found = [
        {"stage": 3, "what": tables._FIGURE, "holds": False, "reason": "RuntimeError: an illegal instruction"},
        {"stage": 5, "what": "local-expansion d_v=64", "holds": False, "reason": "RuntimeError: a broken reference"},
        of_long('{"block": 512, "near": 64}', times={"exact-sdpa": {"reason": ""}, "ours": ours}),
        of_long('{"near": 2}'),
        {"stage": 5, "what": "copies of a graph's inputs", "compared": {"a call": ours}},
        {"stage": 7, "what": "c and order ratios n=131072", "holds": False, "reason": "an illegal instruction"},
        # Of the exact methods only one ran: it stands for no other.
        {"stage": 3, "what": "n=131072 batch=1 d=64 d_v=1 bfloat16", "times": sdpa},
    ]
    tables._write_rows("earlier", [])
    tables._write_rows("rows", found)
    ends = [line[-1] for line in cells(tables.predicted())]
    assert ends == [*["–"] * 3, "10", "–", "1", *["–"] * 3]
    assert tables.long().count('`{"near": 2}` | 1 | 10 |') == len(tables.TARGETS)
    assert "block" not in tables.long()
    assert tables.statistics() == tables._NOT_YET
    # No case of a sweep ended, and no kernel was compared at the longest length.
    (tables.FOLDER / "tables").mkdir()
    (tables.FOLDER / "tables" / "sweep.json").write_text("of an earlier run")
    tables.collect_sweeps([], [])
    assert not (tables.FOLDER / "tables" / "sweep.json").exists()
    assert tables.figure5() == tables._NOT_YET
    assert tables.checks().startswith("Of 3 checks 0 hold")
    assert "err by" not in tables.checks()


def test_a_folder_without_a_machine_is_one_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    command = [sys.executable, str(SCRIPT.with_name("gpu_tables.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"gpu_tables.py: error: {tmp_path} has no machine.json: run ")


def test_tables_of_a_command_that_was_killed(tables, tmp_path):
    """A last row that was cut off is none; a stage without an end is named, and a length without seconds has a dash."""
    ends = [{"stage": stage, "what": "finished", "seconds": 60.0} for stage in (0, 4, 5, 7)]
    found = [
        *ends,
        {"stage": 7, "what": "c and order ratios n=32768", "seconds": 0.5},
        {"stage": 7, "what": "length_statistics n=16384", "seconds": 0.25},
        {"stage": 7, "what": "length_statistics n=32768", "cut": True},
    ]
    out = tmp_path / "out"
    out.mkdir()
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found) + '{"stage": 6, "rows": [{"wor')
    names = ("copy_bytes_per_second", "bfloat16_flops", "float32_flops", "seconds_per_graph_node")
    machine = dict.fromkeys(("gpu", "torch", "triton", "numpy"), "some")
    given = {"machine": machine, "ceilings": dict.fromkeys(names, 1.0), "commit": "abc"}
    (out / "machine.json").write_text(json.dumps(given))
    tables.collect(out, None)
    assert "not finished: stages 1, 2, 3, 6; the others together 4.0 minutes" in tables.about()
    assert cells(tables.statistics()) == [["c and order ratios", "–", "0.5"], ["length_statistics", "0.25", "–"]]


def test_times_before_and_after_name_their_gpu(tables):
    """The earlier code's was an H200; this one's is whichever was lent."""
    setting = 'local-expansion {"block": 512, "near": 64}'
    gpu = {"stage": 0, "what": "machine", "machine": {"gpu": "NVIDIA H200"}}
    earlier = {"stage": 5, "what": setting, "times": {setting: {"seconds": 0.004}, "exact-sdpa": {"seconds": 1.0}}}
    tables._write_rows("earlier", [gpu, earlier])
    tables._write_rows("rows", [of_long('{"block": 512, "near": 64}')])
    names = tables.predicted().splitlines()[0].strip("| ").split(" | ")
    assert names[2:] == ["H200, that code, ms", "H100, fused form, ms"]
    assert cells(tables.predicted())[5][2:] == ["4", "1"]


def test_the_long_table_has_the_fastest_setting_whose_own_rows_reach_an_error(tables):
    rows = [
        of_long('{"near": 1}', 0.001, error=0.16),
        of_long('{"near": 2}', 0.002, error=0.12),
        of_long('{"near": 3}', 0.004, error=0.08),
        of_long('{"near": 4}', 0.003, error=0.09, recomputed_rows=1000),
        # Nearly all of its rows were made again, exactly.
        of_long('{"near": 5}', 0.0005, error=0.001, recomputed_rows=100_000),
    ]
    tables._write_rows("rows", rows)
    found = cells(tables.long())
    assert [line[2:] for line in found] == [
        ["0.15", "0.12", "0.2", '`{"near": 2}`', "2", "5"],
        ["0.1", "0.09", "0.2", '`{"near": 4}`', "3", "3.3"],
        ["0.05", "0.08 (not reached)", "0.2", '`{"near": 3}`', "4", "2.5"],
    ]


def of_sweep(method, target=None, seconds="0.001", **others):
    """A row of a case's table, as csv reads it."""
    row = {"workload": "glove-sharp", "n": "4096", "batch": "1", "method": method, "seconds": seconds}
    if target is None:
        return {**row, "kind": "exact", "status": "ok", **others}
    row |= {"kind": "approximate", "target": f"{target}", "relative_to": "values", "status": "ok", "reached": "yes"}
    return {**row, "error_v_p95": "0.04", "fastest_exact": "exact-sdpa", "times_faster": "0.5", **others}


def test_figure_5_without_what_could_not_run(tables):
    """A method that is unavailable has a row without target, of which nothing else is known."""
    exact = [of_sweep("exact-naive", seconds="0.02"), of_sweep("exact-sdpa", seconds="0.0005")]
    mean = [of_sweep("mean", target, error_v_p95="0.3") for target in tables.TARGETS]
    ours = [of_sweep("local-expansion", target) for target in tables.TARGETS]
    other = {"relative_to": "answer", "seconds": "7", "error_v_p95": "7"}
    swept = [*exact, *({**row, **other} for row in (*ours, *mean)), *ours, *mean]
    swept = [{**row, "tuning_inputs": "apart"} for row in swept]
    right = ["`glove-sharp`, batch 1", "4,096", "0.15", "0.5 (`exact-sdpa`)", "0.3", "0.04", "1", "0.5", "20"]
    tables.collect_sweeps(swept, [])
    assert cells(tables.figure5())[0] == right
    assert [line[2] for line in cells(tables.figure5())] == ["0.15", "0.1", "0.05"]
    assert "\\*" not in tables.figure5()
    tables.collect_sweeps([{**row, "tuning_inputs": "shared"} for row in swept], [])
    assert cells(tables.figure5())[0] == [right[0], "4,096*", *right[2:]]
    assert "tuned on words that are also measured" in tables.figure5()
    gone = {"kind": "approximate", "status": "unavailable", "seconds": ""}
    tables.collect_sweeps([*exact, *mean, of_sweep("local-expansion", **gone)], [])
    assert cells(tables.figure5())[0] == [*right[:3], "0.5 (`exact-sdpa`)", "0.3", "–", "–", "–", "–"]
    tables.collect_sweeps([exact[1], of_sweep("mean", **gone), of_sweep("exact-naive", **gone), *ours], [])
    assert cells(tables.figure5())[0] == [*right[:4], "–", *right[5:8], "–"]


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


def test_what_is_cut_off_twice_or_ends_its_process_is_not_tried_again(tmp_path, monkeypatch):
    """Once may be for the little time that a command had left."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu as stages

    path, names, ends = tmp_path / "rows.jsonl", ["slow", "crash", "good"], []

    def run(command, timeout, **_):
        of = stages.Rows(path, 5)
        for name in of.without(names):
            if name != "good" and ends:
                raise ends.pop(0)
            of.add(name)
        return SimpleNamespace(returncode=0)

    def in_process(*given, **options):
        try:
            return run(*given, **options)
        except SystemExit as crash:
            return SimpleNamespace(returncode=crash.code)

    monkeypatch.setattr(subprocess, "run", in_process)
    ends += [subprocess.TimeoutExpired("", 1), subprocess.TimeoutExpired("", 1), SystemExit(-11)]
    assert [stages.exit_code([], {}, path, 5, 60.0) for _ in range(3)] == [None, None, 0]
    found = [(row["what"], row.get("cut"), row.get("holds"), row.get("reason", "")) for row in rows(tmp_path)]
    assert found[0] == ("slow", True, None, "")
    assert found[1] == ("slow", None, False, stages.CUT)
    assert found[2] == ("crash", None, False, "its process ended with code -11")
    assert found[3:] == [("good", None, None, "")]
    assert not list(tmp_path.glob("begun*"))
    # A command that was killed as a whole
    (tmp_path / "begun-5").write_text("other")
    assert stages.exit_code([], {}, path, 5, 60.0) == 0
    assert rows(tmp_path)[-1]["what"] == "other"
    assert rows(tmp_path)[-1]["cut"]


def test_a_relative_folder_is_where_the_command_runs(tmp_path, monkeypatch):
    """The stages' processes run in the checkout."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu as stages

    commands = []
    monkeypatch.setattr(stages, "exit_code", lambda command, *_: commands.append(command) or 0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "of rows", "--stages", "7", "--interpret"])
    monkeypatch.chdir(tmp_path)
    assert stages.main() == 0
    assert str(tmp_path / "of rows") in commands[0]


def test_what_decides_comes_first_and_a_stage_that_the_minutes_end_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu as stages

    began = []
    # In the interpreter five times as long
    monkeypatch.setattr(stages, "LIMITS", dict.fromkeys(range(8), 10))
    monkeypatch.setattr(stages.time, "monotonic", lambda: sum(seconds for _, seconds in began))
    monkeypatch.setattr(stages, "exit_code", lambda *given: began.append(given[-2:]) or (None if given[-2] else 0))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--interpret", "--minutes", "2.4"])
    assert stages.main() == 1
    assert began == [(0, 50), (4, 50), (5, 44)]
    lines = ["stage 4 ran out of its time", "stages [5, 7, 3, 1, 2, 6] do not fit into this command: run it again"]
    assert capsys.readouterr().err.splitlines() == [f"gpu: {line}" for line in lines]


def test_a_stage_that_would_only_start_waits(tmp_path):
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
