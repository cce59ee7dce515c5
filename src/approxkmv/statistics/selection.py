"""Order statistics by partition and by heap, compiled: the basis of both experiments."""

from __future__ import annotations

import numpy as np

from approxkmv.compute.compiling import cached_njit


@cached_njit(nogil=True)
def select_largest(values: np.ndarray, size: int, count: int) -> None:
    """Reorder values[:size] in place so that its `count` largest come first (quickselect, expected O(size))."""
    if count <= 0 or count >= size:
        return
    low, high, target = 0, size - 1, count - 1
    state = np.uint64(88172645463325252)
    while low < high:
        # A pseudo-random pivot: no order of real data is its worst case; the fixed seed keeps runs equal.
        state ^= state << np.uint64(13)
        state ^= state >> np.uint64(7)
        state ^= state << np.uint64(17)
        pivot = values[low + np.int64(state % np.uint64(high - low + 1))]
        left, right = low, high
        # Hoare's partition stops at values equal to the pivot, so that ties split evenly.
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
