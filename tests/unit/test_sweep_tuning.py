"""Tuning walks the grid from its cheap end, and measuring interleaves."""

import math

import pytest
import torch

from approxkmv.attention import Method, UnavailableError
from approxkmv.sweep import measure
from approxkmv.sweep.measure import errors, interleaved_seconds, quartiles, running_out_of_memory, summary
from approxkmv.sweep.tuning import tune


def method(sizes, **more):
    grid = [{"m": m} for m in sizes]
    return Method(name="made-up", compute=lambda *_: None, summary="", defaults={"m": 0}, grid=grid, **more)


def run(targets, errors_of, band=None, seeds=(0, 1, 2), seconds_of=float, recomputed_of=lambda m: 0.0, **more):
    asked = []

    def trial_of(parameters, i):
        asked.append((parameters["m"], i))
        # The first run compiles.
        m = parameters["m"]
        # Rows are recomputed with the last seed only.
        recomputed = recomputed_of(m) if i == 2 else 0.0
        return errors_of[m] + 0.001 * (i - 1), seconds_of(m) + (100 if i == 0 else 0), recomputed

    made = method(sorted(errors_of), **more)
    return tune(made, made.grid, trial_of, targets, seeds, band), asked


def test_the_cheapest_that_reaches_each_target():
    choices, asked = run((0.15, 0.1, 0.05), {1: 0.4, 2: 0.12, 4: 0.13, 8: 0.04, 16: 0.01})
    assert [c.trial.parameters["m"] for c in choices] == [2, 8, 8]
    assert all(c.reached for c in choices)
    # The smallest target is reached at 8: nothing dearer is tried.
    assert max(m for m, _ in asked) == 8
    # With every seed, not with most: at 1 the last one errs by 0.1005.
    choices, _ = run((0.1,), {1: 0.0995, 2: 0.04})
    assert choices[0].trial.parameters["m"] == 2
    # Without a seed the answer is the same each time, but the first run compiles.
    choices, asked = run((0.1,), {1: 0.04}, seeded=False)
    assert (asked, choices[0].trial.seconds) == ([(1, 0), (1, 1)], 1)


def test_of_what_reaches_a_target_the_fastest_by_more_than_noise():
    found = {1: 0.4, 2: 0.12, 4: 0.13, 8: 0.04}
    choices, _ = run((0.15, 0.05), found, seconds_of={1: 0.1, 2: 5.0, 4: 4.9, 8: 3.0}.get)
    assert [c.trial.parameters["m"] for c in choices] == [8, 8]
    choices, _ = run((0.15, 0.05), found, seconds_of={1: 0.1, 2: 5.0, 4: 4.9, 8: 4.8}.get)
    assert [c.trial.parameters["m"] for c in choices] == [2, 8]


def test_a_target_out_of_reach_gives_the_best():
    choices, _ = run((0.1, 0.001), {1: 0.4, 2: 0.02, 4: math.nan, 8: 0.03})
    assert choices[0].reached
    assert not choices[1].reached
    assert choices[1].trial.parameters["m"] == 2


def test_a_setting_whose_rows_are_made_again_reaches_nothing():
    found, share = {1: 0.4, 2: 0.01, 4: 0.09, 8: 0.04}, {2: 1.0, 4: 0.011, 8: 0.01}
    # Nor does the walk over the grid end there.
    choices, _ = run((0.1, 0.05), found, recomputed_of=lambda m: share.get(m, 0.0))
    assert [c.trial.parameters["m"] for c in choices] == [8, 8]
    assert all(c.reached for c in choices)
    choices, _ = run((0.1,), found, recomputed_of=lambda m: 1.0)
    assert not choices[0].reached
    # The best that is not reached is one whose error is its own, where there is one.
    choices, _ = run((0.001,), found, recomputed_of=lambda m: share.get(m, 0.0))
    assert not choices[0].reached
    assert choices[0].trial.parameters["m"] == 8


def test_an_exact_method_whose_answer_is_no_number_reaches_nothing():
    choices, _ = run((math.inf,), {1: math.nan})
    assert not choices[0].reached


def test_a_band_refuses_an_answer_that_is_too_good():
    choices, _ = run((0.1,), {1: 0.4, 2: 0.01}, band=0.05)
    assert not choices[0].reached
    choices, _ = run((0.1,), {1: 0.4, 2: 0.12}, band=0.05)
    assert choices[0].reached
    # Where none is within the band, the nearest to the target is the best, not the most accurate.
    choices, _ = run((0.1,), {1: 0.16, 2: 0.01}, band=0.05)
    assert (choices[0].trial.parameters["m"], choices[0].reached) == (1, False)


def test_unavailable_settings_are_passed_over_until_none_is_left():
    made = method([1, 2])

    def some(parameters, i):
        if parameters["m"] == 1:
            raise UnavailableError("too small")
        return 0.01, 1.0, 0.0

    assert tune(made, made.grid, some, (0.1,), (0,))[0].trial.parameters["m"] == 2

    def none(parameters, i):
        raise UnavailableError("no room")

    with pytest.raises(UnavailableError, match="no room"):
        tune(made, made.grid, none, (0.1,), (0,))


def test_runs_are_interleaved_and_inputs_rotated():
    order = []
    runs = {name: (lambda i, name=name: order.append((name, i))) for name in "abc"}
    seconds, failures = interleaved_seconds(runs, torch.device("cpu"), "wall", warmups=1, repeats=3, inputs=2)
    assert order == [
        ("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1),
        ("c", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("c", 1),
    ]  # fmt: skip
    assert all(len(s) == 3 for s in seconds.values())
    assert failures == {}


def test_a_run_that_loses_its_memory_while_timed_leaves_the_others(monkeypatch):
    calls = []

    def loses(i):
        calls.append(i)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    recorded = []
    monkeypatch.setattr(measure, "recordings", lambda: len(recorded))
    runs = {"stays": lambda i: None, "loses": loses, "records": recorded.append}
    seconds, failures = interleaved_seconds(runs, torch.device("cpu"), "wall", warmups=1, repeats=3, inputs=1)
    assert list(seconds) == ["stays"]
    assert len(seconds["stays"]) == 3
    assert len(calls) == 3
    assert "loses runs out of memory" in failures["loses"]
    assert "graph while being timed" in failures["records"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried\nand more"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_is_not_there_is_one_line(error):
    with pytest.raises(UnavailableError, match="knn runs out of memory") as caught, running_out_of_memory("knn"):
        raise error
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="something else"), running_out_of_memory("knn"):
        raise RuntimeError("something else")


def test_errors_and_their_summaries():
    out, exact, v = torch.tensor([[[3.0]]]), torch.tensor([[[2.0]]]), torch.tensor([[[10.0]]])
    assert errors(out, exact, v) == (0.1, 0.5)
    # With fewer queries than keys, of as many average rows of v as there are queries.
    assert errors(out, exact, v.expand(1, 4, 1)) == (0.1, 0.5)
    assert errors(0 * out, 0 * exact, v) == (0.0, 0.0)
    assert errors(out, 0 * exact, v) == (0.3, math.inf)
    assert quartiles([4, 1, 2, 3, 5]) == (2, 3, 4)
    found = summary([1.0] * 18 + [2.0, 3.0])
    assert found["median"] == 1.0
    assert found["mean"] == pytest.approx(1.15)
    assert found["p95"] == pytest.approx(2.05)
