"""The block methods with one block of all queries, each as one compiled call."""

from __future__ import annotations

import numpy as np

from approxkmv.attention.blocks.arrays import (
    BlockArrays,
    FarArrays,
    KeyArrays,
    Sample,
    ScaledSums,
    SeenArrays,
    WeightSums,
)
from approxkmv.attention.blocks.loops.clustering import centre_blocks
from approxkmv.attention.blocks.loops.expansion import centre_far, expanded_answers, fill_weights, list_near, see
from approxkmv.attention.blocks.loops.gathered import FEW_COLUMNS, sums_of_keys, wide_sums_of_keys
from approxkmv.attention.blocks.loops.sampling import controlled_sums, draw_light
from approxkmv.attention.kernels.numbers import FLAGS, exp, f32
from approxkmv.compute.compiling import cached_njit


@cached_njit(fastmath=FLAGS, nogil=True)
def _expand_one_block(one):
    """`expansion.expand` for a OneBlock: its blocks, keys, near keys (m,) and far keys."""
    q, scale, k, v, threshold, tilts, deltas, logs, weights = one
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
    labels = np.zeros(n_q, np.int64)
    blocks = BlockArrays(queries, queries, labels, starts, sizes, centres, deltas, no_variances, row_variances)
    centre_blocks(q, scale, no_points, no_variances[0], blocks)
    for j in range(n_k):
        dot = f32(0.0)
        for p in range(d):
            dot += centres[0, p] * (k[j, p] - mean[p])
        logs[0, j] = dot
    columns = np.ascontiguousarray(v[:, :tilts].T)
    counts, thresholds, highest = np.empty(1, np.int64), np.empty(1, np.float32), np.empty(1, np.float32)
    totals, far_value = np.empty(1, np.float32), np.zeros((1, width), np.float32)
    found = WeightSums(highest, thresholds, totals, far_value[:, :tilts])
    fill_weights(0, 1, logs, threshold, columns, weights, counts, found)
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
    far = FarArrays(logs, weights, thresholds, totals, far_log, far_value, far_axes)
    return blocks, KeyArrays(k, mean, v), chosen, far


@cached_njit(nogil=True)
def _sums_in_one_block(blocks, keys, chosen, extra):
    """The ScaledSums of `sums_of_keys` over the chosen keys of one block."""
    ends, width = np.full(1, len(chosen)), keys.v.shape[1]
    out = ScaledSums(np.empty((len(blocks.deltas), 1 + width), np.float32), np.empty(1, np.float32))
    if width <= FEW_COLUMNS:
        sums_of_keys(0, 1, blocks, chosen, ends, extra, keys, None, out)
    else:
        wide_sums_of_keys(0, 1, blocks, chosen, ends, extra, keys, None, out)
    return out


@cached_njit(nogil=True)
def _see_in_one_block(with_own_keys, blocks, keys, far):
    """The SeenArrays that `see` fills, for one block."""
    rows = len(blocks.deltas)
    value = np.empty((rows, far.value.shape[1]), np.float32) if far.axes.shape[1] > 1 else far.value
    log_weight, own_log = np.empty(rows, np.float32), np.empty(rows, np.float32)
    own_share, own_share_seen = np.empty(rows, np.float32), np.empty(rows, np.float32)
    seen = SeenArrays(log_weight, value, far.axes, own_log, own_share, own_share_seen)
    see(0, 1, with_own_keys, blocks, far, keys.k, keys.mean, seen)
    return seen


@cached_njit(fastmath=FLAGS, nogil=True)
def _lose(near, others, log_weight, variances, most_off, reach, out):
    """Make NaN the rows of out (n_q, d_v) that are out of reach of the one block: see `reach.beyond_reach`."""
    sums, scales = near
    for row in range(len(out)):
        known = scales[0] + np.log(sums[row, 0])
        higher = max(known, others[row])
        known = higher + np.log(f32(1.0) + exp(min(known, others[row]) - higher))
        # The log of 1 + exp(gap), the inverse of the far keys' share
        gap = known - log_weight[row]
        more = max(gap, f32(0.0)) + np.log(f32(1.0) + exp(-abs(gap)))
        if not (f32(0.5) * variances[row] - more <= most_off and variances[row] <= reach):
            out[row] = np.nan


@cached_njit(nogil=True)
def answers_of_one_block(with_own_keys, one, of_rows, limits, out, row_logs):
    """`local_expansion.answers` for a OneBlock, into out (n_q, d_v) and row_logs (n_q,); NaN where a row is lost.

    of_rows are the variances (n_q,) of each row's logits and its `others` (n_q,), limits `most_off` of the far keys and
    REACH. Returns the number of near keys. With few keys, separate calls from Python would take longer than their work;
    the same functions are called.
    """
    blocks, keys, chosen, far = _expand_one_block(one)
    near = _sums_in_one_block(blocks, keys, chosen, np.zeros(len(chosen), np.float32))
    seen = _see_in_one_block(with_own_keys, blocks, keys, far)
    expanded_answers(0, 1, one.tilts > 0, blocks, near, seen, keys.v, out, row_logs)
    _lose(near, of_rows[1], seen.log_weight, of_rows[0], limits[0], limits[1], out)
    return len(chosen)


@cached_njit(nogil=True)
def controlled_sums_of_one_block(with_own_keys, one, limit, points, out):
    """`approxkmv.sums` for a OneBlock, into out (n_q, d_v + 3). Returns the number of near keys.

    points (m,) are uniform random numbers, one for each sample; limit as in `controlled_sums`.
    """
    blocks, keys, chosen, far = _expand_one_block(one)
    near = _sums_in_one_block(blocks, keys, chosen, np.zeros(len(chosen), np.float32))
    seen = _see_in_one_block(with_own_keys, blocks, keys, far)
    number = len(points)
    logs, control = np.empty(number, np.float32), np.empty(number, np.float32)
    sample = Sample(np.empty(number, np.int64), np.full(1, number), logs, control)
    draw_light(0, 1, chosen, np.full(1, len(chosen)), far.weights, far.total, points, sample)
    estimate = _sums_in_one_block(blocks, keys, sample.keys, logs)
    controlled_sums(0, 1, with_own_keys, blocks, near, (sample, estimate), limit, keys, seen, out)
    return len(chosen)
