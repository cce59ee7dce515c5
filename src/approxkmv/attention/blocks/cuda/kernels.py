"""Triton kernels of local expansion: clusters of queries, and their near and far keys, of which no n x n / block array
is made. Queries, keys and values are read as they are, in any floating-point type, and centred where they are used.
"""

from __future__ import annotations

from approxkmv.attention.kernels.triton import _dot, tl, triton


@triton.jit
def nearest_kernel(
    q_pointer, mean_pointer, weight_pointer, centre_pointer, norm_pointer, label_pointer,
    n, points, step, clusters,
    LENGTH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The nearest centre of (q - mean) weight, for every step-th of n queries. norm: |centre|^2."""
    entry = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    along = tl.arange(0, BD)
    there, mine = along < D, rows < points
    q = tl.load(
        q_pointer + (entry * n + rows[:, None] * step) * D + along[None, :],
        mask=mine[:, None] & there[None, :],
        other=0.0,
    ).to(tl.float32)
    mean = tl.load(mean_pointer + entry * D + along, mask=there, other=0.0)
    weight = tl.load(weight_pointer + entry * D + along, mask=there, other=0.0)
    q = ((q - mean[None, :]) * weight[None, :]).to(tl.bfloat16)
    least = tl.full((BM,), float("inf"), tl.float32)
    label = tl.zeros((BM,), tl.int32)
    for first in range(0, clusters if LENGTH == 0 else LENGTH, BN):
        some = first + tl.arange(0, BN)
        real = some < clusters
        centre = tl.load(
            centre_pointer + (entry * clusters + some[:, None]) * D + along[None, :],
            mask=real[:, None] & there[None, :],
            other=0.0,
        )
        norm = tl.load(norm_pointer + entry * clusters + some, mask=real, other=float("inf"))
        gap = norm[None, :] - 2.0 * _dot(q, tl.trans(centre), "ieee", WIDEN)
        closest = tl.min(gap, 1)
        # The first of equals, as argmin
        at = tl.min(tl.where(gap == closest[:, None], some[None, :], 2147483647), 1)
        label = tl.where(closest < least, at, label)
        least = tl.minimum(least, closest)
    tl.store(label_pointer + entry * points + rows, label.to(label_pointer.dtype.element_ty), mask=mine)


@triton.jit
def centres_kernel(
    q_pointer, query_pointer, end_pointer, centre_pointer, variance_pointer,
    n, tiles, clusters, scale, most,
    LENGTH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Mean, rounded to bfloat16, and variances of the scaled queries of a cluster, from at most `most` of its tiles."""
    entry = tl.program_id(1).to(tl.int64)
    cluster = tl.program_id(0)
    along = tl.arange(0, BD)
    there = along < D
    ends = end_pointer + entry * clusters + cluster
    last = tl.load(ends).to(tl.int32)
    first = tl.where(cluster > 0, tl.load(ends - tl.minimum(cluster, 1)).to(tl.int32), 0)
    step = tl.maximum(1, (last - first + most - 1) // most)
    # Relative to a query of the cluster, so that the squares do not cancel
    origin = tl.load(query_pointer + (entry * tiles + tl.minimum(first, tiles - 1)) * BM).to(tl.int64)
    origin = tl.maximum(origin, 0)
    shift = tl.load(q_pointer + (entry * n + origin) * D + along, mask=there, other=0.0).to(tl.float32)
    count = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    squares = tl.zeros((BD,), tl.float32)
    number = (last - first + step - 1) // step
    for i in range(number if LENGTH == 0 else LENGTH):
        place = first + i * step
        in_tile = tl.arange(0, BM)
        exists = in_tile < (last - place) * BM
        rows = tl.load(query_pointer + (entry * tiles + place) * BM + in_tile, mask=exists, other=-1).to(tl.int64)
        mine = rows >= 0
        q = tl.load(
            q_pointer + (entry * n + rows[:, None]) * D + along[None, :],
            mask=mine[:, None] & there[None, :],
            other=0.0,
        ).to(tl.float32)
        gap = tl.where(mine[:, None], q - shift[None, :], 0.0)
        count += mine.to(tl.float32)
        total += tl.sum(gap, 0)
        squares += tl.sum(gap * gap, 0)
    queries = tl.maximum(tl.sum(count, 0), 1.0)
    average = total / queries
    centre = (scale * (shift + average)).to(tl.bfloat16).to(tl.float32)
    variance = scale * scale * tl.maximum(squares / queries - average * average, 0.0)
    at = (entry * clusters + cluster) * D + along
    tl.store(centre_pointer + at, centre, mask=there)
    tl.store(variance_pointer + at, variance, mask=there)


@triton.jit
def keys_kernel(
    k_pointer, mean_pointer, spread_pointer, bar_pointer, pair_pointer, apart_pointer, n,
    D: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Keys less their mean beside their squares, in rows of twice W numbers; 1e30 for those that stand apart, or 0."""
    entry = tl.program_id(1).to(tl.int64)
    rows = entry * n + tl.program_id(0) * BN + tl.arange(0, BN)
    along = tl.arange(0, BD)
    there, real = along < D, tl.program_id(0) * BN + tl.arange(0, BN) < n
    k = tl.load(k_pointer + rows[:, None] * D + along[None, :], mask=real[:, None] & there[None, :], other=0.0)
    mean = tl.load(mean_pointer + entry * D + along, mask=there, other=0.0)
    spread = tl.load(spread_pointer + entry * D + along, mask=there, other=0.0)
    k = tl.where(there[None, :], k.to(tl.float32) - mean[None, :], 0.0)
    squares = k * k
    apart = tl.sum(squares * spread[None, :], 1) > tl.load(bar_pointer + entry)
    inside = real[:, None] & (along < W)[None, :]
    tl.store(pair_pointer + rows[:, None] * (2 * W) + along[None, :], k.to(tl.bfloat16), mask=inside)
    tl.store(pair_pointer + rows[:, None] * (2 * W) + W + along[None, :], squares.to(tl.bfloat16), mask=inside)
    tl.store(apart_pointer + rows, tl.where(apart, 1e30, 0.0), mask=real)


@triton.jit
def sample_kernel(
    rank_pointer, pair_pointer, apart_pointer, log_pointer, clusters, n, sample, stride,
    W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """x as in `far_kernel` of one key in each `stride`, of those apart -1e30."""
    entry = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    along = tl.arange(0, BD)
    mine, there, real = rows < clusters, along < W, place < sample
    of_row = entry * clusters + rows
    at = rank_pointer + of_row[:, None] * (2 * W) + along[None, :]
    centre = tl.load(at, mask=mine[:, None] & there[None, :], other=0.0)
    half = tl.load(at + W, mask=mine[:, None] & there[None, :], other=0.0)
    # By a hash, or keys that repeat in the same steps would be all that it sees.
    keys = entry * n + place.to(tl.int64) * stride + (place.to(tl.int64) * 2654435761 >> 12) % stride
    at = pair_pointer + keys[:, None] * (2 * W) + along[None, :]
    k = tl.load(at, mask=real[:, None] & there[None, :], other=0.0)
    squares = tl.load(at + W, mask=real[:, None] & there[None, :], other=0.0)
    apart = tl.load(apart_pointer + keys, mask=real, other=0.0)
    x = _dot(centre, tl.trans(k), "ieee", WIDEN) + _dot(half, tl.trans(squares), "ieee", WIDEN)
    x = tl.where(apart[None, :] > 0.0, -1e30, x)
    tl.store(log_pointer + of_row[:, None] * sample + place[None, :], x, mask=mine[:, None] & real[None, :])


@triton.jit
def threshold_kernel(log_pointer, bound_pointer, sample, rank, ROOM: tl.constexpr):
    """A number that fewer than `rank` of each row of logs exceed, 0.001 above the rank-th largest at most."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, ROOM)
    x = tl.load(log_pointer + row * sample + place, mask=place < sample, other=-1e30)
    high = tl.max(x, 0)
    # Keys with less than exp(-80) of the largest weight are far, however few are left.
    low = high - 80.0
    for _ in range(17):
        middle = 0.5 * (low + high)
        enough = tl.sum((x > middle).to(tl.int32), 0) >= rank
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    tl.store(bound_pointer + row, high)


@triton.jit
def far_kernel(
    rank_pointer, pair_pointer, apart_pointer, v_pointer, value_mean_pointer, bound_pointer,
    count_pointer, near_pointer, total_pointer, value_pointer, key_pointer, tilt_pointer,
    clusters, n, piece, room,
    PIECE: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """x = c.k + k'Vk / 2 for a piece of the n keys: those above each cluster's bound are listed as near.

    The exp(x - bound) of all others are summed, times 1, v, k and, for one value column, v k. rank: c and half the
    diagonal of V, side by side in bfloat16.
    """
    entry = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    along, values = tl.arange(0, BD), tl.arange(0, BV)
    mine, there = rows < clusters, along < W
    of_row = entry * clusters + rows
    at = rank_pointer + of_row[:, None] * (2 * W) + along[None, :]
    centre = tl.load(at, mask=mine[:, None] & there[None, :], other=0.0)
    half = tl.load(at + W, mask=mine[:, None] & there[None, :], other=0.0)
    bound = tl.load(bound_pointer + of_row, mask=mine, other=float("inf"))
    value_mean = tl.load(value_mean_pointer + entry * D_V + values, mask=values < D_V, other=0.0)
    counter = count_pointer + of_row
    lists = near_pointer + of_row * room
    total = tl.zeros((BM,), tl.float32)
    value = tl.zeros((BM, BV), tl.float32)
    far_key = tl.zeros((BM, BD), tl.float32)
    tilt = tl.zeros((BM, BD), tl.float32)
    for begin in range(0, piece if PIECE == 0 else PIECE, BN):
        keys = part * piece + begin + tl.arange(0, BN)
        real = keys < n
        line = pair_pointer + (entry * n + keys[:, None]) * (2 * W) + along[None, :]
        k = tl.load(line, mask=real[:, None] & there[None, :], other=0.0)
        squares = tl.load(line + W, mask=real[:, None] & there[None, :], other=0.0)
        apart = tl.load(apart_pointer + entry * n + keys, mask=real, other=0.0)
        x = _dot(centre, tl.trans(k), "ieee", WIDEN) + _dot(half, tl.trans(squares), "ieee", WIDEN)
        x = tl.where(real[None, :], x + apart[None, :] - bound[:, None], float("-inf"))
        near = x > 0.0
        # Without a branch: inside one Triton 3.9 does not compile the store.
        place = tl.atomic_add(counter[:, None] + tl.zeros((BM, BN), tl.int32), 1, mask=near, sem="relaxed")
        place = tl.where(near, place, room)
        tl.store(lists[:, None] + place, keys[None, :] + tl.zeros((BM, BN), tl.int32), mask=place < room)
        weight = tl.where(near, 0.0, tl.exp2(1.4426950408889634 * x))
        total += tl.sum(weight, 1)
        far_key += _dot(weight.to(tl.bfloat16), k, "ieee", WIDEN)
        if D_V == 1:
            v = tl.load(v_pointer + entry * n + keys, mask=real, other=0.0).to(tl.float32) - tl.sum(value_mean, 0)
            weight *= v[None, :]
            value += tl.sum(weight, 1)[:, None]
            tilt += _dot(weight.to(tl.bfloat16), k, "ieee", WIDEN)
        else:
            v = tl.load(
                v_pointer + (entry * n + keys[:, None]) * D_V + values[None, :],
                mask=real[:, None] & (values[None, :] < D_V),
                other=0.0,
            ).to(tl.float32)
            v = (v - value_mean[None, :]).to(tl.bfloat16)
            value += _dot(weight.to(tl.bfloat16), v, "ieee", WIDEN)
    out = (part * tl.num_programs(2) + entry) * clusters + rows
    tl.store(total_pointer + out, total, mask=mine)
    at = out[:, None] * D_V + values[None, :]
    tl.store(value_pointer + at, value, mask=mine[:, None] & (values[None, :] < D_V))
    at = out[:, None] * D + along[None, :]
    inside = mine[:, None] & (along < D)[None, :]
    tl.store(key_pointer + at, far_key, mask=inside)
    if D_V == 1:
        tl.store(tilt_pointer + at, tilt, mask=inside)


@triton.jit
def finish_kernel(
    variance_pointer, bound_pointer, count_pointer, total_pointer, value_pointer, key_pointer, tilt_pointer,
    log_pointer, clusters, parts, room,
    LENGTH: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The far key of a cluster from the sums of the pieces, over those of the first: total, value, key, tilt.

    log: its log weight at the centre, NaN if the cluster's list is full.
    """
    entry = tl.program_id(1).to(tl.int64)
    row = entry * clusters + tl.program_id(0)
    along, values = tl.arange(0, BD), tl.arange(0, BV)
    there, wide = along < D, values < D_V
    total = 0.0
    value = tl.zeros((BV,), tl.float32)
    key = tl.zeros((BD,), tl.float32)
    tilt = tl.zeros((BD,), tl.float32)
    rows = tl.num_programs(1) * clusters
    for part in range(parts if LENGTH == 0 else LENGTH):
        at = part * rows + row
        total += tl.load(total_pointer + at)
        value += tl.load(value_pointer + at * D_V + values, mask=wide, other=0.0)
        key += tl.load(key_pointer + at * D + along, mask=there, other=0.0)
        if D_V == 1:
            tilt += tl.load(tilt_pointer + at * D + along, mask=there, other=0.0)
    total = tl.maximum(total, 1e-30)
    value, key = value / total, key / total
    variance = tl.load(variance_pointer + row * D + along, mask=there, other=0.0)
    bound = tl.load(bound_pointer + row)
    log = tl.log(total) + bound - 0.5 * tl.sum(variance * key * key, 0)
    tl.store(log_pointer + row, tl.where(tl.load(count_pointer + row) > room, float("nan"), log))
    tl.store(total_pointer + row, total)
    tl.store(value_pointer + row * D_V + values, value, mask=wide)
    tl.store(key_pointer + row * D + along, key, mask=there)
    if D_V == 1:
        tl.store(tilt_pointer + row * D + along, tilt / total - tl.sum(value, 0) * key, mask=there)


@triton.jit
def rows_kernel(
    q_pointer, query_pointer, cluster_pointer, k_pointer, v_pointer, mean_pointer, value_mean_pointer,
    key_spread_pointer, count_pointer, near_pointer, bound_pointer, centre_pointer, variance_pointer,
    total_pointer, far_value_pointer, far_key_pointer, tilt_pointer, far_log_pointer, out_pointer, lost_pointer,
    n_q, n_k, room, clusters, scale, reach, off,
    LENGTH: tl.constexpr, OWN: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Answers of a tile of queries: near keys and a query's own exactly, the far key to first order; NaN where lost."""
    entry = tl.program_id(1).to(tl.int64)
    tile = entry * tl.num_programs(0) + tl.program_id(0)
    rows = tl.load(query_pointer + tile * BM + tl.arange(0, BM)).to(tl.int64)
    mine = rows >= 0
    # The last tiles may be without queries.
    if tl.max(rows) >= 0:
        of_block = entry * clusters + tl.load(cluster_pointer + tile)
        along, values = tl.arange(0, BD), tl.arange(0, BV)
        there, wide = along < D, values < D_V
        inside = mine[:, None] & there[None, :]
        mean = tl.load(mean_pointer + entry * D + along, mask=there, other=0.0)
        value_mean = tl.load(value_mean_pointer + entry * D_V + values, mask=wide, other=0.0)
        centre = tl.load(centre_pointer + of_block * D + along, mask=there, other=0.0)
        n_near = tl.minimum(tl.load(count_pointer + of_block), room)
        q = tl.load(q_pointer + (entry * n_q + rows[:, None]) * D + along[None, :], mask=inside, other=0.0)
        delta = tl.where(inside, scale * q.to(tl.float32) - centre[None, :], 0.0)
        # Rounding is relative to what a query adds to its centre's logits, which are made in float32.
        low = (1.4426950408889634 * delta).to(tl.bfloat16)
        highest = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BV), tl.float32)
        seen = tl.zeros((BM,), tl.int32)
        for first in range(0, n_near if LENGTH == 0 else LENGTH, BN):
            place = first + tl.arange(0, BN)
            near = place < n_near
            keys = tl.load(near_pointer + of_block * room + place, mask=near, other=0).to(tl.int64)
            k = tl.load(
                k_pointer + (entry * n_k + keys[:, None]) * D + along[None, :],
                mask=near[:, None] & there[None, :],
                other=0.0,
            ).to(tl.float32)
            k = tl.where(there[None, :], k - mean[None, :], 0.0)
            base = tl.where(near, 1.4426950408889634 * tl.sum(k * centre[None, :], 1), -1e30)
            logits = _dot(low, tl.trans(k.to(tl.bfloat16)), "ieee", WIDEN) + base[None, :]
            if OWN:
                same = (keys[None, :] == rows[:, None]) & near[None, :]
                seen = tl.maximum(seen, tl.max(same.to(tl.int32), 1))
            v = tl.load(
                v_pointer + (entry * n_k + keys[:, None]) * D_V + values[None, :],
                mask=near[:, None] & wide[None, :],
                other=0.0,
            ).to(tl.float32)
            v = v - value_mean[None, :]
            higher = tl.maximum(highest, tl.max(logits, 1))
            fade = tl.exp2(highest - higher)
            weights = tl.exp2(logits - higher[:, None])
            total = total * fade + tl.sum(weights, 1)
            if D_V == 1:
                acc = acc * fade[:, None] + tl.sum(weights * tl.trans(v), 1)[:, None]
            else:
                acc = acc * fade[:, None] + _dot(weights.to(tl.bfloat16), v.to(tl.bfloat16), "ieee", WIDEN)
            highest = higher
        highest = highest / 1.4426950408889634
        known = highest + tl.log(total)
        far_key = tl.load(far_key_pointer + of_block * D + along, mask=there, other=0.0)
        far_log = tl.sum(delta * far_key[None, :], 1) + tl.load(far_log_pointer + of_block)
        far_value = tl.load(far_value_pointer + of_block * D_V + values, mask=wide, other=0.0)
        value = far_value[None, :] + tl.zeros((BM, BV), tl.float32)
        if D_V == 1:
            tilt = tl.load(tilt_pointer + of_block * D + along, mask=there, other=0.0)
            value += tl.sum(delta * tilt[None, :], 1)[:, None]
        spread = tl.load(key_spread_pointer + entry * D + along, mask=there, other=0.0)
        variance = tl.sum(delta * delta * spread[None, :], 1)
        shift = tl.maximum(highest, far_log)
        if OWN:
            k = tl.load(k_pointer + (entry * n_k + rows[:, None]) * D + along[None, :], mask=inside, other=0.0)
            k = tl.where(inside, k.to(tl.float32) - mean[None, :], 0.0)
            v = tl.load(
                v_pointer + (entry * n_k + rows[:, None]) * D_V + values[None, :],
                mask=mine[:, None] & wide[None, :],
                other=0.0,
            ).to(tl.float32)
            v = v - value_mean[None, :]
            own = tl.sum((delta + centre[None, :]) * k, 1)
            light = (seen == 0) & mine
            known = tl.where(light, tl.maximum(known, own) + tl.log(1 + tl.exp(-tl.abs(known - own))), known)
            shift = tl.where(light, tl.maximum(shift, own), shift)
            # What the far key holds of it, with the far pass's rounding
            half = tl.load(variance_pointer + of_block * D + along, mask=there, other=0.0)
            half = (0.5 * half).to(tl.bfloat16).to(tl.float32)
            lean = 1 + tl.sum(delta * (k - far_key[None, :]), 1)
            squares = (k * k).to(tl.bfloat16).to(tl.float32)
            k = k.to(tl.bfloat16).to(tl.float32)
            x = tl.sum(k * centre[None, :] + squares * half[None, :], 1)
            share = tl.exp(tl.minimum(x - tl.load(bound_pointer + of_block), 0.0)) / tl.load(total_pointer + of_block)
            share = tl.where(light, share, 0.0)
            added = tl.where(light, tl.exp(own - shift), 0.0)
        near_part, weight = tl.exp(highest - shift), tl.exp(far_log - shift)
        row_sums = total * near_part + weight
        numerators = acc * near_part[:, None] + weight[:, None] * value
        if OWN:
            counted = weight * share * lean
            row_sums += added - counted
            if D_V == 1:
                numerators += (added - counted)[:, None] * v
            else:
                # The difference of the own key's two shares goes to the far value: a row's weights add up to one.
                numerators += (added - weight * share)[:, None] * v + (weight * share - counted)[:, None] * value
        # As `reach.beyond_reach`; NaN counts as lost.
        gap = far_log - known
        share_log = tl.minimum(gap, 0.0) - tl.log(1 + tl.exp(-tl.abs(gap)))
        kept = (share_log + 0.5 * variance <= off) & (variance <= reach)
        # Where all keys weigh the same, none is near.
        kept = kept & ((shift - highest < 80.0) | (n_near == 0))
        answer = numerators / row_sums[:, None] + value_mean[None, :]
        kept = kept & (tl.max((tl.abs(answer) < 3e38).to(tl.int32) - 1, 1) == 0)
        answer = tl.where(kept[:, None], answer, float("nan")).to(out_pointer.dtype.element_ty)
        at = out_pointer + (entry * n_q + rows[:, None]) * D_V + values[None, :]
        tl.store(at, answer, mask=mine[:, None] & wide[None, :])
        lost = tl.sum((mine & (kept == 0)).to(tl.int32), 0)
        if lost > 0:
            tl.atomic_add(lost_pointer, lost, sem="relaxed")
