"""Both block methods for a single block of all queries, each in one compiled call."""

from __future__ import annotations

import numpy as np

from approxkmv.attention.blocks.loops.clustering import centre_blocks
from approxkmv.attention.blocks.loops.expansion import centre_far, expanded_answers, fill_weights, list_near, see
from approxkmv.attention.blocks.loops.gathered import FEW_COLUMNS, sums_of_keys, wide_sums_of_keys
from approxkmv.attention.blocks.loops.sampling import controlled_sums, draw_light
from approxkmv.attention.kernels.numbers import FLAGS, f32
from approxkmv.compute.compiling import cached_njit


@cached_njit(fastmath=FLAGS, nogil=True)
def _expand_one_block(q, scale, k, v, kept, begin, step, tilts, deltas, logs, weights):
    """`expansion.expand` for one block of all queries and no axes, returned in the parts that the functions below need.

    Scratch: deltas (n_q, d), logs (1, n_k), weights (1, 1 + tilts, n_k).
    """
    n_q, d = q.shape
    n_k, width = v.shape
    mean = np.zeros(d, np.float32)
    for j in range(n_k):
        for p in range(d):
            mean[p] += k[j, p]
    mean /= f32(n_k)
    starts, sizes, queries = np.zeros(1, np.int64), np.full(1, n_q), np.arange(n_q)
    centres, row_variances = np.empty((1, d), np.float32), np.empty(n_q, np.float32)
    no_points, no_axes = np.empty((n_q, 0), np.float32), np.empty((d, 0), np.float32)
    no_variances = np.empty((1, 0), np.float32)
    centre_blocks(
        q, scale, no_points, no_variances[0], queries, starts, sizes, deltas, centres, no_variances, row_variances
    )
    for j in range(n_k):
        dot = f32(0.0)
        for p in range(d):
            dot += centres[0, p] * (k[j, p] - mean[p])
        logs[0, j] = dot
    columns = np.ascontiguousarray(v[:, :tilts].T)
    counts, thresholds, highest = np.empty(1, np.int64), np.empty(1, np.float32), np.empty(1, np.float32)
    totals, far_value = np.empty(1, np.float32), np.zeros((1, width), np.float32)
    fill_weights(
        0, 1, logs, kept, begin, step, columns, weights, counts, highest, thresholds, totals, far_value[:, :tilts]
    )
    chosen = np.empty(counts[0], np.int64)
    list_near(0, 1, logs, thresholds, counts, chosen)
    far_axes = np.zeros((1, 1 + tilts, d), np.float32)
    for j in range(n_k):
        for c in range(1 + tilts):
            for p in range(d):
                far_axes[0, c, p] += weights[0, c, j] * (k[j, p] - mean[p])
        for c in range(tilts, width):
            far_value[0, c] += weights[0, 0, j] * v[j, c]
    far_log = np.empty(1, np.float32)
    centre_far(highest, no_variances, no_axes, totals, far_log, far_value, far_axes)
    return (
        (queries, starts, sizes, row_variances),
        (mean, centres, thresholds, chosen, counts, totals),
        (far_log, far_value, far_axes),
    )


@cached_njit(nogil=True)
def _sums_in_one_block(starts, sizes, deltas, chosen, k, mean, v, extra, centres):
    """The sums (n_q, 1 + d_v) of `sums_of_keys` over the chosen keys of one block, and their scales (1,)."""
    ends, scales = np.full(1, len(chosen)), np.empty(1, np.float32)
    sums = np.empty((len(deltas), 1 + v.shape[1]), np.float32)
    if v.shape[1] <= FEW_COLUMNS:
        sums_of_keys(0, 1, deltas, starts, sizes, chosen, ends, k, mean, v, extra, centres, scales, sums, None)
    else:
        wide_sums_of_keys(0, 1, deltas, starts, sizes, chosen, ends, k, mean, v, extra, centres, scales, sums, None)
    return sums, scales


@cached_njit(nogil=True)
def _see_in_one_block(with_own_keys, block, far, keys, deltas, k, logs, weights):
    """The arrays that `see` fills, for one block: log_weight, value, own_log, own_share, own_seen."""
    queries, starts, sizes, _ = block
    far_log, far_value, far_axes = far
    mean, centres, thresholds, _, _, totals = keys
    rows = len(deltas)
    value = np.empty((rows, far_value.shape[1]), np.float32) if far_axes.shape[1] > 1 else far_value
    log_weight, own_log = np.empty(rows, np.float32), np.empty(rows, np.float32)
    own_share, own_seen = np.empty(rows, np.float32), np.empty(rows, np.float32)
    see(
        0, 1, with_own_keys, queries, starts, sizes, logs, weights, thresholds, totals, far_log, far_value, far_axes,
        centres, deltas, k, mean, log_weight, value, own_log, own_share, own_seen,
    )  # fmt: skip
    return log_weight, value, own_log, own_share, own_seen


@cached_njit(nogil=True)
def answers_of_one_block(with_own_keys, q, scale, k, v, kept, begin, step, tilts, deltas, logs, weights, out, row_logs):
    """`local_expansion.answers` for one block of all queries and no axes, into out (n_q, d_v) and row_logs (n_q,).

    Returns the number of near keys. With few keys, separate calls from Python would take longer than their work; the
    same functions are called.
    """
    block, keys, far = _expand_one_block(q, scale, k, v, kept, begin, step, tilts, deltas, logs, weights)
    queries, starts, sizes, _ = block
    mean, centres, _, chosen, _, _ = keys
    extra = np.zeros(len(chosen), np.float32)
    sums, scales = _sums_in_one_block(starts, sizes, deltas, chosen, k, mean, v, extra, centres)
    seen = _see_in_one_block(with_own_keys, block, far, keys, deltas, k, logs, weights)
    log_weight, value, own_log, own_share, own_seen = seen
    expanded_answers(
        0, 1, queries, starts, sizes, tilts > 0, sums, scales, log_weight, value, own_log, own_share, own_seen, v, out,
        row_logs,
    )  # fmt: skip
    return len(chosen)


@cached_njit(nogil=True)
def controlled_sums_of_one_block(
    with_own_keys, q, scale, k, v, kept, begin, step, tilts, limit, points, deltas, logs, weights, out
):  # fmt: skip
    """`approxkmv.sums` for one block of all queries and no axes, into out (n_q, d_v + 3). Returns the near count.

    points (m,) are uniform random numbers, one for each sample.
    """
    block, keys, far = _expand_one_block(q, scale, k, v, kept, begin, step, tilts, deltas, logs, weights)
    queries, starts, sizes, row_variances = block
    mean, centres, _, chosen, ends, totals = keys
    extra = np.zeros(len(chosen), np.float32)
    heavy, scales = _sums_in_one_block(starts, sizes, deltas, chosen, k, mean, v, extra, centres)
    seen = _see_in_one_block(with_own_keys, block, far, keys, deltas, k, logs, weights)
    log_weight, value, own_log, own_share, own_seen = seen
    number = len(points)
    drawn, draw_ends = np.empty(number, np.int64), np.full(1, number)
    rates, control = np.empty(number, np.float32), np.empty(number, np.float32)
    draw_light(0, 1, draw_ends, ends, chosen, weights, totals, points, drawn, rates, control)
    estimate, estimate_scales = _sums_in_one_block(starts, sizes, deltas, drawn, k, mean, v, rates, centres)
    labels = np.zeros(len(q), np.int64)
    controlled_sums(
        0, 1, with_own_keys, starts, sizes, queries, queries, labels, heavy, scales, estimate, estimate_scales,
        row_variances, limit, draw_ends, drawn, rates, control, deltas, k, mean, v, value, far[2], log_weight, own_log,
        own_share, own_seen, out,
    )  # fmt: skip
    return len(chosen)
