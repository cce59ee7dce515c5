"""The softmax matrix D^-1 A of one head: its c, without the row factor, and the stronger assumption."""

from __future__ import annotations

import numpy as np

from approxkmv.compute.compiling import cached_njit
from approxkmv.statistics.exponential import exp_and_sum
from approxkmv.statistics.selection import select_largest

# Replaces 0 where a logarithm is taken: exp_and_sum returns nothing smaller.
SMALLEST = 1e-307
# How many numbers softmax_statistics writes; it cannot check the length of `out`.
WRITTEN = 3


@cached_njit(nogil=True)
def softmax_statistics(log_values: np.ndarray, causal: bool, out: np.ndarray) -> None:
    """Statistics of P = D^-1 A, A = exp(log_values) with its rows divided by their sums, written to `out`.

    out[0]: (sum of all entries - sum of the n largest) / (sum of the n largest), like c of the kernel.
    out[1]: log P_(n+1), the largest entry outside the head.
    out[2]: n max_j sum_i P_ij^2, the largest squared norm of a column, times n.

    A factor per row of log_values cancels in D^-1 A. Every row has an entry of at least 1/n, so the n largest are all
    at least that: only those are gathered and selected from, and working with P instead of its logarithm loses nothing.

    Args:
        log_values: (n, n) float64, finite. causal: only the entries on and below the diagonal exist.
        out: (WRITTEN,) float64. There must be more than n entries: n >= 2.
    """
    n = log_values.shape[0]
    # Slightly below 1/n, for the rounding of a uniform row.
    bound = (1.0 - 1e-9) / n
    gathered = np.empty(8 * n)
    count = 0
    row = np.empty(n)
    columns = np.zeros(n)
    far = 0.0
    far_largest = 0.0
    for i in range(n):
        size = i + 1 if causal else n
        values = log_values[i]
        largest = values[0]
        for j in range(1, size):
            largest = max(largest, values[j])
        scale = 1.0 / exp_and_sum(values, size, largest, row)
        if count + size > gathered.size:
            wider = np.empty(2 * (count + size))
            wider[:count] = gathered[:count]
            gathered = wider
        for j in range(size):
            value = row[j] * scale
            columns[j] += value * value
            if value >= bound:
                gathered[count] = value
                count += 1
            else:
                far += value
                far_largest = max(far_largest, value)
    select_largest(gathered, count, n)
    head = 0.0
    for t in range(n):
        head += gathered[t]
    tail = far
    for t in range(n, count):
        tail += gathered[t]
        far_largest = max(far_largest, gathered[t])
    out[0] = tail / head
    out[1] = np.log(max(far_largest, SMALLEST))
    out[2] = n * columns.max()
