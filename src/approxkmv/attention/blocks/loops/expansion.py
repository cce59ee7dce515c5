"""Compiled loops of the expansion around the centres of blocks."""

from __future__ import annotations

import numpy as np

from approxkmv.attention.kernels.numbers import FLAGS, f32, fading, number, stored
from approxkmv.compute.compiling import cached_njit

_LARGEST = 80.0  # larger exponents overflow float32 together with what they are multiplied by


@cached_njit(fastmath=FLAGS, nogil=True)
def fill_weights(low, high, logs, threshold, columns, weights, counts, found):
    """Blocks low to high - 1: weights = exp(logs - highest), or 0 for near keys, which are counted in counts.

    Fills found, a WeightSums; its `highest` is the largest log of a key that is not near, or the threshold if all are.

    A key is near if its log (blocks, n) is at least the block's threshold: see `Threshold`. weights holds the weights,
    then their products with the value columns (tilts, n): (blocks, 1 + tilts, n). logs and weights are float32, or
    bfloat16 as bits.
    """
    kept, begin, step = threshold
    highest, thresholds, totals, values = found
    n = logs.shape[1]
    sample = np.empty((n - begin + step - 1) // step, np.float32)
    for b in range(low, high):
        for j in range(len(sample)):
            sample[j] = number(logs[b, begin + j * step])
        bar = np.partition(sample, kept)[kept]
        thresholds[b] = bar
        count = np.int32(0)
        top = f32(-np.inf)
        for j in range(n):
            x = number(logs[b, j])
            count += np.int32(x >= bar)
            top = max(top, f32(-np.inf) if x >= bar else x)
        top = top if top > f32(-np.inf) else bar
        highest[b] = top
        total = f32(0.0)
        for j in range(n):
            x = number(logs[b, j])
            weight = stored(f32(0.0) if x >= bar else fading(x - top), logs[b, j])
            weights[b, 0, j] = weight
            total += number(weight)
        counts[b] = count
        totals[b] = total
        for c in range(weights.shape[1] - 1):
            value = f32(0.0)
            for j in range(n):
                x = number(weights[b, 0, j]) * columns[c, j]
                weights[b, 1 + c, j] = stored(x, weights[b, 0, j])
                value += x
            values[b, c] = value


@cached_njit(fastmath=FLAGS, nogil=True)
def centre_far(highest, variances, axes, totals, far_log, far_value, far_axes):
    """Turn sums over the far keys of each block into weighted means and covariances, in place; see `Expansion`.

    far_axes (blocks, 1 + tilts, d) and far_value (blocks, d_v) hold sums of weights times keys and values; totals
    (blocks,) hold sums of the weights, raised to at least 1e-30. variances (blocks, r) are along axes (d, r).
    """
    d, r = axes.shape
    along = np.empty(r, np.float32)
    for b in range(len(totals)):
        totals[b] = max(totals[b], f32(1e-30))
        share = f32(1.0) / totals[b]
        for c in range(far_value.shape[1]):
            far_value[b, c] *= share
        along[:] = f32(0.0)
        for p in range(d):
            x = far_axes[b, 0, p] * share
            far_axes[b, 0, p] = x
            for a in range(r):
                along[a] += x * axes[p, a]
        for c in range(1, far_axes.shape[1]):
            for p in range(d):
                far_axes[b, c, p] = far_axes[b, c, p] * share - far_value[b, c - 1] * far_axes[b, 0, p]
        second = f32(0.0)
        for a in range(r):
            second += variances[b, a] * along[a] * along[a]
        # The weight already contains the far key's own second-order term.
        far_log[b] = np.log(totals[b]) + highest[b] - f32(0.5) * second


@cached_njit(fastmath=FLAGS, nogil=True)
def list_near(low, high, logs, thresholds, ends, chosen):
    """Write the near keys of blocks b = low to high - 1, counted by fill_weights, to chosen[ends[b-1]:ends[b]]."""
    for b in range(low, high):
        bar = thresholds[b]
        at = ends[b - 1] if b > 0 else 0
        end = ends[b]
        for j in range(logs.shape[1]):
            # Always written, kept only if near: a branch on each key would be mispredicted too often.
            if at < end:
                chosen[at] = j
                at += np.int64(number(logs[b, j]) >= bar)


@cached_njit(fastmath=FLAGS, nogil=True)
def see(low, high, with_own_keys, blocks, far, k, mean, seen):
    """Fill in the far key and own key as seen by the rows of blocks low to high - 1: seen, a SeenArrays."""
    queries, starts, sizes, centres, deltas = blocks.queries, blocks.starts, blocks.sizes, blocks.centres, blocks.deltas
    logs, weights, thresholds, totals, far_log, far_value, far_axes = far
    log_weight, value, _, own_log, own_share, own_seen = seen
    d = deltas.shape[1]
    for b in range(low, high):
        for row in range(starts[b], starts[b] + sizes[b]):
            dot = f32(0.0)
            for p in range(d):
                dot += deltas[row, p] * far_axes[b, 0, p]
            log_weight[row] = dot + far_log[b]
            for c in range(far_axes.shape[1] - 1):
                lean = f32(0.0)
                for p in range(d):
                    lean += deltas[row, p] * far_axes[b, 1 + c, p]
                value[row, c] = far_value[b, c] + lean
            own_log[row] = f32(-np.inf)
            own_share[row] = f32(0.0)
            own_seen[row] = f32(0.0)
            key = queries[row]
            if not with_own_keys or key < 0 or number(logs[b, key]) >= thresholds[b]:
                continue
            own = f32(0.0)
            lean = f32(0.0)
            for p in range(d):
                x = k[key, p] - mean[p]
                own += (centres[b, p] + deltas[row, p]) * x
                lean += deltas[row, p] * x
            share = number(weights[b, 0, key]) / totals[b]
            own_log[row] = own
            own_share[row] = share
            own_seen[row] = share * (f32(1.0) + lean - dot)


@cached_njit(fastmath=FLAGS, nogil=True)
def expanded_answers(low, high, tilted, blocks, near, seen, v, out, logs):
    """Outputs (n, d_v) of the queries in blocks low to high - 1: near keys, far key, and own key instead of its share.

    near: ScaledSums. logs (n,) receives the logs of their row sums. NaN where an exponential would overflow float32.
    """
    queries, starts, sizes = blocks.queries, blocks.starts, blocks.sizes
    sums, scales = near
    log_weight, far_value, _, own_log, own_share, own_seen = seen
    width = far_value.shape[1]
    for b in range(low, high):
        scale = scales[b]
        for row in range(starts[b], starts[b] + sizes[b]):
            query = queries[row]
            if query < 0:
                continue
            mine = own_log[row] > f32(-1e30)
            if not max(log_weight[row], own_log[row]) - scale < _LARGEST:
                for c in range(width):
                    out[query, c] = np.nan
                continue
            weight = fading(log_weight[row] - scale)
            own = fading(own_log[row] - scale) if mine else f32(0.0)
            row_sum = sums[row, 0] + weight + own - (weight * own_seen[row] if mine else f32(0.0))
            logs[query] = scale + np.log(row_sum)
            share = f32(1.0) / row_sum
            counted = own - weight * (own_seen[row] if tilted else own_share[row]) if mine else f32(0.0)
            # The difference of the own key's two shares goes to the far value: a row's weights add up to one.
            left = weight if tilted or not mine else weight * (f32(1.0) - own_seen[row] + own_share[row])
            # With unequal numbers of queries and keys, v has no row for the query's own key.
            mine_at = query if mine else 0
            far_at = row if tilted else b
            for c in range(width):
                value = sums[row, 1 + c] + left * far_value[far_at, c] + counted * v[mine_at, c]
                out[query, c] = value * share
