"""Compiled loops that partition queries into blocks."""

from __future__ import annotations

import numpy as np

from approxkmv.attention.kernels.numbers import FLAGS, f32
from approxkmv.compute.compiling import cached_njit


@cached_njit(fastmath=FLAGS, nogil=True)
def nearest(distances, points, labels):
    """Set labels (rows,) to the column that minimises distances (rows, columns) + |points|^2, which is non-negative.

    The bits of non-negative float32 numbers sort like the numbers. With the column in the lowest bits, one integer
    minimum, which the compiler vectorises, finds both. Distances that agree to 12 bits or more may count as equal,
    which is accurate enough for clustering.
    """
    columns = distances.shape[1]
    places = 1
    while places < columns:
        places *= 2
    mask = np.int32(places - 1)
    keep = np.int32(-places)
    for i in range(len(labels)):
        least = np.int32(2147483647)
        square = f32(0.0)
        for p in range(points.shape[1]):
            square += points[i, p] * points[i, p]
        for j in range(columns):
            x = f32(max(distances[i, j] + square, f32(0.0)))
            least = min(least, (x.view(np.int32) & keep) | np.int32(j))
        labels[i] = least & mask


@cached_njit(fastmath=FLAGS, nogil=True)
def spreads(points, others, sampled, out):
    """Fill out (n,) with `reach.spreads` of points (n, d) and others (m, d), estimated from `sampled` rows."""
    d = points.shape[1]
    middle, mean, variances = np.zeros(d, np.float32), np.zeros(d, np.float32), np.zeros(d, np.float32)
    step = max(1, len(points) // sampled)
    for i in range(0, len(points), step):
        for p in range(d):
            middle[p] += points[i, p]
    middle /= f32(-(-len(points) // step))
    step = max(1, len(others) // sampled)
    share = f32(1.0) / f32(-(-len(others) // step))
    for i in range(0, len(others), step):
        for p in range(d):
            mean[p] += others[i, p] * share
    for i in range(0, len(others), step):
        for p in range(d):
            x = others[i, p] - mean[p]
            variances[p] += x * x * share
    for i in range(len(points)):
        whole = f32(0.0)
        for p in range(d):
            x = points[i, p] - middle[p]
            whole += x * x * variances[p]
        out[i] = whole


@cached_njit(nogil=True)
def group(labels, multiple):
    """queries, rows, labels, starts and sizes of `Blocks` from labels (n,), one block for each label that occurs.

    A block's rows are padded to a multiple of `multiple`.
    """
    n = len(labels)
    counts = np.zeros(labels.max() + 1, np.int64)
    for i in range(n):
        counts[labels[i]] += 1
    number = np.count_nonzero(counts)
    block_of_label = np.empty(len(counts), np.int64)
    starts, sizes, following = np.empty(number, np.int64), np.empty(number, np.int64), np.empty(number, np.int64)
    b = whole = 0
    for label in range(len(counts)):
        if counts[label] > 0:
            block_of_label[label] = b
            starts[b] = following[b] = whole
            sizes[b] = (counts[label] + multiple - 1) // multiple * multiple
            whole += sizes[b]
            b += 1
    queries = np.full(whole, -1)
    rows, block_of = np.empty(n, np.int64), np.empty(n, np.int64)
    for i in range(n):
        b = block_of_label[labels[i]]
        queries[following[b]] = i
        rows[i] = following[b]
        block_of[i] = b
        following[b] += 1
    return queries, rows, block_of, starts, sizes


@cached_njit(fastmath=FLAGS, nogil=True)
def centre_blocks(q, scale, points, importance, blocks):
    """Fill deltas, centres, variances and row_variances of blocks (a BlockArrays), block after block.

    q (n, d) times scale are the queries, from which centres and deltas are computed. variances and row_variances are
    computed from points (n, r): per block along each axis, and per row over the axes weighted by importance (r,).
    """
    queries, starts, sizes = blocks.queries, blocks.starts, blocks.sizes
    centres, deltas, variances, row_variances = blocks.centres, blocks.deltas, blocks.variances, blocks.row_variances
    d = q.shape[1]
    r = points.shape[1]
    middle = np.empty(r, np.float32)
    for b in range(len(starts)):
        first = starts[b]
        last = first + sizes[b]
        # Padding comes last in a block.
        while queries[last - 1] < 0:
            last -= 1
            deltas[last, :] = f32(0.0)
            row_variances[last] = f32(0.0)
        share = f32(1.0) / f32(last - first)
        for p in range(d):
            centres[b, p] = f32(0.0)
        for p in range(r):
            middle[p] = f32(0.0)
            variances[b, p] = f32(0.0)
        for row in range(first, last):
            query = queries[row]
            for p in range(d):
                centres[b, p] += q[query, p]
            for p in range(r):
                middle[p] += points[query, p]
        for p in range(d):
            centres[b, p] *= share * scale
        for p in range(r):
            middle[p] *= share
        for row in range(first, last):
            query = queries[row]
            for p in range(d):
                deltas[row, p] = q[query, p] * scale - centres[b, p]
            whole = f32(0.0)
            for p in range(r):
                delta = points[query, p] - middle[p]
                square = delta * delta
                variances[b, p] += square
                whole += square * importance[p]
            row_variances[row] = whole
        for p in range(r):
            variances[b, p] *= share
