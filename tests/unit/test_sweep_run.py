"""A small sweep from end to end: its table, its record, its figures, and what happens when something is wrong."""

import csv
import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from approxkmv import partial
from approxkmv.attention.blocks import local_expansion as local_module
from approxkmv.attention.exact import fused as fused_module
from approxkmv.attention.exact import naive as naive_module
from approxkmv.compute import memory
from approxkmv.compute.counting import count
from approxkmv.errors import BusyError, ConfigError, InputError, SourceError, TableError
from approxkmv.files import file_sha256, write_csv
from approxkmv.statistics import streaming
from approxkmv.sweep import SweepSettings, run_sweep
from approxkmv.sweep import inputs as inputs_module
from approxkmv.sweep import run as run_module
from approxkmv.sweep.table import COLUMNS, write_rows
from approxkmv.sweep.word_vectors import word_vectors
from approxkmv.sweep.workloads import PARTS, Case, cases, load, shares_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["exact-naive", "exact-fused", "mean", "own-key", "local-expansion", "approxkmv"]


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "vectors.npy"
    np.save(path, np.random.default_rng(0).normal(size=(1500, 10)).astype(np.float32))
    return path


def settings(vectors, **more):
    workload = {"name": "glove-split", "lengths": [150, 300], "path": str(vectors), **more.pop("workload", {})}
    return SweepSettings.from_mapping(
        {"workloads": [workload], "methods": METHODS, "targets": [0.2, 1e-9], "repeats": 2, "warmups": 1, **more}
    )


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_record(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(naive_module, "free_bytes", lambda device: 8 * 150 * 150)
    table = tmp_path / "out" / "sweep.csv"
    run_sweep(settings(vectors), table, {"commit": "abc"}, say=lambda line: None)
    rows = read(table)
    assert list(rows[0]) == list(COLUMNS)
    by = {(r["method"], r["n"], r["target"]): r for r in rows}
    assert by["exact-naive", "150", ""]["status"] == "ok"
    assert by["exact-naive", "300", ""]["status"] == "unavailable"
    assert "stores the 300 x 300 matrix" in by["exact-naive", "300", ""]["reason"]
    assert by["mean", "300", "1e-09"]["status"] == "unreached"
    assert "the best has" in by["mean", "300", "1e-09"]["reason"]
    assert float(by["exact-fused", "300", ""]["error_v_median"]) < 1e-5
    # Near keys more than there are: both go over to the exact product and reach any target that rounding allows.
    row = by["local-expansion", "300", "0.2"]
    assert row["status"] == "ok"
    assert row["held"] == ("yes" if float(row["error_v_mean"]) <= 0.2 else "no")
    assert row["tuning_inputs"] == "apart"
    assert float(row["seconds_q1"]) <= float(row["seconds"]) <= float(row["seconds_q3"])
    record = json.loads(table.with_suffix(".json").read_text())
    assert record["provenance"] == {"commit": "abc"}
    assert record["settings"]["targets"] == [0.2, 1e-9]
    assert record["machine"]["torch"] == torch.__version__
    assert all(c["reference_error"] < 1e-5 for c in record["reference"]["error_against_float64"])
    tables = ["sweep.csv", "sweep.csv.sha256", "sweep.json", "sweep_exponents.csv", "sweep_exponents.csv.sha256"]
    assert [p.name for p in sorted(table.parent.iterdir())] == tables


def test_head_to_tail_is_that_of_the_kernel_and_shared_inputs_are_said(vectors, tmp_path):
    pytest.importorskip("numba")
    from approxkmv import head_to_tail_ratios

    asked = settings(vectors, methods=["exact-fused"], workload={"name": "glove-sharp", "lengths": [150, 1000]})
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    short, long = read(tmp_path / "sweep.csv")
    p = load(Case(asked.workloads[0], 150, 1, "one"), "evaluation", 0)
    assert p.scale == pytest.approx(1.0)
    right = float(head_to_tail_ratios(p.q[0], p.k[0], 150, p.scale)[-1])
    assert float(short["head_to_tail"]) == pytest.approx(right, rel=1e-6)
    # Of 1,500 rows no two sets of 1,000 are apart.
    assert (short["tuning_inputs"], long["tuning_inputs"]) == ("apart", "shared")


def test_a_row_that_runs_out_of_memory_later_leaves_the_others(vectors, tmp_path, monkeypatch):
    calls = []

    def only_while_tuning(q, k, v, *, scale, seed):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError
        return v.mean(1, keepdim=True).expand(-1, q.shape[1], -1)

    monkeypatch.setattr(naive_module, "method", replace(naive_module.method, compute=only_while_tuning))
    asked = settings(vectors, methods=["exact-naive", "exact-fused"], workload={"lengths": [150]})
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    naive, fused = read(tmp_path / "sweep.csv")
    assert (naive["status"], naive["seconds"]) == ("unavailable", "")
    assert "out of memory" in naive["reason"]
    assert fused["status"] == "ok"


def test_a_case_that_does_not_fit_into_memory_leaves_the_others(vectors, tmp_path, monkeypatch):
    right = inputs_module.load

    def load_little(case, *words, **more):
        if case.n == 150:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return right(case, *words, **more)

    monkeypatch.setattr(inputs_module, "load", load_little)
    run_sweep(settings(vectors, methods=["exact-fused", "mean"]), tmp_path / "sweep.csv", {}, say=lambda line: None)
    by = {(r["method"], r["n"]): r for r in read(tmp_path / "sweep.csv")}
    assert {r["status"] for r in by.values() if r["n"] == "150"} == {"unavailable"}
    assert "exact answer runs out of memory" in by["mean", "150"]["reason"]
    assert by["exact-fused", "300"]["status"] == "ok"


def test_errors_against_a_wrong_exact_answer_are_not_reported(vectors, tmp_path, monkeypatch):
    right = fused_module.method
    # By a thousandth of the values' deviation, 1
    monkeypatch.setattr(fused_module, "method", replace(right, compute=lambda *x, **y: right.compute(*x, **y) + 1e-3))
    asked = settings(vectors, methods=["mean"], workload={"lengths": [600]})
    # On 256 of its rows, relative to as many of the values
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    (row,) = read(tmp_path / "sweep.csv")
    assert (row["status"], row["error_v_mean"]) == ("unavailable", "")
    assert "the exact answer errs by 0.0009" in row["reason"]


def test_c_is_left_out_where_numba_does_not_work(vectors, tmp_path, monkeypatch):
    def broken(*_):
        raise SystemError("initialization of _internal failed without raising an exception")

    monkeypatch.setattr(streaming, "length_statistics", broken)
    monkeypatch.setattr(inputs_module, "numba_works", lambda: True)
    said = []
    asked = settings(vectors, methods=["mean"], targets=[0.9], workload={"lengths": [150]})
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=said.append)
    (row,) = read(tmp_path / "sweep.csv")
    assert (row["status"], row["head_to_tail"]) == ("ok", "")
    assert any("c is left out: initialization of" in line for line in said)


def test_rows_that_are_made_again_are_reported_and_refused(vectors, tmp_path, monkeypatch):
    """Local expansion at two settings, one of which reports that 40 % of its rows were recomputed."""
    right = local_module.method

    def repaired(q, k, v, *, block, **given):
        count(recomputed_rows=int(0.4 * q.shape[1]) if block == 16 else 0)
        return right.compute(q, k, v, block=block, **given)

    monkeypatch.setattr(local_module, "method", replace(right, compute=repaired))
    sets = [{"block": 16, "near": 64}, {"block": 8, "near": 64}]

    def rows_of(sets):
        asked = settings(
            vectors, methods=["exact-fused", "local-expansion"], targets=[0.9], workload={"lengths": [150]}
        )
        run_sweep(replace(asked, parameters={"local-expansion": sets}), tmp_path / "s.csv", {}, say=lambda line: None)
        return read(tmp_path / "s.csv")

    exact, tuned = rows_of(sets)
    assert exact["recomputed_share"] == "0.0"
    assert float(tuned["recomputed_share"]) <= 0.01
    assert (json.loads(tuned["parameters"])["block"], tuned["held"]) == (8, "yes")
    _, refused = rows_of(sets[:1])
    # Beside those of `repaired`, a few that are out of their block's reach
    assert (refused["status"], refused["held"]) == ("unreached", "no")
    assert 0.4 <= float(refused["recomputed_share"]) < 0.45
    assert "with 4" in refused["reason"]
    assert "% of its rows recomputed" in refused["reason"]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from approxkmv.sweep import SweepSettings, run_sweep

def say(line):
    print(line, flush=True)
    if sys.argv[3] and sys.argv[3] in line:
        os.kill(os.getpid(), signal.SIGKILL)

run_sweep(SweepSettings.from_mapping(json.loads(sys.argv[1])), Path(sys.argv[2]), {}, say)
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_after_its_last_whole_case(vectors, tmp_path):
    given = {"workloads": [{"name": "glove-split", "lengths": [100, 150, 200], "path": str(vectors)}], "threads": 1}
    given |= {"methods": ["exact-fused", "uniform"], "targets": [0.9], "repeats": 2}
    table, part = tmp_path / "sweep.csv", tmp_path / "sweep.csv.part"

    def run(settings, point=""):
        words = [sys.executable, "-c", KILLED, json.dumps(settings), str(table), point]
        done = subprocess.run(words, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    code, _ = run(given, "n=150")
    assert code == -signal.SIGKILL
    assert not table.exists()
    first = json.loads(part.read_text().splitlines()[1])
    assert {row["n"] for row in first["rows"]} == {100}
    # Killed again, in the third case: two are kept.
    code, said = run(given, "n=200")
    assert code == -signal.SIGKILL
    assert len(part.read_text().splitlines()) == 3
    # Other settings, of which nothing is kept.
    code, other = run({**given, "repeats": 3}, "n=100")
    assert other[0] == f"{part} is from a run with other settings: the run starts over"
    code, said = run(given)
    assert code == 0
    assert said[0] == f"the run resumes after the 2 finished by an earlier one, kept in {part}"
    assert not any("n=100" in line or "n=150" in line for line in said)
    rows = read(table)
    assert [(row["n"], row["method"]) for row in rows] == [
        (n, method) for n in ("100", "150", "200") for method in ("exact-fused", "uniform")
    ]
    # The very times of the first run, and exponents over all lengths.
    assert [row["seconds"] for row in rows[:2]] == [str(row["seconds"]) for row in first["rows"]]
    assert [row["error_v_mean"] for row in rows[:2]] == [str(row["error_v_mean"]) for row in first["rows"]]
    assert read(tmp_path / "sweep_exponents.csv")[0]["lengths"] == "[100, 150, 200]"
    record = json.loads(table.with_suffix(".json").read_text())
    assert [case["n"] for case in record["cases_of_earlier_runs"]] == [100, 150]
    assert record["seconds"] > first["seconds"] > 0
    assert [path.name for path in sorted(tmp_path.glob("*sweep*"))] == [
        "sweep.csv",
        "sweep.csv.sha256",
        "sweep.json",
        "sweep_exponents.csv",
        "sweep_exponents.csv.sha256",
    ]


def test_two_processes_never_write_one_table(tmp_path):
    output = tmp_path / "table.csv"
    stale = tmp_path / ".table.csv.4194305.part"
    stale.write_text("half")
    code = (
        f"from approxkmv.partial import PartialTable; PartialTable({str(output)!r}, {{}}, print); print(0, flush=True)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "0\n"
        assert not stale.exists()
        with pytest.raises(
            BusyError, match=f"that writes .*table.csv is under way already, by process {holder.pid} of"
        ):
            partial.PartialTable(output, {}, print)
    finally:
        holder.kill()
        holder.communicate()
    # The lock dies with its holder, and goes with the end of a run.
    partial.PartialTable(output, {}, print).remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", ["inputs", "machine", "code"])
def test_what_a_sweep_depends_on_makes_it_start_anew(vectors, tmp_path, monkeypatch, changed):
    asked = settings(vectors, methods=["mean"], targets=[0.9])

    def stop(line):
        if "n=300" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(asked, tmp_path / "sweep.csv", {}, say=stop)
    if changed == "inputs":
        np.save(vectors, np.load(vectors)[::-1])
        word_vectors.cache_clear()
    elif changed == "machine":
        monkeypatch.setattr(run_module, "machine", lambda device: {"processor": "another"})
    else:
        monkeypatch.setattr(partial, "digest_of", lambda files: "edited")
    said = []
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=said.append)
    assert said[0].endswith(f"is from a run with other {changed}: the run starts over")
    assert json.loads((tmp_path / "sweep.json").read_text())["cases_of_earlier_runs"] == []


def test_a_damaged_file_of_cases_is_not_believed(vectors, tmp_path):
    asked = settings(vectors, methods=["mean"], targets=[0.9], workload={"lengths": [150]})
    part = tmp_path / "sweep.csv.part"
    for content in ("", "{}\n", "[1]\n", "\x00", "[" * 200_000, '{"cases": 3}\n{"rows": []}\n'):
        part.write_text(content)
        said = []
        run_sweep(asked, tmp_path / "sweep.csv", {}, say=said.append)
        assert said[0] == f"{part} is damaged: the run starts over"
        assert len(read(tmp_path / "sweep.csv")) == 1


def test_word_vectors_have_the_hash_that_is_given(vectors, tmp_path):
    asked = {"methods": ["mean"], "targets": [0.9], "workload": {"lengths": [150], "sha256": file_sha256(vectors)}}
    run_sweep(settings(vectors, **asked), tmp_path / "sweep.csv", {}, say=lambda line: None)
    asked["workload"] = {"lengths": [150], "sha256": "0" * 64}
    with pytest.raises(SourceError, match=r"vectors\.npy has SHA-256"):
        run_sweep(settings(vectors, **asked), tmp_path / "other.csv", {}, say=lambda line: None)


def test_an_output_that_cannot_be_written_is_found_first(vectors, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken_exponents.csv").mkdir()
    (tmp_path / "hash.csv.sha256").mkdir()
    said = []
    for out in ("file/sweep.csv", "taken.csv", "hash.csv", "same.json", "n" * 250 + ".csv", "n" * 230 + ".csv"):
        with pytest.raises(TableError, match="cannot write") as caught:
            run_sweep(settings(vectors), tmp_path / out, {}, say=said.append)
        assert "\n" not in str(caught.value)
    assert said == []
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["file", "hash.csv.sha256", "taken_exponents.csv", "vectors.npy"]


def test_a_batch_larger_than_the_memory_is_a_row(vectors, tmp_path):
    asked = settings(vectors, methods=["mean"], workload={"lengths": [150], "batches": [10**9, 1]}, targets=[0.9])
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    huge, one = read(tmp_path / "sweep.csv")
    assert huge["status"] == "unavailable"
    assert "runs out of memory: one input takes" in huge["reason"]
    assert one["status"] == "ok"


def test_a_tilde_is_the_home_of_the_user(vectors, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(vectors.parent))
    asked = settings("~/vectors.npy", methods=["mean"], targets=[0.9], workload={"lengths": [150]})
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    assert read(tmp_path / "sweep.csv")[0]["status"] == "ok"


def test_every_case_is_checked_before_the_first_runs(vectors, tmp_path):
    said = []
    with pytest.raises(InputError, match="needs 1600 word vectors"):
        run_sweep(settings(vectors, workload={"lengths": [150, 800]}), tmp_path / "x.csv", {}, say=said.append)
    assert said == []


@pytest.mark.parametrize("group", ["", "job_7/step_0"])
@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_that_of_the_control_group_and_of_those_around_it(tmp_path, monkeypatch, version, group):
    own = tmp_path / "cgroup"
    own.write_text("9:cpu,pids:/elsewhere\n" + (f"4:memory:/{group}\n0::/\n" if version == 1 else f"0::/{group}\n"))
    groups = [(tmp_path / "v2", *memory._GROUPS[0][1:]), (tmp_path / "v1", *memory._GROUPS[1][1:])]
    monkeypatch.setattr(memory, "_GROUPS", groups)
    monkeypatch.setattr(memory, "_OWN", own)
    root, _, limit, usage, cache = groups[version == 1]

    def write(folder, most, used=1000, cached=0):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in ((limit, most), (usage, used), ("memory.stat", f"anon 3\n{cache} {cached}")):
            (folder / name).write_text(f"{value}\n")

    def free():
        return memory.free_bytes(torch.device("cpu"))

    with open("/proc/meminfo") as lines:
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    write(root / group, "max")
    assert free() == pytest.approx(available, rel=0.01)
    write(root / group, 5000)
    assert free() == 4000
    write(root / group, 5000, used=4900, cached=4100)
    assert free() == 4200
    (root / group / "memory.stat").unlink()
    assert free() == 100
    write(root / group, 5000)
    write((root / group).parent if group else root, 3000)
    assert free() == 2000
    write(root / "elsewhere", 1)
    assert free() == 2000


@pytest.mark.slow
def test_a_sweep_needs_torch_and_little_else(vectors, tmp_path):
    """The packages that a bare machine lacks cannot be imported; a user error is still one line."""
    missing = "typer snakemake transformers datasets pandas matplotlib yaml pydantic tqdm numba faiss safetensors"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing.split()!r})); sys.argv = ['sweep', *sys.argv[1:]]; "
        "import runpy; runpy.run_module('approxkmv.sweep', run_name='__main__')"
    )
    given = {"workloads": [{"name": "glove-split", "lengths": [150], "path": str(vectors)}], "repeats": 1}
    given |= {"methods": ["exact-fused", "local-expansion", "hnsw"], "targets": [0.2], "threads": 1}
    given |= {"parameters": {"hnsw": [{"near": 8, "samples": 8}]}}
    (tmp_path / "settings.json").write_text(json.dumps(given))

    def run(*words):
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)

    done = run("--settings", "settings.json", "--out", "sweep.csv")
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in read(tmp_path / "sweep.csv")}
    assert rows["local-expansion"]["status"] == "ok"
    assert rows["hnsw"]["status"] == "unavailable"
    assert "faiss" in rows["hnsw"]["reason"]
    (tmp_path / "settings.json").write_text(json.dumps({**given, "methods": ["knm"]}))
    done = run("--settings", "settings.json", "--out", "sweep.csv")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "approxkmv: no method is called 'knm'; did you mean 'knn'?"


def test_evaluations_and_their_exponents(vectors, tmp_path):
    table = tmp_path / "sweep.csv"
    asked = settings(
        vectors,
        methods=["exact-fused", "mean", "uniform", "top-k"],
        targets=[0.9],
        workload={"lengths": [100, 200, 300]},
        parameters={"top-k": [{"top": 10}]},
    )
    run_sweep(asked, table, {}, say=lambda line: None)
    by = {(r["method"], r["n"]): r for r in read(table)}
    assert int(by["exact-fused", "200"]["kernel_evaluations"]) == 200 * 200
    assert (
        int(by["uniform", "300"]["inner_products"]) == 300 * json.loads(by["uniform", "300"]["parameters"])["samples"]
    )
    # An oracle computes every score to choose its keys.
    assert [int(by["top-k", "200"][name]) for name in ("kernel_evaluations", "inner_products")] == [2000, 200 * 200]
    fits = {r["method"]: r for r in read(tmp_path / "sweep_exponents.csv")}
    assert fits["exact-fused"]["lengths"] == "[100, 200, 300]"
    assert float(fits["exact-fused"]["evaluation_exponent"]) == pytest.approx(2)
    assert float(by["exact-fused", "100"]["evaluation_exponent"]) == pytest.approx(2)
    # The mean evaluates nothing, which has no logarithm.
    assert fits["mean"]["kernel_evaluations"] == "[0, 0, 0]"
    assert fits["mean"]["evaluation_exponent"] == ""
    assert float(fits["uniform"]["target"]) == 0.9


def test_exponent_by_hand():
    from approxkmv.sweep.exponents import PROFILE, add_exponents, evaluation_exponents, fit_exponent

    n = np.array([1000, 2000, 4000, 8000])
    noise = np.array([0.1, -0.1, -0.1, 0.1])
    slope, error = fit_exponent(n, 5 * n**1.2345 * np.exp(noise))
    # The noise is orthogonal to log n: residual variance 0.04 / 2 over 5 (log 2)^2.
    assert slope == pytest.approx(1.2345)
    assert error == pytest.approx((0.02 / 5) ** 0.5 / np.log(2))
    assert fit_exponent([100, 200], [10, 40]) == (pytest.approx(2), None)
    assert fit_exponent([100, 100], [10, 40]) == (None, None)
    assert fit_exponent([1, 2, 4], [3.0, 6.0, 12.0]) == (1.0, 0.0)
    assert fit_exponent([1, 2, 4], [0, 6, 12]) == (None, None)
    row = dict.fromkeys(PROFILE, "x")
    rows = [
        {**row, "kernel_evaluations": n, "inner_products": n**2, "n": n, "status": status, "reached": reached}
        for n, status, reached in (
            *((1, "ok", "yes"), (2, "unreached", "no"), (3, "ok", "yes"), (4, "ok", "no")),
            (5, "unavailable", None),
        )
    ]
    (found,) = evaluation_exponents(rows)
    assert found["lengths"] == "[1, 3]"
    assert (found["evaluation_exponent"], found["product_exponent"]) == (pytest.approx(1), pytest.approx(2))
    assert (found["times_faster"], found["speed_exponent"]) == (None, None)
    add_exponents(rows, [found | {"evaluation_exponent_error": 0.5}])
    assert [row.get("evaluation_exponent_error") for row in rows] == [0.5, None, 0.5, None, None]
    # Rows that differ in anything but n are no points of one line.
    for name in ("workload", "batch", "columns", "d", "d_v", "device", "dtype", "method", "relative_to", "target"):
        assert len(evaluation_exponents([rows[0], {**rows[2], name: "y"}])) == 2, name
    # A row that was tuned for the target, and missed it on other inputs, is no part of a profile.
    counts, faster = {"kernel_evaluations": 7, "inner_products": 9}, {"status": "ok", "reached": "yes"}
    rows = [{**row, **counts, **faster, "n": n, "times_faster": 0.1 * n**0.5} for n in (100, 200, 400)]
    rows.append({**row, **counts, "n": 800, "status": "ok", "reached": "no", "times_faster": 9.0})
    (found,) = evaluation_exponents(rows)
    assert (found["lengths"], found["speed_exponent"]) == ("[100, 200, 400]", pytest.approx(0.5))


def test_a_row_is_a_line_and_what_it_lacks_is_empty(tmp_path):
    write_rows(tmp_path / "table.csv", [{"a": "é"}, {"b": 2}], {"a": "one", "b": "other"})
    assert (tmp_path / "table.csv").read_bytes() == "a,b\né,\n,2\n".encode()


def test_same_settings_same_errors(vectors, tmp_path):
    # One setting of each, since which of several is the fastest is a matter of noise at these sizes.
    one = {"local-expansion": [{"block": 16, "near": 32}], "approxkmv": [{"block": 16, "near": 32, "samples": 8}]}
    asked = settings(vectors, workload={"lengths": [150]}, parameters=one)
    for name in ("a", "b"):
        run_sweep(asked, tmp_path / f"{name}.csv", {}, say=lambda line: None)
    of_a, of_b = (
        [
            [row[c] for c in COLUMNS if not c.startswith(("seconds", "times_", "fastest_"))]
            for row in read(tmp_path / f"{name}.csv")
        ]
        for name in "ab"
    )
    assert of_a == of_b


@pytest.mark.slow
def test_figures_are_drawn_from_the_table_alone(vectors, tmp_path):
    pytest.importorskip("matplotlib")
    from approxkmv.figures import crossover, error_vs_time, speedup

    table = tmp_path / "sweep.csv"
    run_sweep(settings(vectors), table, {}, say=lambda line: None)
    for module in (crossover, error_vs_time, speedup):
        stem = tmp_path / "figures" / f"{module.__name__}-0.10"
        module.draw(table, stem)
        for suffix in ("pdf", "png"):
            assert stem.with_name(f"{stem.name}.{suffix}").stat().st_size > 3000
        with pytest.raises(TableError, match="is missing"):
            module.draw(tmp_path / "missing.csv", stem)


@pytest.mark.slow
def test_tables_from_before_rows_were_counted_can_be_drawn(vectors, tmp_path, monkeypatch):
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("matplotlib")
    from approxkmv.figures import speedup
    from approxkmv.figures.sweep_table import read_sweep

    table = tmp_path / "sweep.csv"
    # A row that could not run has neither parameters nor times.
    monkeypatch.setattr(naive_module, "free_bytes", lambda device: 1000)
    names = ["exact-naive", "exact-fused", "mean"]
    asked = settings(vectors, methods=names, targets=[0.9], workload={"lengths": [150]})
    run_sweep(asked, table, {}, say=lambda line: None)
    frame = pandas.read_csv(table)
    assert "recomputed_share" in frame
    write_csv(table, frame.drop(columns="recomputed_share"))
    assert read_sweep(table)["status"].tolist() == ["unavailable", "ok", "ok"]
    assert speedup.draw(table, tmp_path / "speedup")[0].stat().st_size > 3000


def test_the_exact_row_to_beat_is_the_fastest_that_is_right_enough(vectors, tmp_path):
    """exact-sdpa-bf16 errs by some thousandths: right enough for a target of 0.1, and too wrong for one of 1e-4."""
    asked = settings(
        vectors,
        methods=["exact-naive", "exact-sdpa-bf16", "exact-fused", "mean"],
        targets=[0.9, 1e-4],
        relative_to=["values", "answer"],
        workload={"lengths": [300]},
    )
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    rows = read(tmp_path / "sweep.csv")
    exact = {row["method"]: row for row in rows if row["kind"] == "exact"}
    assert {row["precision"] for name, row in exact.items() if name != "exact-sdpa-bf16"} == {"float32"}
    assert exact["exact-sdpa-bf16"]["precision"] == "bfloat16"
    mean = {(row["relative_to"], row["target"]): row for row in rows if row["method"] == "mean"}
    assert set(mean) == {(what, target) for what in ("values", "answer") for target in ("0.9", "0.0001")}
    for (_, target), row in mean.items():
        # Its answer does not depend on seeds, but on the three inputs.
        assert (row["seeds"], row["mean_error_v"], row["mean_error_exact"]) == (
            "3",
            row["error_v_p95"],
            row["error_exact_p95"],
        )
        allowed = {name: r for name, r in exact.items() if target == "0.9" or name != "exact-sdpa-bf16"}
        fastest = min(allowed.values(), key=lambda r: float(r["seconds"]))
        assert row["fastest_exact"] == fastest["method"]
        assert float(row["times_faster"]) == pytest.approx(float(fastest["seconds"]) / float(row["seconds"]))
        assert float(row["times_faster_bfloat16"]) == pytest.approx(
            float(exact["exact-sdpa-bf16"]["seconds"]) / float(row["seconds"])
        )


def test_the_precision_of_an_exact_row_is_that_in_which_it_computes(vectors, tmp_path):
    names = ["exact-naive", "exact-sdpa", "exact-fused"]
    asked = settings(vectors, methods=names, workload={"lengths": [150]}, dtype="bfloat16")
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    assert [(row["dtype"], row["precision"]) for row in read(tmp_path / "sweep.csv")] == [
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
    ]


def test_a_mean_within_the_target_holds_and_a_95th_percentile_beyond_it_does_not_reach(vectors, tmp_path):
    one = {"uniform": [{"samples": 16}]}

    def row(target):
        asked = settings(
            vectors, methods=["uniform"], targets=[target], parameters=one, workload={"lengths": [150]}, repeats=1
        )
        run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
        return read(tmp_path / "sweep.csv")[0]

    mean, p95 = (float(row(0.9)[f"error_v_{name}"]) for name in ("mean", "p95"))
    between = row((mean + p95) / 2)
    assert (between["held"], between["reached"]) == ("yes", "no")


def test_tuning_has_inputs_and_seeds_of_its_own(vectors, tmp_path, monkeypatch):
    used, right = [], run_module.attend

    def attend(method, problem, seed, parameters):
        used.append((method.name, seed, problem.q))
        return right(method, problem, seed, parameters)

    monkeypatch.setattr(run_module, "attend", attend)
    one = {"parameters": {"uniform": [{"samples": 8}]}, "seeds": [3, 4, 5, 6]}
    asked = settings(vectors, methods=["uniform"], targets=[0.9], workload={"lengths": [150]}, **one)
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    case = next(cases(asked.workloads[0]))
    # Three tuning seeds; four seeds of the evaluation, whose inputs go round; three runs to warm up and to time.
    parts = [("tuning", seed, i) for i, seed in enumerate((1000, 1001, 1002))]
    parts += [("evaluation", seed, i % 3) for i, seed in enumerate((3, 4, 5, 6))]
    found = [(seed, q) for name, seed, q in used if name == "uniform"]
    for (seed, q), (part, expected, index) in zip(found, parts, strict=False):
        assert seed == expected
        assert torch.equal(q, load(case, part, index).q)
    assert len(found) == len(parts) + 3


def cell(**more):
    """An exact row of float32, one of bfloat16 that is twice as fast and errs by 0.02, and a method of a target."""
    where = {"workload": "w", "n": 8, "batch": 1, "columns": "one", "device": "cpu", "dtype": "float32"}
    where |= {"status": "ok", "recomputed_share": 0.0}
    where |= {"seconds_q1": 0.5, "seconds_q3": 2.0}
    errors = {"error_v_p95": 1e-6, "error_exact_p95": 1e-6}
    return [
        {**where, **errors, "method": "a", "kind": "exact", "precision": "float32", "seconds": 2.0},
        {**where, "method": "b", "kind": "exact", "precision": "bfloat16", "seconds": 1.0}
        | {"error_v_p95": 0.02, "error_exact_p95": 0.04},
        {**where, "method": "m", "kind": "approximate", "seconds": 0.5, "target": 0.05, "relative_to": "values"}
        | {"error_v_p95": 0.04, "error_exact_p95": 0.08, **more},
    ]


@pytest.mark.parametrize(
    ("more", "fastest", "reached"),
    [
        # Half of 0.05 is more than 0.02 of the values, and less than 0.04 of the answer.
        ({}, "b", "yes"),
        ({"relative_to": "answer", "target": 0.1}, "b", "yes"),
        ({"relative_to": "answer"}, "a", "no"),
        ({"target": 0.04}, "b", "yes"),
        ({"target": 0.039}, "a", "no"),
        ({"error_v_p95": float("nan")}, "b", "no"),
        ({"recomputed_share": 0.01}, "b", "yes"),
        ({"recomputed_share": 0.02}, "b", "no"),
    ],
)
def test_ratios_by_hand(more, fastest, reached):
    from approxkmv.sweep.ratios import add_ratios

    rows = cell(**more)
    # Of other cells, and of one that could not run: none is compared with.
    where = ("workload", "n", "batch", "columns", "device", "dtype")
    rows += [{**rows[0], name: 16, "seconds": 0.1, "seconds_q1": 0.1} for name in where]
    rows.append({**rows[0], "method": "c", "seconds": None, "status": "unavailable"})
    # Of two in one precision the slower says nothing.
    rows.append({**rows[0], "method": "d", "seconds": 3.0})
    add_ratios([{**rows[0], "method": "c", "seconds": float("nan"), "status": "unavailable"}, *rows])
    assert (rows[2]["fastest_exact"], rows[2]["reached"]) == (fastest, reached)
    assert (rows[2]["times_faster_q1"], rows[2]["times_faster_q3"]) == (0.25, 4.0)
    assert rows[2]["times_faster"] == (4.0 if fastest == "a" else 2.0)
    assert (rows[2]["times_faster_float32"], rows[2]["times_faster_bfloat16"]) == (4.0, 2.0)
    assert "times_faster" not in rows[0]


def test_the_error_of_the_mean_stands_in_every_row_and_tuning_aims_at_the_answer(vectors, tmp_path):
    ends = {}
    for relative_to in ("values", "answer"):
        methods = ["exact-fused", "uniform"]
        asked = settings(
            vectors,
            methods=methods,
            relative_to=relative_to,
            targets=[0.3],
            workload={"name": "glove-paper", "lengths": [300]},
        )
        run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
        exact, ends[relative_to] = read(tmp_path / "sweep.csv")
        for row in (exact, ends[relative_to]):
            assert 0 < float(row["mean_error_v"]) < float(row["mean_error_exact"])
        reached = float(ends[relative_to]["error_v_p95" if relative_to == "values" else "error_exact_p95"]) <= 0.3
        assert ends[relative_to]["reached"] == ("yes" if reached else "no")
        assert (exact["relative_to"], ends[relative_to]["relative_to"]) == ("", relative_to)
    # An answer is shorter than the values, so that the same number asks for more samples.
    few, many = (json.loads(ends[name]["parameters"])["samples"] for name in ("values", "answer"))
    assert few < many


def test_causal_workloads_and_methods_without_a_causal_form(vectors, tmp_path):
    names = ["exact-naive", "exact-sdpa", "exact-sdpa-bf16", "exact-fused", "mean", "own-key", "hyperattention"]
    asked = settings(vectors, methods=names, targets=[0.9], workload={"lengths": [300], "causal": True})
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    rows = {row["method"]: row for row in read(tmp_path / "sweep.csv")}
    assert {(row["workload"], row["mask"]) for row in rows.values()} == {("glove-split-causal", "causal")}
    for name in names[:4]:
        assert rows[name]["status"] == "ok"
        assert float(rows[name]["error_exact_p95"]) < (0.02 if name.endswith("bf16") else 1e-5)
    assert rows["own-key"]["status"] == "unavailable"
    assert "no causal form" in rows["own-key"]["reason"]
    assert rows["hyperattention"]["times_faster"] != ""
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["reference"]["error_against_float64"][0]["reference_error"] < 1e-5


def test_few_queries_are_the_last_and_a_method_may_refuse_them(vectors, tmp_path, monkeypatch):
    asked = settings(
        vectors,
        methods=["exact-sdpa", "exact-fused", "mean", "own-key", "local-expansion"],
        targets=[0.9],
        workload={"lengths": [300], "queries": [1, 16], "columns": ["all"]},
    )
    one, some = cases(asked.workloads[0])
    whole = load(replace(one, queries=None), "evaluation", 0)
    assert torch.equal(load(some, "evaluation", 0).q, whole.q[:, -16:])
    assert torch.equal(load(some, "evaluation", 0).k, whole.k)
    right = local_module.method

    def refuses(q, k, v, **given):
        if q.shape[1] < 8:
            raise InputError("a block of 1 query is too small")
        return right.compute(q, k, v, **given)

    monkeypatch.setattr(local_module, "method", replace(right, compute=refuses))
    run_sweep(asked, tmp_path / "sweep.csv", {}, say=lambda line: None)
    rows = {(row["method"], row["queries"]): row for row in read(tmp_path / "sweep.csv")}
    assert rows["mean", "16"]["workload"] == "glove-split-q16"
    assert rows["mean", "16"]["n"] == "300"
    assert rows["local-expansion", "1"]["status"] == "refused"
    assert rows["local-expansion", "1"]["reason"] == "a block of 1 query is too small"
    assert rows["local-expansion", "16"]["seconds"] != ""
    assert rows["own-key", "1"]["status"] == "unavailable"
    # As many value rows as queries: the mean of the values is about as wrong for any number of them.
    assert 0.2 < float(rows["mean", "1"]["mean_error_v"]) / float(rows["mean", "16"]["mean_error_v"]) < 5


def test_crossover_by_hand():
    pytest.importorskip("matplotlib")
    from approxkmv.figures.crossover import crossover

    n = np.array([1000.0, 2000.0, 4000.0])
    # time ratio n / 1500: crosses at 1500
    assert crossover(n, n / 1500) == (pytest.approx(1500), "measured")
    assert crossover(n, n / 500) == (1000, "below")
    assert crossover(n, n / 16000) == (pytest.approx(16000), "extrapolated")
    assert crossover(n, 0.5 * np.ones(3))[1] == "never"


def test_parts_and_inputs_differ(vectors):
    case = next(cases(settings(vectors, workload={"lengths": [150]}).workloads[0]))
    tuning, evaluation = load(case, "tuning", 0), load(case, "evaluation", 0)
    assert not torch.equal(evaluation.q, load(case, "evaluation", 1).q)
    two = next(cases(settings(vectors, workload={"lengths": [150], "batches": [2]}).workloads[0]))
    assert not torch.equal(*load(two, "evaluation", 0).q)
    # 300 of 1,200 rows are needed for each, so that none is in both.
    seen = {tuple(row) for row in torch.cat([tuning.q[0], tuning.k[0]]).tolist()}
    assert not seen & {tuple(row) for row in torch.cat([evaluation.q[0], evaluation.k[0]]).tolist()}
    # Values are rows of the same set, in an order that has nothing to do with the keys'; or the keys themselves.
    rows = torch.cat([evaluation.q[0], evaluation.k[0]])[:, 1].tolist()
    assert set(evaluation.v[0, :, 0].tolist()) <= set(rows)
    assert (evaluation.v[..., 0] == evaluation.k[..., 1]).float().mean() < 0.1
    tied = next(cases(settings(vectors, workload={"lengths": [150], "values": "keys"}).workloads[0]))
    tied_problem = load(tied, "evaluation", 0)
    assert torch.equal(tied_problem.v[..., 0], tied_problem.k[..., 1])


def test_more_rows_than_there_are(vectors):
    case = Case(settings(vectors).workloads[0], 800, 1, "one")
    with pytest.raises(InputError, match="needs 1600 word vectors, but there are 1500"):
        load(case, "evaluation", 0)


def test_capture_of_a_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {name: torch.randn(2, 400, 8) for name in "qkv"}
    path = tmp_path / "capture.safetensors"
    safetensors.save_file(tensors, path, metadata={"scale": "0.25"})
    given = {"name": "model-qk", "lengths": [100], "path": str(path), "heads": [0, 1], "columns": ["all"]}
    first, second = cases(SweepSettings.from_mapping({"workloads": [given]}).workloads[0])
    assert (first.name, second.name) == ("model-qk-0", "model-qk-1")
    problem = load(second, "evaluation", 0)
    assert problem.scale == 0.25
    assert torch.equal(problem.q[0], tensors["q"][1, 300:])
    assert torch.equal(load(second, "tuning", 0).v[0], tensors["v"][1, :100])
    with pytest.raises(InputError, match="needs 500 tokens of 400"):
        load(Case(first.settings, 500, 1, "one", 0), "evaluation", 0)
    with pytest.raises(SourceError, match="no capture"):
        load(Case(SweepSettings.from_mapping(
            {"workloads": [{**given, "path": str(tmp_path / "none")}]}
        ).workloads[0], 100, 1, "one", 0), "evaluation", 0)  # fmt: skip


@pytest.mark.parametrize("inputs", [1, 3, 7])
@pytest.mark.parametrize("missing", [0, 1])
def test_inputs_of_a_capture_are_shared_where_one_of_tuning_has_a_row_of_one_of_evaluation(tmp_path, inputs, missing):
    safetensors = pytest.importorskip("safetensors.torch")
    # Two batches of 50 rows for each part, and 64 more for each further input
    rows = 2 * (100 + 64 * (inputs - 1)) - missing
    numbers = torch.arange(rows, dtype=torch.float32).view(1, -1, 1)
    path = tmp_path / "capture.safetensors"
    safetensors.save_file({name: numbers.clone() for name in "qkv"}, path)
    given = {"name": "model-qk", "lengths": [50], "batches": [2], "path": str(path), "heads": [0]}
    (case,) = cases(SweepSettings.from_mapping({"workloads": [given]}).workloads[0])
    one, other = ({row for i in range(inputs) for row in load(case, part, i).q.flatten().tolist()} for part in PARTS)
    assert bool(one & other) == shares_inputs(case, inputs) == bool(missing)
    # The same text again is no other text.
    again = replace(case, settings=replace(case.settings, tuning_path=str(path)))
    assert shares_inputs(again, inputs) == bool(missing)


def test_a_capture_that_is_none_is_one_line(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    good = {name: torch.randn(2, 40, 8) for name in "qkv"}
    nan = good["k"].clone()
    nan[1, 3, 2] = torch.nan
    for i, (tensors, metadata, message) in enumerate(
        [
            ({**good, "k": nan}, {}, "holds a NaN"),
            ({**good, "k": good["k"][0]}, {}, "here q"),
            ({**good, "v": good["v"][:, :30]}, {}, "here q"),
            ({"q": good["q"]}, {}, "could be read"),
            (good, {"scale": "a"}, "could be read"),
            (good, {"scale": "nan"}, "its scale is nan"),
        ]
    ):
        path = tmp_path / f"{i}.safetensors"
        safetensors.save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)
        given = {"name": "model-qk", "lengths": [20], "path": str(path)}
        with pytest.raises(SourceError, match=message) as caught:
            run_sweep(SweepSettings.from_mapping({"workloads": [given]}), tmp_path / "x.csv", {})
        assert "\n" not in str(caught.value)


def test_vectors_that_are_none_are_one_line(tmp_path):
    whole = tmp_path / "whole.npy"
    np.save(whole, np.ones((30, 4), np.float32))
    # More rows than follow, in a header of the same length.
    lying = whole.read_bytes().replace(b"(30, 4), }  ", b"(3000, 4), }")
    for name, content in {
        "empty.npy": b"",
        "cut.npy": whole.read_bytes()[:200],
        "lying.npy": lying,
        "zip.npy": b"PK\x03\x04" + b"x" * 50,
        "cut.npy.xz": b"\xfd7zXZ\x00",
        "deep.json": b"[" * 100_000,
        "none.json": b"{}",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=r"no word vectors|expected a matrix") as caught:
            word_vectors(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    np.save(whole, np.full((30, 4), 1e300))
    with pytest.raises(SourceError, match="finite numbers"):
        word_vectors(str(whole))
    np.save(whole, np.ones((30, 1)))
    word_vectors.cache_clear()
    given = {"name": "glove-paper", "lengths": [20], "path": str(whole)}
    with pytest.raises(InputError, match="takes the second column"):
        run_sweep(SweepSettings.from_mapping({"workloads": [given]}), tmp_path / "x.csv", {})


def test_a_nan_among_the_vectors_and_a_missing_device(vectors, tmp_path):
    broken = np.load(vectors)
    broken[7, 3] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    with pytest.raises(SourceError, match="finite numbers"):
        word_vectors(str(tmp_path / "broken.npy"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="finds no CUDA device"):
            run_sweep(settings(vectors, device="cuda"), tmp_path / "x.csv", {})
    with pytest.raises(InputError, match="did you mean 'approxkmv'"):
        run_sweep(settings(vectors, methods=["aproxkmv"]), tmp_path / "x.csv", {})


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_the_current_device_is_set_by_its_number(vectors, tmp_path, monkeypatch, device, index):
    """torch refuses to set a device without an index, which is what "cuda" is."""

    def set_device(given):
        assert given == index
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(settings(vectors, device=device), tmp_path / "x.csv", {})


def test_shipped_vectors_are_what_their_hash_says():
    import hashlib

    from approxkmv.sweep.word_vectors import shipped_vectors

    file = shipped_vectors()
    readme = (file.parent / "README.md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in readme
    assert word_vectors(None).shape == (16384, 100)
