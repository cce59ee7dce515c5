"""Experiment (ii): the n-th, (n+1)-th and 2n-th largest entries of one head's kernel."""

from __future__ import annotations

import numpy as np

from approxkmv.compute.compiling import cached_njit
from approxkmv.statistics.selection import SEED, next_state, select_largest

SAMPLE = 2048


@cached_njit(nogil=True)
def order_logarithms(log_values: np.ndarray, causal: bool, out: np.ndarray) -> None:
    """Log K_(n), log K_(n+1) and log K_(2n) of an (n, n) matrix of logarithms, written to out[:3].

    A sample suggests a bound that about 4n entries exceed, so that the selection runs over those instead of n^2. If the
    bound admits too few or far too many, it runs over all. The result is exact either way.

    Args:
        log_values: (n, n) float64, finite. causal: only the entries on and below the diagonal exist.
        out: (3,) float64. There must be 2n entries: n >= 2, or n >= 3 if causal.
    """
    n = log_values.shape[0]
    entries = n * (n + 1) // 2 if causal else n * n
    room = min(entries, 12 * n)
    kept = np.empty(room)
    count = 0
    # If there is room for only half of what is wanted, select from all entries at once.
    if entries > 2 * room:
        sample = np.empty(SAMPLE)
        state = SEED
        for t in range(SAMPLE):
            state = next_state(state)
            i = np.int64((state >> np.uint64(33)) % np.uint64(n))
            j = np.int64((state >> np.uint64(3)) % np.uint64(n))
            if causal and j > i:
                i, j = j, i
            sample[t] = log_values[i, j]
        # n^2 / 4n: each sampled entry represents entries / SAMPLE entries (approximately, for the triangle).
        wanted = max(4, (4 * n * SAMPLE) // entries)
        sample.sort()
        bound = sample[SAMPLE - wanted]
        for i in range(n):
            stop = i + 1 if causal else n
            row = log_values[i]
            for start in range(0, stop, 32):
                end = min(start + 32, stop)
                hits = 0
                for j in range(start, end):
                    hits += row[j] >= bound
                if hits > 0:
                    if count + hits > room:
                        count = room + 1
                        break
                    for j in range(start, end):
                        if row[j] >= bound:
                            kept[count] = row[j]
                            count += 1
            if count > room:
                break
    if count < 2 * n or count > room:
        kept = np.empty(entries)
        count = 0
        for i in range(n):
            for j in range(i + 1 if causal else n):
                kept[count] = log_values[i, j]
                count += 1
    select_largest(kept, count, 2 * n)
    out[2] = kept[: 2 * n].min()
    select_largest(kept, 2 * n, n)
    out[0] = kept[:n].min()
    out[1] = kept[n : 2 * n].max()
