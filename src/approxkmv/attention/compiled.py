"""Loops compiled by numba, one core each and free of Python's lock: import this only where numba is installed.

numba's own threads are not used: its OpenMP layer changes the number of threads that torch runs.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_KEYS = 128  # keys of a panel: one value per key and query in flight, four queries at a time, fits the first cache
_f = np.float32
# Sums may be reordered, or nothing is vectorised; NaN and infinity keep their meaning.
_FLAGS = {"reassoc", "contract", "nsz", "arcp"}


@njit(inline="always")
def _exp(x):
    """exp(x) in float32 to about 2e-7, clamped to where it is a normal number: 2^i times a polynomial."""
    x = min(max(x, _f(-87.0)), _f(88.0))
    i = np.floor(x * _f(1.4426950408889634) + _f(0.5))
    # log 2 in two parts, so that the remainder is exact
    r = x - i * _f(0.693359375)
    r = r + i * _f(2.12194440e-4)
    p = _f(1.0 / 5040)
    p = p * r + _f(1.0 / 720)
    p = p * r + _f(1.0 / 120)
    p = p * r + _f(1.0 / 24)
    p = p * r + _f(1.0 / 6)
    p = p * r + _f(0.5)
    p = p * r * r + r + _f(1.0)
    return p * np.int32((np.int32(i) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def add_exponentials(logits, columns, numerators, row_sums):
    """row_sums (rows,) and numerators (d_v, rows) gain exp(logits) (rows, keys) times 1 and columns (d_v, keys)."""
    rows, keys = logits.shape
    width = columns.shape[0]
    for i in range(rows):
        total = _f(0.0)
        first = _f(0.0)
        for j in range(keys):
            e = _exp(logits[i, j])
            logits[i, j] = e
            total += e
            first += e * columns[0, j]
        row_sums[i] += total
        numerators[0, i] += first
        for c in range(1, width):
            part = _f(0.0)
            for j in range(keys):
                part += logits[i, j] * columns[c, j]
            numerators[c, i] += part


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def nearest(distances, labels):
    """labels (rows,) = the first column with the least of distances (rows, columns), which are finite."""
    columns = distances.shape[1]
    for i in range(len(labels)):
        least = distances[i, 0]
        for j in range(1, columns):
            least = min(least, distances[i, j])
        j = 0
        while distances[i, j] != least and j < columns - 1:
            j += 1
        labels[i] = j


@njit(inline="always")
def _bits(x):
    """The upper half of a float32's bits, rounded to nearest even: a bfloat16."""
    whole = np.float32(x).view(np.uint32)
    return np.uint16((whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def _widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def fill_features(low, high, k, v, squares, axes, tilted, features):
    """Rows low to high - 1 of features, bfloat16 as bits: [squares | k | 1 | v | each column of v times k's axes]."""
    d = k.shape[1]
    width = v.shape[1]
    for j in range(low, high):
        for p in range(squares):
            features[j, p] = _bits(k[j, p] * k[j, p])
        for p in range(d):
            features[j, squares + p] = _bits(k[j, p])
        at = squares + d
        features[j, at] = _bits(_f(1.0))
        for c in range(width):
            features[j, at + 1 + c] = _bits(v[j, c])
        at += 1 + width
        if tilted:
            for c in range(width):
                for p in range(axes):
                    features[j, at + p] = _bits(v[j, c] * k[j, p])
                at += axes


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def fill_weights(low, high, logs, highest, thresholds, is_near, weights):
    """Blocks low to high - 1, bfloat16 as bits: is_near = logs >= thresholds, weights = exp(logs - highest) or 0."""
    for b in range(low, high):
        top = highest[b]
        bar = thresholds[b]
        for j in range(logs.shape[1]):
            x = _widened(logs[b, j])
            is_near[b, j] = x >= bar
            # Above the bar the weight is zero, and below -87 as good as zero.
            weights[b, j] = _bits(_f(0.0) if x >= bar else _exp(x - top))


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def centre_blocks(q, order, firsts, counts, starts, deltas, centres, variances):
    """Fill deltas (rows, d), centres and variances (blocks, d) from the queries q (n, d), block after block."""
    d = q.shape[1]
    for b in range(len(counts)):
        share = _f(1.0) / _f(counts[b])
        for p in range(d):
            centres[b, p] = _f(0.0)
            variances[b, p] = _f(0.0)
        for i in range(counts[b]):
            query = order[firsts[b] + i]
            for p in range(d):
                centres[b, p] += q[query, p]
        for p in range(d):
            centres[b, p] *= share
        for i in range(counts[b]):
            query = order[firsts[b] + i]
            row = starts[b] + i
            for p in range(d):
                delta = q[query, p] - centres[b, p]
                deltas[row, p] = delta
                variances[b, p] += delta * delta
        for p in range(d):
            variances[b, p] *= share


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def sums_of_keys(low, high, deltas, starts, sizes, chosen, ends, k, v, extra, centres, scales, sums):
    """Sums of exp(q.k + extra) [1, v] over the chosen keys of the blocks low to high - 1, for each of their queries.

    deltas (rows, d) with d, starts and sizes multiples of 4; chosen[ends[b-1]:ends[b]] the keys of block b. scales
    (blocks,) receives the exponent that the block's sums are divided by; sums (rows, 1 + d_v), zero on entry, the row
    sums and the numerators.
    """
    d = deltas.shape[1]
    width = v.shape[1]
    for b in range(low, high):
        begin = ends[b - 1] if b > 0 else 0
        count = ends[b] - begin
        panel = np.zeros((d, _KEYS), np.float32)
        pairs = np.zeros((1 + width, _KEYS), np.float32)
        base = np.empty(count, np.float32)
        a0 = np.empty(_KEYS, np.float32)
        a1 = np.empty(_KEYS, np.float32)
        a2 = np.empty(_KEYS, np.float32)
        a3 = np.empty(_KEYS, np.float32)
        shift = _f(-np.inf)
        for j in range(count):
            key = chosen[begin + j]
            dot = _f(0.0)
            for p in range(d):
                dot += centres[b, p] * k[key, p]
            dot += extra[begin + j]
            base[j] = dot
            shift = max(shift, dot)
        scales[b] = shift
        for first in range(0, count, _KEYS):
            some = min(_KEYS, count - first)
            # Whole vectors, up to what is left
            span = (some + 31) // 32 * 32
            for j in range(some):
                key = chosen[begin + first + j]
                for p in range(d):
                    panel[p, j] = k[key, p]
                weight = _exp(base[first + j] - shift)
                pairs[0, j] = weight
                for c in range(width):
                    pairs[1 + c, j] = weight * v[key, c]
            for j in range(some, span):
                for c in range(1 + width):
                    pairs[c, j] = _f(0.0)
            for i in range(starts[b], starts[b] + sizes[b], 4):
                for j in range(span):
                    a0[j] = _f(0.0)
                    a1[j] = _f(0.0)
                    a2[j] = _f(0.0)
                    a3[j] = _f(0.0)
                for p in range(0, d, 4):
                    p0 = deltas[i, p]
                    p1 = deltas[i, p + 1]
                    p2 = deltas[i, p + 2]
                    p3 = deltas[i, p + 3]
                    q0 = deltas[i + 1, p]
                    q1 = deltas[i + 1, p + 1]
                    q2 = deltas[i + 1, p + 2]
                    q3 = deltas[i + 1, p + 3]
                    r0 = deltas[i + 2, p]
                    r1 = deltas[i + 2, p + 1]
                    r2 = deltas[i + 2, p + 2]
                    r3 = deltas[i + 2, p + 3]
                    s0 = deltas[i + 3, p]
                    s1 = deltas[i + 3, p + 1]
                    s2 = deltas[i + 3, p + 2]
                    s3 = deltas[i + 3, p + 3]
                    for j in range(span):
                        x0 = panel[p, j]
                        x1 = panel[p + 1, j]
                        x2 = panel[p + 2, j]
                        x3 = panel[p + 3, j]
                        a0[j] += p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3
                        a1[j] += q0 * x0 + q1 * x1 + q2 * x2 + q3 * x3
                        a2[j] += r0 * x0 + r1 * x1 + r2 * x2 + r3 * x3
                        a3[j] += s0 * x0 + s1 * x1 + s2 * x2 + s3 * x3
                for j in range(span):
                    a0[j] = _exp(a0[j])
                    a1[j] = _exp(a1[j])
                    a2[j] = _exp(a2[j])
                    a3[j] = _exp(a3[j])
                for c in range(1 + width):
                    t0 = _f(0.0)
                    t1 = _f(0.0)
                    t2 = _f(0.0)
                    t3 = _f(0.0)
                    for j in range(span):
                        x = pairs[c, j]
                        t0 += a0[j] * x
                        t1 += a1[j] * x
                        t2 += a2[j] * x
                        t3 += a3[j] * x
                    sums[i, c] += t0
                    sums[i + 1, c] += t1
                    sums[i + 2, c] += t2
                    sums[i + 3, c] += t3
