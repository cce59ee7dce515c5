"""Loops compiled by numba, one core each and free of Python's lock: import this only where numba is installed.

numba's own threads are not used: its OpenMP layer changes the number of threads that torch runs.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from approxkmv.attention.exponentials import LOWEST
from approxkmv.attention.kernels.tiles import KEYS, LANES, WIDE, multiply_tile, multiply_tile_of_pairs
from approxkmv.compiling import cached_njit

_CHUNK = 64  # keys whose weights are summed together before one of them is looked for
_LARGEST = 80.0  # exponents above this leave float32 together with what they are multiplied by
_QUERIES = 64  # queries of a panel, so that it and their logits stay in the first cache
FEW_COLUMNS = 8  # of v: for more, their sums are products of tiles too
_BATCH = 64  # keys whose products with many value columns are summed together
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


@njit(inline="always")
def _fading(x):
    """exp(x), and 0 where that is below the normal numbers: what it is multiplied by may be as large as they get."""
    return _exp(x) if x > _f(-87.0) else _f(0.0)


@cached_njit(fastmath=_FLAGS, nogil=True)
def add_exponentials(logits, columns, numerators, row_sums):
    """row_sums (rows,) and numerators (d_v, rows) gain exp(logits) (rows, keys) times 1 and columns (d_v, keys)."""
    rows, keys = logits.shape
    width = columns.shape[0]
    for i in range(rows):
        total = _f(0.0)
        first = _f(0.0)
        for j in range(keys):
            e = _exp(max(logits[i, j], _f(LOWEST)))
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


@cached_njit(fastmath=_FLAGS, nogil=True)
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
            logits[i, j] = _exp(max(logits[i, j] - top, _f(LOWEST)))
        for j in range(skip_from[i], skip_to[i]):
            logits[i, j] = _f(0.0)
        for c in range(width):
            part = _f(0.0)
            for j in range(keys):
                part += logits[i, j] * columns[c, j]
            sums[i, c] = part


@cached_njit(fastmath=_FLAGS, nogil=True)
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


@njit(fastmath=_FLAGS, nogil=True, cache=True)
def spreads(points, middle, variances, out):
    """out (n,) = the sum over the columns of (points (n, d) - middle (d,))^2 variances (d,)."""
    for i in range(len(points)):
        whole = _f(0.0)
        for p in range(points.shape[1]):
            x = points[i, p] - middle[p]
            whole += x * x * variances[p]
        out[i] = whole


@njit(inline="always")
def _bits(x):
    """The upper half of a float32's bits, rounded to nearest even: a bfloat16."""
    whole = np.float32(x).view(np.uint32)
    return np.uint16((whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def _widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def _number(stored):
    """The float32 that an array holds, as it is or as the bits of a bfloat16: one loop serves both."""
    raise NotImplementedError


@overload(_number, inline="always")
def _number_by_type(stored):
    if stored == types.uint16:
        return lambda stored: _widened(stored)
    return lambda stored: stored


def _stored(number, like):
    """A float32 as an array of the type of `like` holds it."""
    raise NotImplementedError


@overload(_stored, inline="always")
def _stored_by_type(number, like):
    if like == types.uint16:
        return lambda number, like: _bits(number)
    return lambda number, like: number


@cached_njit(fastmath=_FLAGS, nogil=True)
def fill_weights(
    low, high, logs, kept, begin, step, columns, weights, counts, highest, thresholds, totals, values
):  # fmt: skip
    """Blocks low to high - 1: weights = exp(logs - highest), 0 at the near keys, whose number goes to counts.

    highest (blocks,) receives the largest log of a key that is not near, or the threshold where all are.

    A key is near where its log (blocks, n) is at least the block's threshold: the number of rank `kept`, from below,
    among every step-th key's from the key at `begin` on. weights (blocks, 1 + tilts, n) has the weights, then their
    products with the value columns (tilts, n); totals (blocks,) and values (blocks, tilts) are their sums. logs and
    weights are float32, or bfloat16 as bits.
    """
    n = logs.shape[1]
    sample = np.empty((n - begin + step - 1) // step, np.float32)
    for b in range(low, high):
        for j in range(len(sample)):
            sample[j] = _number(logs[b, begin + j * step])
        bar = np.partition(sample, kept)[kept]
        thresholds[b] = bar
        count = np.int32(0)
        top = _f(-np.inf)
        for j in range(n):
            x = _number(logs[b, j])
            count += np.int32(x >= bar)
            top = max(top, _f(-np.inf) if x >= bar else x)
        top = top if top > _f(-np.inf) else bar
        highest[b] = top
        total = _f(0.0)
        for j in range(n):
            x = _number(logs[b, j])
            weight = _stored(_f(0.0) if x >= bar else _fading(x - top), logs[b, j])
            weights[b, 0, j] = weight
            total += _number(weight)
        counts[b] = count
        totals[b] = total
        for c in range(weights.shape[1] - 1):
            value = _f(0.0)
            for j in range(n):
                x = _number(weights[b, 0, j]) * columns[c, j]
                weights[b, 1 + c, j] = _stored(x, weights[b, 0, j])
                value += x
            values[b, c] = value


@cached_njit(fastmath=_FLAGS, nogil=True)
def centre_far(highest, variances, axes, totals, far_log, far_value, far_axes):
    """Sums over the far keys of each block become weighted means and covariances; see `Expansion`.

    far_axes (blocks, 1 + tilts, d) and far_value (blocks, d_v) hold sums of weights times keys and values; totals
    (blocks,) those of the weights, which become at least 1e-30. variances (blocks, r) are along axes (d, r).
    """
    d, r = axes.shape
    along = np.empty(r, np.float32)
    for b in range(len(totals)):
        totals[b] = max(totals[b], _f(1e-30))
        share = _f(1.0) / totals[b]
        for c in range(far_value.shape[1]):
            far_value[b, c] *= share
        along[:] = _f(0.0)
        for p in range(d):
            x = far_axes[b, 0, p] * share
            far_axes[b, 0, p] = x
            for a in range(r):
                along[a] += x * axes[p, a]
        for c in range(1, far_axes.shape[1]):
            for p in range(d):
                far_axes[b, c, p] = far_axes[b, c, p] * share - far_value[b, c - 1] * far_axes[b, 0, p]
        second = _f(0.0)
        for a in range(r):
            second += variances[b, a] * along[a] * along[a]
        # The far key's own second-order term is in its weight already.
        far_log[b] = np.log(totals[b]) + highest[b] - _f(0.5) * second


@cached_njit(fastmath=_FLAGS, nogil=True)
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
                at += np.int64(_number(logs[b, j]) >= bar)


@cached_njit(nogil=True)
def group(labels, multiple):
    """queries, rows, labels, starts and sizes of `Blocks`: points (n,) with a label in blocks, a block for each used.

    A block's rows are padded to a multiple of some.
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


@cached_njit(fastmath=_FLAGS, nogil=True)
def centre_blocks(q, scale, points, importance, queries, starts, sizes, deltas, centres, variances, row_variances):
    """Fill deltas (rows, d), centres (blocks, d), variances (blocks, r) and row_variances (rows,), block after block.

    q (n, d) times scale are the queries, whose centre and distances from it are wanted; points (n, r), whose variance
    is, for each block along each axis, and for each row over the axes, times their importance (r,).
    """
    d = q.shape[1]
    r = points.shape[1]
    middle = np.empty(r, np.float32)
    for b in range(len(starts)):
        first = starts[b]
        last = first + sizes[b]
        # Padded rows are a block's last.
        while queries[last - 1] < 0:
            last -= 1
            deltas[last, :] = _f(0.0)
            row_variances[last] = _f(0.0)
        share = _f(1.0) / _f(last - first)
        for p in range(d):
            centres[b, p] = _f(0.0)
        for p in range(r):
            middle[p] = _f(0.0)
            variances[b, p] = _f(0.0)
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
            whole = _f(0.0)
            for p in range(r):
                delta = points[query, p] - middle[p]
                square = delta * delta
                variances[b, p] += square
                whole += square * importance[p]
            row_variances[row] = whole
        for p in range(r):
            variances[b, p] *= share


@cached_njit(fastmath=_FLAGS, nogil=True)
def see(
    low, high, with_own_keys, queries, starts, sizes, logs, weights, thresholds, totals, far_log, far_value, far_axes,
    centres, deltas, k, mean, log_weight, value, own_log, own_share, own_seen
):  # fmt: skip
    """Fill what the rows of blocks low to high - 1 see of the far key and of their own key: see `expansion.Seen`."""
    d = deltas.shape[1]
    for b in range(low, high):
        for row in range(starts[b], starts[b] + sizes[b]):
            dot = _f(0.0)
            for p in range(d):
                dot += deltas[row, p] * far_axes[b, 0, p]
            log_weight[row] = dot + far_log[b]
            for c in range(far_axes.shape[1] - 1):
                lean = _f(0.0)
                for p in range(d):
                    lean += deltas[row, p] * far_axes[b, 1 + c, p]
                value[row, c] = far_value[b, c] + lean
            own_log[row] = _f(-np.inf)
            own_share[row] = _f(0.0)
            own_seen[row] = _f(0.0)
            key = queries[row]
            if not with_own_keys or key < 0 or _number(logs[b, key]) >= thresholds[b]:
                continue
            own = _f(0.0)
            lean = _f(0.0)
            for p in range(d):
                x = k[key, p] - mean[p]
                own += (centres[b, p] + deltas[row, p]) * x
                lean += deltas[row, p] * x
            share = _number(weights[b, 0, key]) / totals[b]
            own_log[row] = own
            own_share[row] = share
            own_seen[row] = share * (_f(1.0) + lean - dot)


@cached_njit(fastmath=_FLAGS, nogil=True)
def far_deviations(low, high, starts, sizes, heavy, scales, log_weight, variances, out):
    """Per block, the root of the mean over its rows of share^2 (exp(s) - 1 - s), s their variance, at most 10.

    share is the far part of a row's sum: exp(log_weight) beside heavy[:, 0] exp(scale of the block).
    """
    for b in range(low, high):
        total = 0.0
        for row in range(starts[b], starts[b] + sizes[b]):
            far = _exp(log_weight[row] - scales[b])
            share = far / (far + heavy[row, 0])
            # A row whose sums left float32 is made again in the end; until then its light keys are all there is.
            share = share if share >= _f(0.0) else _f(1.0)
            s = min(variances[row], _f(10.0))
            total += share * share * (_exp(s) - _f(1.0) - s)
        out[b] = np.sqrt(total / sizes[b])


@cached_njit(fastmath=_FLAGS, nogil=True)
def draw_light(low, high, draw_ends, ends, chosen, weights, totals, points, keys, logs, control):
    """Light keys of blocks low to high - 1, and the two weights of each: see `approxkmv.draw`.

    points (m,) are uniform random numbers, up to draw_ends[b] for block b, each turned into one key.
    """
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
            part = _f(0.0)
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
            # A point below one half is a place among the light keys, one above it a place in the running sum.
            by_weight = running > 0.0
            u = 2.0 * points[t]
            if u < 1.0 or not by_weight:
                place = min(np.int64((u if by_weight else 0.5 * u) * (n - near)), n - near - 1)
                # As many near keys come before the light key at a place as lie less than that many places behind it.
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


@cached_njit(fastmath=_FLAGS, nogil=True)
def controlled_sums(
    low, high, with_own_keys, starts, sizes, queries, rows, labels, heavy, scales, estimate, estimate_scales, variances,
    limit, ends, keys, logs, control, deltas, k, mean, v, far_value, far_axes, log_weight, own_log, own_share, own_seen,
    out
):  # fmt: skip
    """Numerators, row sum and log (n, d_v + 2) of each query of blocks low to high - 1, by the control variate.

    For every row: heavy keys + estimate over the sample + far key - far key over the sample, and the own key (of log
    own_log, -inf for none) exactly instead of its share. The sample of block b is keys[ends[b-1]:ends[b]], with the
    weights exp(logs) and `control`; far_axes and the rest are of `Expansion` and `Seen`. Every row is a query.
    """
    d, width = k.shape[1], v.shape[1]
    tilts = far_axes.shape[1]
    means = np.empty(1 + width, np.float32)
    leans = np.empty((tilts, d), np.float32)
    own_drawn = np.empty(sizes.max(), np.float32)
    for b in range(low, high):
        means[:] = _f(0.0)
        leans[:] = _f(0.0)
        own_drawn[: sizes[b]] = _f(0.0)
        for t in range(ends[b - 1] if b > 0 else 0, ends[b]):
            key = keys[t]
            weight = control[t]
            means[0] += weight
            for c in range(width):
                means[1 + c] += weight * v[key, c]
            for c in range(tilts):
                part = weight if c == 0 else weight * v[key, c - 1]
                for p in range(d):
                    leans[c, p] += part * (k[key, p] - mean[p] - far_axes[b, 0, p])
            if with_own_keys and labels[key] == b:
                own_drawn[rows[key] - starts[b]] += _exp(logs[t])
        for row in range(starts[b], starts[b] + sizes[b]):
            shift = max(max(scales[b], log_weight[row]), own_log[row])
            exact = _fading(scales[b] - shift)
            light = _fading(estimate_scales[b] - shift)
            weight = _fading(log_weight[row] - shift) if variances[row] < limit else _f(0.0)
            query = queries[row]
            mine = own_log[row] > _f(-1e30)
            left = _f(1.0) - own_drawn[row - starts[b]]
            own = _fading(own_log[row] - shift) if mine else _f(0.0)
            lean = _f(0.0)
            for p in range(d):
                lean += deltas[row, p] * leans[0, p]
            row_sum = heavy[row, 0] * exact + estimate[row, 0] * light
            row_sum += weight * (_f(1.0) - means[0] - lean)
            if mine:
                row_sum += left * (own - weight * own_seen[row])
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
                    seen = own_seen[row] * v[query, c]
                    if tilts == 1:
                        seen += (own_share[row] - own_seen[row]) * (v[query, c] - far)
                    value += left * (own * v[query, c] - weight * seen)
                out[query, c] = value
            out[query, width] = row_sum
            out[query, width + 1] = shift


@cached_njit(fastmath=_FLAGS, nogil=True)
def expanded_answers(
    low, high, queries, starts, sizes, tilted, sums, scales, log_weight, far_value, own_log, own_share, own_seen, v, out
):  # fmt: skip
    """Answers (n, d_v) of the queries of blocks low to high - 1: heavy keys, far key, and the own key, not its share.

    NaN where an exponential would leave float32.
    """
    width = far_value.shape[1]
    for b in range(low, high):
        scale = scales[b]
        for row in range(starts[b], starts[b] + sizes[b]):
            query = queries[row]
            if query < 0:
                continue
            mine = own_log[row] > _f(-1e30)
            if not max(log_weight[row], own_log[row]) - scale < _LARGEST:
                for c in range(width):
                    out[query, c] = np.nan
                continue
            weight = _fading(log_weight[row] - scale)
            own = _fading(own_log[row] - scale) if mine else _f(0.0)
            share = _f(1.0) / (sums[row, 0] + weight + own - (weight * own_seen[row] if mine else _f(0.0)))
            counted = own - weight * (own_seen[row] if tilted else own_share[row]) if mine else _f(0.0)
            # In the far value's place, what the own key's share leaves of it: the weights of a row add up to one.
            left = weight if tilted or not mine else weight * (_f(1.0) - own_seen[row] + own_share[row])
            # Of another number of queries than keys, v has no row of the query's own.
            mine_at = query if mine else 0
            far_at = row if tilted else b
            for c in range(width):
                value = sums[row, 1 + c] + left * far_value[far_at, c] + counted * v[mine_at, c]
                out[query, c] = value * share


@njit(inline="always")
def _weigh_keys(chosen, k, mean, extra, centre, places, weights):
    """The rows of `chosen` to places, and their weights exp(centre.(k - mean) + extra - shift).

    Returns the shift, the largest of these exponents.
    """
    shift = _f(-np.inf)
    for j in range(len(chosen)):
        key = chosen[j]
        places[j] = key
        dot = _f(0.0)
        for p in range(k.shape[1]):
            dot += centre[p] * (k[key, p] - mean[p])
        dot += extra[j]
        weights[j] = dot
        shift = max(shift, dot)
    for j in range(len(chosen)):
        weights[j] = _fading(weights[j] - shift)
    return shift


@njit(inline="always")
def _numbers_to_panel(deltas, i, some, mean, panel, start):
    """Rows i to i + some - 1 of deltas to the columns of panel (d, queries), and start = -deltas.mean."""
    for t in range(some):
        dot = _f(0.0)
        for p in range(deltas.shape[1]):
            x = deltas[i + t, p]
            panel[p, t] = x
            dot += x * mean[p]
        start[t] = -dot


@njit(inline="always")
def _pairs_to_panel(deltas, i, some, panel):
    """Rows i to i + some - 1 of deltas, rounded, to the columns of panel (pairs, queries), two numbers in each word."""
    d = deltas.shape[1]
    for t in range(some):
        for p in range(d // 2):
            first, second = _bits(deltas[i + t, 2 * p]), _bits(deltas[i + t, 2 * p + 1])
            panel[p, t] = np.uint32(first) | (np.uint32(second) << np.uint32(16))


# What differs between products of float32 and of bfloat16 numbers is decided by the type of `rounded`, so that a
# processor without the instruction for the latter never meets it.


def _lanes(rounded):
    """How many queries a tile multiplies at once."""
    raise NotImplementedError


def _empty_panel(rounded, d):
    """Zeros of the shape and type of a panel of queries of d numbers."""
    raise NotImplementedError


def _fill_panel(rounded, deltas, i, some, mean, panel, start):
    """A panel of rows i to i + some - 1 of deltas, and what to start their products from."""
    raise NotImplementedError


def _multiply(rounded, k, places, j, panel, t, start, out):
    """The products of keys and queries of one tile."""
    raise NotImplementedError


@overload(_lanes)
def _lanes_by_type(rounded):
    lanes = LANES if isinstance(rounded, types.NoneType) else WIDE
    return lambda rounded: lanes


@overload(_empty_panel)
def _empty_panel_by_type(rounded, d):
    if isinstance(rounded, types.NoneType):
        return lambda rounded, d: np.zeros((d, _QUERIES), np.float32)
    return lambda rounded, d: np.zeros((rounded.shape[1] // 2, _QUERIES), np.uint32)


@overload(_fill_panel, inline="always")
def _fill_panel_by_type(rounded, deltas, i, some, mean, panel, start):
    if isinstance(rounded, types.NoneType):
        return lambda rounded, deltas, i, some, mean, panel, start: _numbers_to_panel(
            deltas, i, some, mean, panel, start
        )
    return lambda rounded, deltas, i, some, mean, panel, start: _pairs_to_panel(deltas, i, some, panel)


@overload(_multiply, inline="always")
def _multiply_by_type(rounded, k, places, j, panel, t, start, out):
    if isinstance(rounded, types.NoneType):
        return lambda rounded, k, places, j, panel, t, start, out: multiply_tile(  # type: ignore[call-arg]
            k, places, j, panel, t, start, out
        )
    return lambda rounded, k, places, j, panel, t, start, out: multiply_tile_of_pairs(  # type: ignore[call-arg]
        rounded, places, j, panel, t, out
    )


@njit(inline="always")
def _add_tile(logits, span, pairs, j, totals):
    """totals (columns, queries) gain exp(logits) (KEYS, queries) times the rows j to j + KEYS - 1 of pairs."""
    for r in range(0, KEYS, 4):
        for t in range(span):
            logits[r, t] = _exp(logits[r, t])
            logits[r + 1, t] = _exp(logits[r + 1, t])
            logits[r + 2, t] = _exp(logits[r + 2, t])
            logits[r + 3, t] = _exp(logits[r + 3, t])
        for c in range(pairs.shape[1]):
            w0 = pairs[j + r, c]
            w1 = pairs[j + r + 1, c]
            w2 = pairs[j + r + 2, c]
            w3 = pairs[j + r + 3, c]
            for t in range(span):
                totals[c, t] += (
                    w0 * logits[r, t] + w1 * logits[r + 1, t] + w2 * logits[r + 2, t] + w3 * logits[r + 3, t]
                )


@cached_njit(fastmath=_FLAGS, nogil=True)
def sums_of_keys(low, high, deltas, starts, sizes, chosen, ends, k, mean, v, extra, centres, scales, sums, rounded):
    """Sums of exp(q.(k - mean) + extra) [1, v] over the chosen keys of the blocks low to high - 1, for their queries.

    q is its block's centre plus its row of deltas (rows, d); chosen[ends[b-1]:ends[b]] are the keys of block b.
    scales (blocks,) receives the exponent that the block's sums are divided by; sums (rows, 1 + d_v) the row sums and
    the numerators. rounded: None, or k - mean (n, d) in bfloat16 as bits, d even, with which the products of deltas and
    keys, but not of centres and keys, are of bfloat16 numbers.
    """
    width = v.shape[1]
    panel = _empty_panel(rounded, k.shape[1])
    lanes = _lanes(rounded)
    start = np.zeros(_QUERIES, np.float32)
    logits = np.zeros((KEYS, _QUERIES), np.float32)
    totals = np.zeros((1 + width, _QUERIES), np.float32)
    for b in range(low, high):
        begin = ends[b - 1] if b > 0 else 0
        number = ends[b] - begin
        # The last tile is filled with key 0 at weight 0.
        whole = (number + KEYS - 1) // KEYS * KEYS
        places = np.zeros(whole, np.int64)
        weights = np.empty(number, np.float32)
        pairs = np.zeros((whole, 1 + width), np.float32)
        here = slice(begin, ends[b])
        scales[b] = _weigh_keys(chosen[here], k, mean, extra[here], centres[b], places, weights)
        for j in range(number):
            pairs[j, 0] = weights[j]
            for c in range(width):
                pairs[j, 1 + c] = weights[j] * v[places[j], c]
        for i in range(starts[b], starts[b] + sizes[b], _QUERIES):
            some = min(_QUERIES, starts[b] + sizes[b] - i)
            span = (some + lanes - 1) // lanes * lanes
            _fill_panel(rounded, deltas, i, some, mean, panel, start)
            totals[:, :span] = _f(0.0)
            for j in range(0, whole, KEYS):
                for t in range(0, span, lanes):
                    _multiply(rounded, k, places, j, panel, t, start, logits)
                _add_tile(logits, span, pairs, j, totals)
            for c in range(1 + width):
                for t in range(some):
                    sums[i + t, c] = totals[c, t]


@cached_njit(fastmath=_FLAGS, nogil=True)
def wide_sums_of_keys(
    low, high, deltas, starts, sizes, chosen, ends, k, mean, v, extra, centres, scales, sums, rounded
):  # fmt: skip
    """As sums_of_keys, for many columns of v: their sums too are products of tiles, over _BATCH keys at a time."""
    width = v.shape[1]
    panel = _empty_panel(rounded, k.shape[1])
    lanes = _lanes(rounded)
    start = np.zeros(_QUERIES, np.float32)
    nothing = np.zeros(_QUERIES, np.float32)
    heights = np.zeros((_BATCH, _QUERIES), np.float32)
    tile = np.zeros((KEYS, _QUERIES), np.float32)
    columns = np.arange((1 + width + KEYS - 1) // KEYS * KEYS)
    totals = np.zeros((len(columns), _QUERIES), np.float32)
    for b in range(low, high):
        begin = ends[b - 1] if b > 0 else 0
        number = ends[b] - begin
        batches = (number + _BATCH - 1) // _BATCH
        places = np.zeros(batches * _BATCH, np.int64)
        weights = np.empty(number, np.float32)
        pairs = np.zeros((batches, len(columns), _BATCH), np.float32)
        here = slice(begin, ends[b])
        scales[b] = _weigh_keys(chosen[here], k, mean, extra[here], centres[b], places, weights)
        for j in range(number):
            batch, at = j // _BATCH, j % _BATCH
            pairs[batch, 0, at] = weights[j]
            for c in range(width):
                pairs[batch, 1 + c, at] = weights[j] * v[places[j], c]
        for i in range(starts[b], starts[b] + sizes[b], _QUERIES):
            some = min(_QUERIES, starts[b] + sizes[b] - i)
            span = (some + lanes - 1) // lanes * lanes
            _fill_panel(rounded, deltas, i, some, mean, panel, start)
            totals[:, :span] = _f(0.0)
            for batch in range(batches):
                for r in range(0, _BATCH, KEYS):
                    rows = heights[r : r + KEYS]
                    for t in range(0, span, lanes):
                        _multiply(rounded, k, places, batch * _BATCH + r, panel, t, start, rows)
                    for row in range(KEYS):
                        for t in range(span):
                            rows[row, t] = _exp(rows[row, t])
                for c in range(0, len(columns), KEYS):
                    for t in range(0, span, LANES):
                        multiply_tile(pairs[batch], columns, c, heights, t, nothing, tile)  # type: ignore[call-arg]
                    for row in range(KEYS):
                        for t in range(span):
                            totals[c + row, t] += tile[row, t]
            for c in range(1 + width):
                for t in range(some):
                    sums[i + t, c] = totals[c, t]


@cached_njit(fastmath=_FLAGS, nogil=True)
def _expand_one_block(q, scale, k, v, kept, begin, step, tilts, deltas, logs, weights):
    """`expansion.expand` for one block of all queries and no axes, as what the functions above take of it.

    scratch: deltas (n_q, d), logs (1, n_k), weights (1, 1 + tilts, n_k).
    """
    n_q, d = q.shape
    n_k, width = v.shape
    mean = np.zeros(d, np.float32)
    for j in range(n_k):
        for p in range(d):
            mean[p] += k[j, p]
    mean /= _f(n_k)
    starts, sizes, queries = np.zeros(1, np.int64), np.full(1, n_q), np.arange(n_q)
    centres, row_variances = np.empty((1, d), np.float32), np.empty(n_q, np.float32)
    no_points, no_axes = np.empty((n_q, 0), np.float32), np.empty((d, 0), np.float32)
    no_variances = np.empty((1, 0), np.float32)
    centre_blocks(
        q, scale, no_points, no_variances[0], queries, starts, sizes, deltas, centres, no_variances, row_variances
    )
    for j in range(n_k):
        dot = _f(0.0)
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
    """What `see` fills, for one block: log_weight, value, own_log, own_share, own_seen."""
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
def answers_of_one_block(with_own_keys, q, scale, k, v, kept, begin, step, tilts, deltas, logs, weights, out):
    """`local_expansion.attend` for one block of all queries and no axes, into out (n_q, d_v): how many keys were near.

    Of few keys, calls from Python would take longer than what they do; the functions called are the same.
    """
    block, keys, far = _expand_one_block(q, scale, k, v, kept, begin, step, tilts, deltas, logs, weights)
    queries, starts, sizes, _ = block
    mean, centres, _, chosen, _, _ = keys
    extra = np.zeros(len(chosen), np.float32)
    sums, scales = _sums_in_one_block(starts, sizes, deltas, chosen, k, mean, v, extra, centres)
    seen = _see_in_one_block(with_own_keys, block, far, keys, deltas, k, logs, weights)
    log_weight, value, own_log, own_share, own_seen = seen
    expanded_answers(
        0, 1, queries, starts, sizes, tilts > 0, sums, scales, log_weight, value, own_log, own_share, own_seen, v, out
    )  # fmt: skip
    return len(chosen)


@cached_njit(nogil=True)
def controlled_sums_of_one_block(
    with_own_keys, q, scale, k, v, kept, begin, step, tilts, limit, points, deltas, logs, weights, out
):  # fmt: skip
    """`approxkmv.sums` for one block of all queries and no axes, into out (n_q, d_v + 2): how many keys were near.

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
