"""Loops over threads, and reused memory."""

import multiprocessing
import threading

import pytest
import torch

from approxkmv.compute.threads import over_threads


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def met(count):
    """How often each of range(count) is visited."""
    lock, found = threading.Lock(), [0] * count

    def loop(low, high):
        for i in range(low, high):
            with lock:
                found[i] += 1

    over_threads(loop, count)
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 12, 100])
def test_everything_is_done_once(threads, count):
    assert met(count) == [1] * count


def test_a_fault_in_any_part_is_raised(threads):
    for part in range(10):

        def loop(low, high, part=part):
            if low <= part < high:
                raise ValueError("here")

        with pytest.raises(ValueError, match="here"):
            over_threads(loop, 10)


def test_a_fault_of_a_helping_thread_is_raised():
    before, taken = torch.get_num_threads(), threading.Event()

    def loop(low, high):
        if threading.current_thread() is threading.main_thread():
            taken.wait(10)
        else:
            taken.set()
            raise ValueError("here")

    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="here"):
            over_threads(loop, 2)
    finally:
        torch.set_num_threads(before)


def test_from_many_threads_at_once(threads):
    results = []
    callers = [threading.Thread(target=lambda: results.append(met(30))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [[1] * 30] * 8


def _in_a_child(queue):
    queue.put(met(30))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_in_a_forked_process():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    met(30)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == [1] * 30
    child.join()
    torch.set_num_threads(before)
