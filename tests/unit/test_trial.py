"""Which form of a computation runs is measured on the machine, once, and recorded."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from approxkmv import files, provenance
from approxkmv.attention import get
from approxkmv.attention.blocks import trials
from approxkmv.attention.blocks.near_keys import NEAR_KEYS_FEW, NEAR_KEYS_MANY
from approxkmv.compute import counting, trial
from approxkmv.compute.loops import has_bfloat16_instructions
from approxkmv.sweep import SweepSettings, run_sweep

pytestmark = pytest.mark.usefixtures("one_thread")

LOOPS, PRODUCTS = "attention.blocks.trials.loops", "attention.blocks.trials.products"
# Any module of the package may have the function; this one has it in these tests only.
QUESTION = "compute.counting.runs"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that has decided nothing, whose clock advances by what the forms cost; and what ran on it."""

    class Machine:
        def __init__(self):
            self.costs, self.ran, self.now = {"plain": 1.0, "other": 1.0}, [], 0.0

        def run(self, form):
            self.ran.append(form)
            counting.count(kernel_evaluations=7)
            if self.costs[form] == float("inf"):
                raise RuntimeError("not implemented for 'BFloat16'")
            self.now += self.costs[form]

        def forget(self):
            monkeypatch.setattr(trial, "_decided", {})
            self.ran = []

    made = Machine()
    made.forget()
    monkeypatch.setattr(trial, "clock", lambda: made.now)
    monkeypatch.setattr(trial, "_forced", {})
    monkeypatch.setattr(trial, "cache_folder", lambda: tmp_path / "cache")
    runs = {form: partial(made.run, form) for form in made.costs}
    monkeypatch.setattr(counting, "runs", lambda: runs, raising=False)
    return made


def ask():
    return trial.fastest(QUESTION, "plain", "other")


@pytest.mark.parametrize(
    ("cost", "form"), [(0.5, "other"), (0.9375, "plain"), (1.0, "plain"), (2.0, "plain"), (float("inf"), "plain")]
)
def test_the_form_is_the_one_that_takes_less_time(machine, cost, form):
    machine.costs = {"plain": 1.0, "other": cost}
    assert ask() == form
    (decision,) = trial.decisions().values()
    assert (decision["form"], decision["how"]) == (form, "by a trial")
    # One that cannot run has no time.
    assert decision["seconds"] == ({"plain": 1.0, "other": cost} if cost < 10 else {"plain": 1.0})


def test_a_form_that_is_hopeless_is_timed_once(machine):
    machine.costs = {"plain": 1.0, "other": 50.0}
    assert ask() == "plain"
    # Each runs once before it is timed.
    assert machine.ran.count("other") == 2
    assert machine.ran.count("plain") == 1 + 3


def test_a_form_that_lost_by_less_than_an_interruption_is_timed_again(machine):
    machine.costs = {"plain": 2**-10, "other": 2**-7}
    assert ask() == "plain"
    # By the seconds of the whole, of which what the first turn takes to compile is none.
    assert machine.ran.count("other") == machine.ran.count("plain") == 1 + 12


def test_it_is_decided_once_per_machine(machine, monkeypatch):
    machine.costs = {"plain": 1.0, "other": 0.5}
    assert [ask(), ask()] == ["other", "other"]
    assert len(machine.ran) == 8
    # Another process, however the forms compare by now
    machine.forget()
    machine.costs = {"plain": 1.0, "other": 2.0}
    assert ask() == "other"
    assert machine.ran == []
    (decision,) = trial.decisions().values()
    assert decision == {"form": "other", "seconds": {"plain": 1.0, "other": 0.5}, "how": "by an earlier trial"}
    # A library that is told to run as on another CPU
    for name in provenance._SETTINGS:
        with monkeypatch.context() as told:
            told.setenv(name, "another")
            machine.forget()
            assert ask() == "plain"
    machine.forget()
    assert ask() == "other"
    # Another processor, version, number of threads or source
    for place, name, other in (
        (trial, "processor", lambda: "another"),
        (trial, "versions", lambda: {"torch": "9"}),
        (torch, "get_num_threads", lambda: 77),
    ):
        machine.forget()
        monkeypatch.setattr(place, name, other)
        assert (ask(), machine.ran == []) == ("plain", False)
    machine.forget()
    machine.costs = {"plain": 1.0, "other": 0.5}
    monkeypatch.setattr(trial, "files_behind", lambda source: [source, files.Path(__file__)])
    assert ask() == "other"


def test_a_damaged_file_is_measured_again(machine, tmp_path):
    ask()
    (kept,) = (tmp_path / "cache" / "trials").iterdir()
    for text in ("", "{", "[]", '{"form": "third", "seconds": {}}', '{"form": "other"}'):
        kept.write_text(text)
        machine.forget()
        machine.costs = {"plain": 1.0, "other": 0.5}
        assert ask() == "other"
        assert json.loads(kept.read_text())["form"] == "other"


@pytest.mark.parametrize("folder", ["file", "none"])
def test_where_nothing_can_be_kept_the_first_form_runs(machine, folder, monkeypatch, tmp_path):
    if folder == "file":
        (tmp_path / "cache").write_text("not a folder")
    else:
        monkeypatch.setattr(trial, "cache_folder", lambda: None)
    machine.costs = {"plain": 1.0, "other": 0.5}
    assert ask() == "plain"
    assert machine.ran == []
    (decision,) = trial.decisions().values()
    assert decision == {"form": "plain", "seconds": {}, "how": "without a trial, which could not be kept"}


def test_a_trial_is_not_part_of_the_work_that_is_counted(machine):
    with counting.counting() as counts:
        ask()
        counting.count(kernel_evaluations=1)
    assert counts.kernel_evaluations == 1


def test_threads_that_ask_at_once_make_one_trial_and_leave_nothing_forced(machine, monkeypatch):
    """Each waits for the answer, and what the trial forces holds in its own thread alone."""
    begun, over = threading.Event(), threading.Event()

    def run():
        form = ask()
        machine.run(form)
        begun.set()
        over.wait(60)

    monkeypatch.setattr(counting, "runs", lambda: trial.by_form(QUESTION, run, "plain", "other"))
    machine.costs = {"plain": 1.0, "other": 0.5}
    with ThreadPoolExecutor(3) as callers:
        first = callers.submit(ask)
        assert begun.wait(60)
        others = [callers.submit(ask) for _ in range(2)]
        assert not any(other.done() for other in others)
        over.set()
        assert [caller.result() for caller in (first, *others)] == ["other"] * 3
    assert machine.ran.count("plain") == machine.ran.count("other") == 4
    assert trial._forced == {}
    (decision,) = trial.decisions().values()
    assert decision["how"] == "by a trial"


def heads(n, d_v):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 16, generator=generator) for _ in range(2))
    return q, k, torch.randn(1, n, d_v, generator=generator) + k[..., :1]


@pytest.mark.parametrize("d_v", [1, 12])
def test_a_trial_in_the_middle_of_an_answer_does_not_change_it(d_v, monkeypatch, tmp_path):
    """Scratch memory is reused from call to call, and a trial calls the same functions."""
    pytest.importorskip("numba")
    small = trials._head
    monkeypatch.setattr(trials, "_head", lambda n_q, n_k, d_v: small(n_q // 16, n_k // 16, d_v))
    monkeypatch.setattr(trials, "_CLUSTERING", trials.Clustering(block=16, near=24))
    monkeypatch.setattr(trial, "_forced", {})
    monkeypatch.setattr(trial, "cache_folder", lambda: tmp_path / "cache")
    inputs, given = heads(300, d_v), {"block": 32, "near": 40, "products": "bfloat16"}
    for question, forms in ((LOOPS, ("compiled", "library")), *((n, ("float32", "bfloat16")) for n in near(d_v))):
        with trial.forced({name: "compiled" if name == LOOPS else "float32" for name in (LOOPS, *near(d_v))}):
            asked = dict(trial._forced)
        asked.pop(question)
        monkeypatch.setattr(trial, "_decided", {})
        with trial.forced(asked):
            during = get("local-expansion")(*inputs, **given)
            assert [key[0] for key in trial._decided] == [question]
            form = trial.fastest(question, *forms)
        with trial.forced({**asked, question: form}):
            assert torch.equal(get("local-expansion")(*inputs, **given), during)


def near(d_v):
    if not has_bfloat16_instructions():
        return ()
    return (NEAR_KEYS_FEW,) if d_v == 1 else (NEAR_KEYS_MANY,)


@pytest.mark.parametrize("d_v", [1, 12])
@pytest.mark.parametrize("loops", ["compiled", "library"])
@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_every_form_gives_the_same_answer(d_v, loops, numbers, products):
    """To the rounding of bfloat16, 2^-8 of logits and weights, where products have it.

    In one block, for which no clustering decides by a rounding who belongs to it; approxkmv, whose products are always
    float32, and clustered in several.
    """
    if loops == "compiled":
        pytest.importorskip("numba")
    inputs = heads(300, d_v)
    given = {"local-expansion": {"block": 300, "near": 60}, "approxkmv": {"near": 60}, "clustered": {}}

    def answer(name, loops, numbers, products):
        with trial.forced({LOOPS: loops, NEAR_KEYS_FEW: numbers, NEAR_KEYS_MANY: numbers, PRODUCTS: products}):
            return get(name)(*inputs, scale=0.25, seed=1, **given[name])

    for name in given:
        plain, found = answer(name, "library", "float32", "float32"), answer(name, loops, numbers, products)
        most = 2**-7 if name == "local-expansion" and products == "bfloat16" else 1e-4
        assert float((found - plain).norm()) < most * float(plain.norm()), name


def test_a_cpu_without_bfloat16_instructions_is_given_none(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert not has_bfloat16_instructions()


def test_library_calls_are_used_where_they_are_faster():
    from approxkmv.attention.blocks.compiled import block_loops

    pytest.importorskip("numba")
    with trial.forced({LOOPS: "library"}):
        assert block_loops() is None
    with trial.forced({LOOPS: "compiled"}):
        assert block_loops().__name__ == "approxkmv.attention.blocks.loops"


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_products_follow_the_trial(products):
    q, k, v = heads(300, 1)
    given = {"block": 32, "near": 40}
    with trial.forced({PRODUCTS: products}):
        out = get("local-expansion")(q, k, v, **given)
    assert torch.equal(out, get("local-expansion")(q, k, v, products=products, **given))


@pytest.mark.slow
def test_a_sweep_records_what_was_decided(machine, tmp_path):
    """On any machine: the trials are real, their times those of the test's clock, which stands still."""
    import numpy as np

    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32))
    workload = {"name": "glove-split", "lengths": [150], "path": str(tmp_path / "vectors.npy")}
    settings = {"workloads": [workload], "methods": ["exact-fused", "local-expansion"], "targets": [0.5]}
    settings |= {"repeats": 1, "warmups": 0, "threads": 1, "parameters": {"local-expansion": [{"near": 20}]}}
    run_sweep(SweepSettings.from_mapping(settings), tmp_path / "table.csv", {}, say=lambda line: None)
    recorded = json.loads((tmp_path / "table.json").read_text())["trials"]
    assert recorded == trial.decisions()
    found = recorded[f"{PRODUCTS}, threads: 1"]
    assert found == {"form": "float32", "seconds": {"float32": 0.0, "bfloat16": 0.0}, "how": "by a trial"}
