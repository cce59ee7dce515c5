"""Experiment (i): the head-to-tail ratio c_i of every prefix of one head, in one pass over its kernel."""

from __future__ import annotations

import numpy as np

from approxkmv.compute.compiling import cached_njit
from approxkmv.statistics.exponential import exp_and_sum
from approxkmv.statistics.selection import append_above, heapify, select_largest, sift_down, sift_up, sum_of, sum_up_to

# Columns that are read together: two cache lines of a row.
STRIP = 16
# Candidates are cut back to the n largest when there are SLACK * n of them.
SLACK = 3
# A sum of exponentials above this triggers a new shift, before anything can overflow.
TOO_LARGE = 1e250


@cached_njit(nogil=True)
def _largest(log_values: np.ndarray, stop: int, causal: bool) -> float:
    largest = log_values[0, 0]
    for i in range(stop):
        for j in range(i + 1 if causal else stop):
            largest = max(largest, log_values[i, j])
    return largest


@cached_njit(nogil=True)
def _tile_above(
    tile: np.ndarray, rows: int, width: int, bound: float, far: np.ndarray, found: np.ndarray, counts: np.ndarray
) -> None:
    """Per column of tile (rows x width): add the values at most `bound` to far, append the others to found."""
    for r in range(rows):
        line = tile[r * width : (r + 1) * width]
        hits = 0
        for t in range(width):
            value = line[t]
            far[t] += value if value <= bound else 0.0
            hits += value > bound
        if hits > 0:
            for t in range(width):
                if line[t] > bound:
                    found[t, counts[t]] = line[t]
                    counts[t] += 1


@cached_njit(nogil=True)
def ratios_of_prefixes(log_values: np.ndarray, first: int, causal: bool, out: np.ndarray) -> None:
    """c_i of log_values[:i, :i] for i = first..n, written to out[i - first].

    c_i = (sum of all entries of K[:i, :i] - sum of its i largest) / (sum of its i largest), K = exp(log_values) up to
    any constant factor; with `causal` only the entries on and below the diagonal exist.

    A prefix grows by one row and one column. A sum of the i <= n largest entries never needs an entry that is not among
    the n largest seen so far, so those n (up to SLACK n between cuts) are kept as candidates, and every other entry
    goes at once into a running sum of the far tail, which only grows: nothing is subtracted, so a small tail keeps its
    digits. Among the candidates one heap holds the i largest (the head), a second one the rest. About n ln n entries
    become candidates; each of the others costs an exp, a comparison and an addition. Entries equal to the bound are
    interchangeable with candidates, so ties need no special care.

    Columns are read in strips of STRIP, part of a row at a time, so that the matrix passes through the cache once.
    Exponentials are relative to a reference that loosely follows the largest entry seen: it moves only when a sum would
    exceed TOO_LARGE. A strip in which that happens is redone one column at a time.

    Args:
        log_values: (n, n) float64, finite. first: the first prefix, at least 1. causal: only entries j <= i.
        out: (n - first + 1,) float64.
    Cost: O(n^2), and O(log n) per candidate; if more than n/8 arrive at once, the heaps are rebuilt in O(n).
    """
    n = log_values.shape[0]
    tile = np.empty(STRIP * n)
    tile_exp = np.empty(STRIP * n)
    column_far = np.empty(STRIP)
    found = np.empty((STRIP, n))
    counts = np.empty(STRIP, np.int64)
    rows_exp = np.empty((STRIP, n))
    # Until the first prefix is reached everything above the bound is collected: up to first^2 entries.
    capacity = (SLACK + 3) * n + first * first
    head = np.empty(capacity)  # heap, smallest on top
    rest = np.empty(capacity)  # heap, largest on top
    head_size = 0
    rest_size = 0
    far = 0.0
    # Entries at or below the bound are not among the n largest. There is no bound before n entries are there.
    bound = -1.0
    reference = log_values[0, 0]
    start = 0
    width = STRIP
    while start < n:
        width = min(width, n - start)
        stop = start + width
        # 1. Exponentials of the strip: its columns above its own rows, and its rows up to its own columns.
        everything = 0.0
        if not causal and start > 0:
            for r in range(start):
                for t in range(width):
                    tile[r * width + t] = log_values[r, start + t]
            everything = exp_and_sum(tile, start * width, reference, tile_exp)
        for i in range(start, stop):
            everything += exp_and_sum(log_values[i], i + 1 if causal else stop, reference, rows_exp[i - start])
        if everything > TOO_LARGE:
            if width > 1:
                width = 1
                continue
            largest = _largest(log_values, stop, causal)
            # In two factors: sums of up to TOO_LARGE may be normal numbers where the whole factor is none.
            factor = np.exp(max(reference - largest, -700.0))
            other = np.exp(min(reference - largest + 700.0, 0.0))
            for t in range(head_size):
                head[t] = head[t] * factor * other
            for t in range(rest_size):
                rest[t] = rest[t] * factor * other
            far = far * factor * other
            if bound > 0.0:
                bound = bound * factor * other
            reference = largest
            continue
        for t in range(width):
            column_far[t] = 0.0
            counts[t] = 0
        if not causal:
            _tile_above(tile_exp, start, width, bound, column_far, found, counts)
        # 2. The prefixes of the strip, one by one.
        for i in range(start, stop):
            t = i - start
            old_size = rest_size
            new_size = append_above(rows_exp[t], i + 1, bound, 0.0, rest, rest_size)
            far += sum_up_to(rows_exp[t], rows_exp[t], i + 1, bound)
            if not causal:
                far += column_far[t]
                for j in range(counts[t]):
                    rest[new_size] = found[t, j]
                    new_size += 1
                for r in range(t):
                    value = rows_exp[r, i]
                    if value > bound:
                        rest[new_size] = value
                        new_size += 1
                    else:
                        far += value
            added = new_size - old_size
            if i + 1 < first:
                rest_size = new_size
                continue
            if i + 1 == first or added > n // 8:
                # Many at once: put all together, select, and rebuild both heaps.
                rest_size = new_size
                for j in range(head_size):
                    rest[rest_size + j] = head[j]
                rest_size += head_size
                if rest_size > n:
                    select_largest(rest, rest_size, n)
                    far += sum_of(rest, n, rest_size)
                    rest_size = n
                    bound = rest[0]
                    for j in range(1, n):
                        bound = min(bound, rest[j])
                head_size = i + 1
                select_largest(rest, rest_size, head_size)
                rest_size -= head_size
                for j in range(head_size):
                    head[j] = rest[j]
                for j in range(rest_size):
                    rest[j] = rest[head_size + j]
                heapify(head, head_size, 1.0)
                heapify(rest, rest_size, -1.0)
            else:
                for j in range(old_size, new_size):
                    value = rest[j]
                    if value > head[0]:
                        # It replaces the smallest of the head, which moves to the rest.
                        smallest = head[0]
                        head[0] = value
                        sift_down(head, head_size, 0, 1.0)
                        value = smallest
                    rest[rest_size] = value
                    sift_up(rest, rest_size, -1.0)
                    rest_size += 1
                # The head of this prefix has one more place.
                head[head_size] = rest[0]
                sift_up(head, head_size, 1.0)
                head_size += 1
                rest_size -= 1
                rest[0] = rest[rest_size]
                sift_down(rest, rest_size, 0, -1.0)
                if head_size + rest_size > SLACK * n:
                    keep = n - head_size
                    select_largest(rest, rest_size, keep)
                    far += sum_of(rest, keep, rest_size)
                    rest_size = keep
                    bound = head[0]
                    for j in range(keep):
                        bound = min(bound, rest[j])
                    heapify(rest, rest_size, -1.0)
            out[i + 1 - first] = (far + sum_of(rest, 0, rest_size)) / sum_of(head, 0, head_size)
        start = stop
        width = STRIP
