"""Loops compiled by numba, one core each and free of Python's lock: import this only where numba is installed.

numba's own threads are not used: its OpenMP layer changes the number of threads that torch runs.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from approxkmv.attention.tiles import KEYS, LANES, multiply_tile

_QUERIES = 64  # queries of a panel, so that it and their logits stay in the first cache
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
def shifted_exponentials(logits, skip_from, skip_to, columns, shifts, sums):
    """logits (rows, keys) become exp(logits - shifts), or 0 for the keys skip_from_i to skip_to_i - 1 of row i.

    shifts (rows,) rise to the largest logit that is not skipped, and stay where that is less; sums (rows, width) are
    the products with columns (width, keys).
    """
    rows, keys = logits.shape
    width = columns.shape[0]
    for i in range(rows):
        for j in range(skip_from[i], skip_to[i]):
            logits[i, j] = _f(-1e30)
        top = shifts[i]
        for j in range(keys):
            top = max(top, logits[i, j])
        shifts[i] = top
        for j in range(keys):
            logits[i, j] = _exp(logits[i, j] - top)
        for j in range(skip_from[i], skip_to[i]):
            logits[i, j] = _f(0.0)
        for c in range(width):
            part = _f(0.0)
            for j in range(keys):
                part += logits[i, j] * columns[c, j]
            sums[i, c] = part


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def nearest(distances, points, labels):
    """labels (rows,) = the column with the least of distances (rows, columns) + |points|^2, which is not negative.

    The bits of a float32 that is not negative are in the order of the numbers; with the column in place of the last
    ones a single minimum of integers, which the compiler vectorises, finds both. Distances that agree to 12 bits or
    more may be taken for equal: for a clustering they are.
    """
    columns = distances.shape[1]
    places = 1
    while places < columns:
        places *= 2
    mask = np.int32(places - 1)
    keep = np.int32(-places)
    for i in range(len(labels)):
        least = np.int32(2147483647)
        square = _f(0.0)
        for p in range(points.shape[1]):
            square += points[i, p] * points[i, p]
        for j in range(columns):
            x = _f(max(distances[i, j] + square, _f(0.0)))
            least = min(least, (x.view(np.int32) & keep) | np.int32(j))
        labels[i] = least & mask


@njit(inline="always")
def _bits(x):
    """The upper half of a float32's bits, rounded to nearest even: a bfloat16."""
    whole = np.float32(x).view(np.uint32)
    return np.uint16((whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def _widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def fill_features(low, high, k, mean, along, middle, v, tilted, features):
    """Rows low to high - 1 of features: [(along - middle)^2 | k - mean | 1 | v | each column of v times k - mean].

    features and along are bfloat16 as bits.
    """
    d = k.shape[1]
    width = v.shape[1]
    squares = along.shape[1]
    for j in range(low, high):
        for p in range(squares):
            x = _widened(along[j, p]) - middle[p]
            features[j, p] = _bits(x * x)
        for p in range(d):
            features[j, squares + p] = _bits(k[j, p] - mean[p])
        at = squares + d
        features[j, at] = _bits(_f(1.0))
        for c in range(width):
            features[j, at + 1 + c] = _bits(v[j, c])
        at += 1 + width
        if tilted:
            for c in range(width):
                for p in range(d):
                    features[j, at + p] = _bits(v[j, c] * (k[j, p] - mean[p]))
                at += d


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def fill_weights(low, high, logs, highest, thresholds, weights, counts):
    """Blocks low to high - 1, bfloat16 as bits: weights = exp(logs - highest), 0 at the near keys, and their counts.

    A key is near where its log is at least the block's threshold.
    """
    for b in range(low, high):
        top = highest[b]
        bar = thresholds[b]
        count = np.int32(0)
        for j in range(logs.shape[1]):
            x = _widened(logs[b, j])
            count += np.int32(x >= bar)
            # Below -87 the weight is as good as zero.
            weights[b, j] = _bits(_f(0.0) if x >= bar else _exp(x - top))
        counts[b] = count


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def list_near(low, high, logs, thresholds, ends, chosen):
    """The near keys of blocks low to high - 1, counted by fill_weights, into chosen[ends[b - 1]:ends[b]]."""
    for b in range(low, high):
        bar = thresholds[b]
        at = ends[b - 1] if b > 0 else 0
        end = ends[b]
        for j in range(logs.shape[1]):
            # Written in any case and kept if near: a branch on every key would be guessed wrong too often.
            if at < end:
                chosen[at] = j
                at += np.int64(_widened(logs[b, j]) >= bar)


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def centre_blocks(q, points, order, firsts, counts, starts, deltas, centres, variances):
    """Fill deltas (rows, d), centres (blocks, d) and variances (blocks, r), block after block.

    q (n, d) queries, whose centre and distances from it are wanted; points (n, r), whose variance is.
    """
    d = q.shape[1]
    r = points.shape[1]
    middle = np.empty(r, np.float32)
    for b in range(len(counts)):
        share = _f(1.0) / _f(counts[b])
        for p in range(d):
            centres[b, p] = _f(0.0)
        for p in range(r):
            middle[p] = _f(0.0)
            variances[b, p] = _f(0.0)
        for i in range(counts[b]):
            query = order[firsts[b] + i]
            for p in range(d):
                centres[b, p] += q[query, p]
            for p in range(r):
                middle[p] += points[query, p]
        for p in range(d):
            centres[b, p] *= share
        for p in range(r):
            middle[p] *= share
        for i in range(counts[b]):
            query = order[firsts[b] + i]
            row = starts[b] + i
            for p in range(d):
                deltas[row, p] = q[query, p] - centres[b, p]
            for p in range(r):
                delta = points[query, p] - middle[p]
                variances[b, p] += delta * delta
        for p in range(r):
            variances[b, p] *= share


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def project(low, high, deltas, starts, sizes, axes, out):
    """out (rows, r) = deltas (rows, d) times their block's axes (blocks, r, d), for the blocks low to high - 1."""
    for b in range(low, high):
        for i in range(starts[b], starts[b] + sizes[b]):
            for c in range(axes.shape[1]):
                dot = _f(0.0)
                for p in range(axes.shape[2]):
                    dot += deltas[i, p] * axes[b, c, p]
                out[i, c] = dot


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def sums_of_keys(low, high, deltas, starts, sizes, chosen, ends, k, mean, v, extra, centres, scales, sums):
    """Sums of exp(q.(k - mean) + extra) [1, v] over the chosen keys of the blocks low to high - 1, for their queries.

    q is its block's centre plus its row of deltas (rows, d); chosen[ends[b-1]:ends[b]] are the keys of block b.
    scales (blocks,) receives the exponent that the block's sums are divided by; sums (rows, 1 + d_v) the row sums and
    the numerators.
    """
    d = k.shape[1]
    width = v.shape[1]
    panel = np.zeros((d, _QUERIES), np.float32)
    start = np.zeros(_QUERIES, np.float32)
    logits = np.zeros((KEYS, _QUERIES), np.float32)
    totals = np.zeros((1 + width, _QUERIES), np.float32)
    for b in range(low, high):
        begin = ends[b - 1] if b > 0 else 0
        count = ends[b] - begin
        # The last tile is filled with key 0 at weight 0.
        whole = (count + KEYS - 1) // KEYS * KEYS
        places = np.zeros(whole, np.int64)
        pairs = np.zeros((whole, 1 + width), np.float32)
        shift = _f(-np.inf)
        for j in range(count):
            key = chosen[begin + j]
            places[j] = key
            dot = _f(0.0)
            for p in range(d):
                dot += centres[b, p] * (k[key, p] - mean[p])
            dot += extra[begin + j]
            pairs[j, 0] = dot
            shift = max(shift, dot)
        scales[b] = shift
        for j in range(count):
            weight = _exp(pairs[j, 0] - shift)
            pairs[j, 0] = weight
            for c in range(width):
                pairs[j, 1 + c] = weight * v[places[j], c]
        for i in range(starts[b], starts[b] + sizes[b], _QUERIES):
            some = min(_QUERIES, starts[b] + sizes[b] - i)
            span = (some + LANES - 1) // LANES * LANES
            for t in range(some):
                dot = _f(0.0)
                for p in range(d):
                    x = deltas[i + t, p]
                    panel[p, t] = x
                    dot += x * mean[p]
                start[t] = -dot
            for c in range(1 + width):
                for t in range(span):
                    totals[c, t] = _f(0.0)
            for j in range(0, whole, KEYS):
                for t in range(0, span, LANES):
                    multiply_tile(k, places, j, panel, t, start, logits)  # type: ignore[call-arg]
                for r in range(0, KEYS, 4):
                    for t in range(span):
                        logits[r, t] = _exp(logits[r, t])
                        logits[r + 1, t] = _exp(logits[r + 1, t])
                        logits[r + 2, t] = _exp(logits[r + 2, t])
                        logits[r + 3, t] = _exp(logits[r + 3, t])
                    for c in range(1 + width):
                        w0 = pairs[j + r, c]
                        w1 = pairs[j + r + 1, c]
                        w2 = pairs[j + r + 2, c]
                        w3 = pairs[j + r + 3, c]
                        for t in range(span):
                            totals[c, t] += (
                                w0 * logits[r, t]
                                + w1 * logits[r + 1, t]
                                + w2 * logits[r + 2, t]
                                + w3 * logits[r + 3, t]
                            )
            for c in range(1 + width):
                for t in range(some):
                    sums[i + t, c] = totals[c, t]
