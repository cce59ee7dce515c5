"""Products of single pairs of rows, compiled by numba, single-threaded: import this only where numba is installed."""

from __future__ import annotations

import numpy as np

from approxkmv.compute.compiling import cached_njit


@cached_njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True)
def products(low, high, q, k, rows, keys, out):
    """out[t] = <q[rows[t]], k[keys[t]]> for t from low to high - 1."""
    d = q.shape[1]
    for t in range(low, high):
        i = rows[t]
        j = keys[t]
        total = np.float32(0.0)
        for p in range(d):
            total += q[i, p] * k[j, p]
        out[t] = total
