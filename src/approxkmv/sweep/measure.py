"""Errors against the exact answer, and comparable times."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from approxkmv.attention import UnavailableError
from approxkmv.attention.kernels.cuda_graphs import recordings
from approxkmv.errors import one_line
from approxkmv.progress import is_of_memory
from approxkmv.provenance import as_on_another_cpu, instructions, processor

Run = Callable[[int], object]
# About 10 ms of a GPU's clock: longer than Python takes to queue the kernels of one run.
_SLEEP = 20_000_000


def machine(device: str) -> dict[str, Any]:
    """What a reader of timings needs to know about the machine and its software."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": processor(),
        "instructions": instructions(),
        **as_on_another_cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
    }
    for name in ("numba", "triton"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


@contextmanager
def running_out_of_memory(what: str) -> Iterator[None]:
    """Turn an out-of-memory error on any device into an UnavailableError with one line about `what`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch raises a plain RuntimeError on a CPU, as do CUDA's libraries.
        if not is_of_memory(error):
            raise
        raise UnavailableError(f"{what} runs out of memory: {one_line(error)}") from error


def errors(out: torch.Tensor, exact: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
    """|out - exact|_2 relative to |v|_2, as in the paper, and to |exact|_2, over the whole batch.

    With fewer queries than keys |v|_2 is that of as many average rows as there are queries.
    """
    exact = exact.double()
    gap = float((out.double() - exact).norm())
    rows = (exact.shape[1] / v.shape[1]) ** 0.5
    sizes = rows * float(v.double().norm()), float(exact.norm())
    # Values of 0 have an answer of 0, which a method gives or misses by an infinite factor.
    of_v, of_answer = (gap / size if size else (float("inf") if gap else 0.0) for size in sizes)
    return of_v, of_answer


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and 95th percentile."""
    array = np.asarray(values, np.float64)
    return {"mean": float(array.mean()), "median": float(np.median(array)), "p95": float(np.percentile(array, 95))}


def timer(device: torch.device, clock: str) -> Callable[[Callable[[], object]], float]:
    """A function that runs another and returns its seconds: by `clock` (wall or cpu), on CUDA those of the device.

    On CUDA the first event is queued behind a sleep, so that the device does not wait for Python between kernels;
    `host_seconds` is the time with such waits.
    """
    if device.type == "cuda":

        def events(run: Callable[[], object]) -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            torch.cuda._sleep(_SLEEP)
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000

        return events
    now = time.process_time if clock == "cpu" else time.perf_counter

    def host(run: Callable[[], object]) -> float:
        start = now()
        run()
        return now() - start

    return host


def host_seconds(run: Run, device: torch.device, repeats: int, inputs: int) -> float:
    """Median wall time from a call to the end of its work on a CUDA device."""
    taken = []
    for turn in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run(turn % inputs)
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def interleaved_seconds(
    runs: dict[str, Run], device: torch.device, clock: str, warmups: int, repeats: int, inputs: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each run, `repeats` times, taking turns, so that a slow spell of the machine affects all runs.

    runs[name](i) works on input i. From round to round, the input and the order of the runs rotate. A run that becomes
    unavailable, for instance for lack of memory beside the others, has no seconds: the second dictionary says why.
    """
    seconds_of = timer(device, clock)
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for turn in range(warmups + repeats):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            if name in failures:
                continue
            recorded = recordings()
            try:
                with running_out_of_memory(name):
                    taken = seconds_of(lambda name=name, turn=turn: runs[name](turn % inputs))  # type: ignore[misc]
                if turn < warmups:
                    continue
                if recordings() > recorded:
                    raise UnavailableError(f"{name} recorded its CUDA graph while being timed")
                seconds[name].append(taken)
            except UnavailableError as error:
                failures[name] = str(error)
                del seconds[name]
    return seconds, failures


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, middle, high = np.percentile(np.asarray(seconds, np.float64), [25, 50, 75])
    return float(low), float(middle), float(high)
