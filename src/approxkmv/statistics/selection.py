"""Order statistics by partition and by heap, compiled: the basis of both experiments."""

from __future__ import annotations

import numpy as np

from approxkmv.compute.compiling import cached_njit

SEED = np.uint64(88172645463325252)


@cached_njit(nogil=True, fastmath={"reassoc", "nsz"}, forceinline=True)
def sum_of(values: np.ndarray, start: int, stop: int) -> float:
    """The sum of values[start:stop]."""
    total = 0.0
    for j in range(start, stop):
        total += values[j]
    return total


@cached_njit(nogil=True, fastmath={"reassoc", "nsz"}, forceinline=True)
def sum_up_to(weights: np.ndarray, values: np.ndarray, size: int, limit: float) -> float:
    """The sum of the weights[:size] whose values are at most `limit`."""
    total = 0.0
    for j in range(size):
        total += weights[j] if values[j] <= limit else 0.0
    return total


@cached_njit(nogil=True)
def append_above(values: np.ndarray, size: int, limit: float, shift: float, out: np.ndarray, count: int) -> int:
    """Append values - shift where values > limit to out; returns their count. They are rare: 32 are tested at once."""
    whole = size - size % 32
    for start in range(0, whole, 32):
        hits = 0
        for j in range(start, start + 32):
            hits += values[j] > limit
        if hits > 0:
            for j in range(start, start + 32):
                if values[j] > limit:
                    out[count] = values[j] - shift
                    count += 1
    for j in range(whole, size):
        if values[j] > limit:
            out[count] = values[j] - shift
            count += 1
    return count


@cached_njit(nogil=True)
def next_state(state: np.uint64) -> np.uint64:
    """The next of a sequence of pseudo-random numbers (Marsaglia's xorshift64)."""
    state ^= state << np.uint64(13)
    state ^= state >> np.uint64(7)
    return state ^ (state << np.uint64(17))


@cached_njit(nogil=True)
def partition(values: np.ndarray, left: int, right: int, pivot: float) -> tuple[int, int]:
    """Hoare's partition of values[left : right + 1], larger ones first; returns where the two sides end.

    It stops at values equal to the pivot, so that ties split evenly.
    """
    while left <= right:
        while values[left] > pivot:
            left += 1
        while values[right] < pivot:
            right -= 1
        if left <= right:
            swap = values[left]
            values[left] = values[right]
            values[right] = swap
            left += 1
            right -= 1
    return left, right


@cached_njit(nogil=True)
def select_largest(values: np.ndarray, size: int, count: int) -> None:
    """Reorder values[:size] in place so that its `count` largest come first (quickselect, expected O(size))."""
    if count <= 0 or count >= size:
        return
    low, high, target = 0, size - 1, count - 1
    state = SEED
    while low < high:
        # A pseudo-random pivot: no order of real data is its worst case; the fixed seed keeps runs equal.
        state = next_state(state)
        left, right = partition(values, low, high, values[low + np.int64(state % np.uint64(high - low + 1))])
        if target <= right:
            high = right
        elif target >= left:
            low = left
        else:
            return


@cached_njit(nogil=True)
def sift_down(heap: np.ndarray, size: int, start: int, sign: float) -> None:
    """Restore the heap below `start`; sign +1 keeps the smallest value on top, -1 the largest."""
    value = heap[start]
    hole = start
    child = 2 * hole + 1
    while child < size:
        if child + 1 < size and sign * heap[child + 1] < sign * heap[child]:
            child += 1
        if sign * heap[child] >= sign * value:
            break
        heap[hole] = heap[child]
        hole = child
        child = 2 * hole + 1
    heap[hole] = value


@cached_njit(nogil=True)
def sift_up(heap: np.ndarray, start: int, sign: float) -> None:
    """Restore the heap above `start`; sign as in sift_down."""
    value = heap[start]
    hole = start
    while hole > 0:
        parent = (hole - 1) // 2
        if sign * heap[parent] <= sign * value:
            break
        heap[hole] = heap[parent]
        hole = parent
    heap[hole] = value


@cached_njit(nogil=True)
def heapify(heap: np.ndarray, size: int, sign: float) -> None:
    """Make heap[:size] a heap in O(size); sign as in sift_down."""
    for start in range(size // 2 - 1, -1, -1):
        sift_down(heap, size, start, sign)
