"""The compiled loop of methods that sort queries and keys by a hash."""

from __future__ import annotations

from approxkmv.attention.kernels.exponentials import LOWEST
from approxkmv.attention.kernels.numbers import FLAGS, exp, f32
from approxkmv.compute.compiling import cached_njit


@cached_njit(fastmath=FLAGS, nogil=True)
def shifted_exponentials(logits, skip_from, skip_to, columns, shifts, sums):
    """logits (rows, keys) become exp(logits - shifts), or 0 for the keys skip_from_i to skip_to_i - 1 of row i.

    shifts (rows,) rise to the largest logit that is not skipped, and stay where that is less; sums (rows, width) are
    the products with columns (width, keys).
    """
    rows, keys = logits.shape
    width = columns.shape[0]
    for i in range(rows):
        for j in range(skip_from[i], skip_to[i]):
            logits[i, j] = f32(-1e30)
        top = shifts[i]
        for j in range(keys):
            top = max(top, logits[i, j])
        shifts[i] = top
        for j in range(keys):
            logits[i, j] = exp(max(logits[i, j] - top, f32(LOWEST)))
        for j in range(skip_from[i], skip_to[i]):
            logits[i, j] = f32(0.0)
        for c in range(width):
            part = f32(0.0)
            for j in range(keys):
                part += logits[i, j] * columns[c, j]
            sums[i, c] = part
