"""Compiled loops that draw light keys and sum them against the far key."""

from __future__ import annotations

import numpy as np

from approxkmv.attention.kernels.numbers import FLAGS, exp, f32, fading
from approxkmv.compute.compiling import cached_njit

_CHUNK = 64  # keys per partial sum of weights: the search finds the chunk first, then the key in it


@cached_njit(fastmath=FLAGS, nogil=True)
def far_deviations(low, high, blocks, near, log_weight, out):
    """Per block, the root of the mean over its rows of share^2 (exp(s) - 1 - s), with s the row's variance, at most 10.

    share is the far part of a row's sum: exp(log_weight) relative to that plus its near keys' sum (near: ScaledSums).
    """
    starts, sizes, variances = blocks.starts, blocks.sizes, blocks.row_variances
    heavy, scales = near
    for b in range(low, high):
        total = 0.0
        for row in range(starts[b], starts[b] + sizes[b]):
            far = exp(log_weight[row] - scales[b])
            share = far / (far + heavy[row, 0])
            # A row whose sum is not a number counts as all light; it is recomputed exactly at the end.
            share = share if share >= f32(0.0) else f32(1.0)
            s = min(variances[row], f32(10.0))
            total += share * share * (exp(s) - f32(1.0) - s)
        out[b] = np.sqrt(total / sizes[b])


@cached_njit(fastmath=FLAGS, nogil=True)
def draw_light(low, high, chosen, ends, weights, totals, points, sample):
    """Draw light keys for blocks low to high - 1, with the two weights of each: see `light_keys.draw`.

    points (m,) are uniform random numbers, up to sample.ends[b] for block b; each selects one key. chosen and ends are
    the near keys.
    """
    keys, draw_ends, logs, control = sample
    n = weights.shape[2]
    chunks = (n + _CHUNK - 1) // _CHUNK
    heights = np.empty(chunks)
    for b in range(low, high):
        begin = draw_ends[b - 1] if b > 0 else 0
        first = ends[b - 1] if b > 0 else 0
        near = ends[b] - first
        row = weights[b, 0]
        running = 0.0
        for c in range(chunks):
            part = f32(0.0)
            for j in range(c * _CHUNK, min(n, (c + 1) * _CHUNK)):
                part += row[j]
            running += float(part)
            heights[c] = running
        for t in range(begin, draw_ends[b]):
            if near == n:
                # Nothing is light: a key of weight 0
                keys[t], logs[t], control[t] = 0, -np.inf, 0.0
                continue
            even = 1.0 / (n - near)
            # A point below one half selects a light key uniformly, one above it selects by the running sum of weights.
            by_weight = running > 0.0
            u = 2.0 * points[t]
            if u < 1.0 or not by_weight:
                place = min(np.int64((u if by_weight else 0.5 * u) * (n - near)), n - near - 1)
                # The light key with index i among light keys has index i + (number of near keys before it).
                left, right = 0, near
                while left < right:
                    middle = (left + right) // 2
                    if chosen[first + middle] - middle <= place:
                        left = middle + 1
                    else:
                        right = middle
                key = place + left
            else:
                height = running * (u - 1.0)
                left, right = 0, chunks - 1
                while left < right:
                    middle = (left + right) // 2
                    if heights[middle] > height:
                        right = middle
                    else:
                        left = middle + 1
                if left > 0:
                    height -= heights[left - 1]
                key = -1
                for j in range(left * _CHUNK, min(n, (left + 1) * _CHUNK)):
                    # A near key, whose weight is 0, is never drawn.
                    if row[j] > 0.0:
                        key = j
                        height -= row[j]
                        if height < 0.0:
                            break
            share = row[key] / totals[b]
            rate = (draw_ends[b] - begin) * (0.5 * (share + even) if by_weight else even)
            keys[t] = key
            logs[t] = -np.log(rate)
            control[t] = share / rate


@cached_njit(fastmath=FLAGS, nogil=True)
def controlled_sums(low, high, with_own_keys, blocks, near, draws, limit, keys, seen, out):
    """Numerators, parts, row sum and log (n, d_v + 3) of each query in blocks low to high - 1, by the control variate.

    For every row: near keys + estimate over the sample + far key - far key over the sample, with the own key (log
    own_log, -inf for none) exact instead of its share. Parts: the same terms added without signs. near: ScaledSums;
    draws: the Sample and its ScaledSums, the estimate. limit: the variance from which a row's far key is not used.
    Every row is a query.
    """
    starts, sizes, queries, rows, labels = blocks.starts, blocks.sizes, blocks.queries, blocks.rows, blocks.labels
    deltas, variances = blocks.deltas, blocks.row_variances
    heavy, scales = near
    (drawn, ends, logs, control), (estimate, estimate_scales) = draws
    k, mean, v = keys
    log_weight, far_value, far_axes, own_log, own_share, own_seen = seen
    d, width = k.shape[1], v.shape[1]
    tilts = far_axes.shape[1]
    means = np.empty(1 + width, np.float32)
    leans = np.empty((tilts, d), np.float32)
    own_drawn = np.empty(sizes.max(), np.float32)
    for b in range(low, high):
        means[:] = f32(0.0)
        leans[:] = f32(0.0)
        own_drawn[: sizes[b]] = f32(0.0)
        for t in range(ends[b - 1] if b > 0 else 0, ends[b]):
            key = drawn[t]
            weight = control[t]
            means[0] += weight
            for c in range(width):
                means[1 + c] += weight * v[key, c]
            for c in range(tilts):
                part = weight if c == 0 else weight * v[key, c - 1]
                for p in range(d):
                    leans[c, p] += part * (k[key, p] - mean[p] - far_axes[b, 0, p])
            if with_own_keys and labels[key] == b:
                own_drawn[rows[key] - starts[b]] += exp(logs[t])
        for row in range(starts[b], starts[b] + sizes[b]):
            shift = max(max(scales[b], log_weight[row]), own_log[row])
            exact = fading(scales[b] - shift)
            light = fading(estimate_scales[b] - shift)
            weight = fading(log_weight[row] - shift) if variances[row] < limit else f32(0.0)
            query = queries[row]
            mine = own_log[row] > f32(-1e30)
            left = f32(1.0) - own_drawn[row - starts[b]]
            own = fading(own_log[row] - shift) if mine else f32(0.0)
            lean = f32(0.0)
            for p in range(d):
                lean += deltas[row, p] * leans[0, p]
            row_sum = heavy[row, 0] * exact + estimate[row, 0] * light
            parts = row_sum + weight * (f32(1.0) + means[0] + abs(lean))
            row_sum += weight * (f32(1.0) - means[0] - lean)
            if mine:
                row_sum += left * (own - weight * own_seen[row])
                parts += abs(left) * (own + weight * abs(own_seen[row]))
            for c in range(width):
                far = far_value[row if tilts > 1 else b, c]
                sampled = means[1 + c]
                if tilts > 1:
                    for p in range(d):
                        sampled += deltas[row, p] * leans[1 + c, p]
                else:
                    sampled += lean * far
                value = heavy[row, 1 + c] * exact + estimate[row, 1 + c] * light
                value += weight * (far - sampled)
                if mine:
                    held = own_seen[row] * v[query, c]
                    if tilts == 1:
                        held += (own_share[row] - own_seen[row]) * (v[query, c] - far)
                    value += left * (own * v[query, c] - weight * held)
                out[query, c] = value
            out[query, width] = parts
            out[query, width + 1] = row_sum
            out[query, width + 2] = shift
