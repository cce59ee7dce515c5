"""The compiled loop of exact attention."""

from __future__ import annotations

from approxkmv.attention.kernels.exponentials import LOWEST
from approxkmv.attention.kernels.numbers import FLAGS, exp, f32
from approxkmv.compute.compiling import cached_njit


@cached_njit(fastmath=FLAGS, nogil=True)
def add_exponentials(logits, columns, numerators, row_sums):
    """row_sums (rows,) and numerators (d_v, rows) gain exp(logits) (rows, keys) times 1 and columns (d_v, keys)."""
    rows, keys = logits.shape
    width = columns.shape[0]
    for i in range(rows):
        total = f32(0.0)
        first = f32(0.0)
        for j in range(keys):
            e = exp(max(logits[i, j], f32(LOWEST)))
            logits[i, j] = e
            total += e
            first += e * columns[0, j]
        row_sums[i] += total
        numerators[0, i] += first
        for c in range(1, width):
            part = f32(0.0)
            for j in range(keys):
                part += logits[i, j] * columns[c, j]
            numerators[c, i] += part
