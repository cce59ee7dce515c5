"""Triton kernels of local expansion: near and far keys of clusters; of n x n / block numbers only bits are stored.

Queries, keys and values may be of any floating-point type. Keys and values are centred once; exact logits use raw keys.
"""

from __future__ import annotations

from approxkmv.attention.kernels.triton import jit, tl


@jit
def keys_kernel(
    k_pointer, v_pointer, mean_pointer, value_mean_pointer, spread_pointer, bar_pointer,
    pair_pointer, centred_pointer, apart_pointer, n, padded,
    D: tl.constexpr, D_V: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Keys less their mean beside their squares, in rows of twice W numbers, and values less theirs, for `padded` keys.

    apart: 1e30 for those that stand apart, or 0; -inf beyond the n keys, whose other numbers are 0.
    """
    entry = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    along, values = tl.arange(0, BD), tl.arange(0, BV)
    there, wide, real = along < D, values < D_V, place < n
    inside = real[:, None] & there[None, :]
    k = tl.load(k_pointer + (entry * n + place[:, None]) * D + along[None, :], mask=inside, other=0.0)
    mean = tl.load(mean_pointer + entry * D + along, mask=there, other=0.0)
    spread = tl.load(spread_pointer + entry * D + along, mask=there, other=0.0)
    k = tl.where(inside, k.to(tl.float32) - mean[None, :], 0.0)
    squares = k * k
    apart = tl.sum(squares * spread[None, :], 1) > tl.load(bar_pointer + entry)
    exists = place < padded
    at = pair_pointer + (entry * padded + place[:, None]) * (2 * W) + along[None, :]
    inside = exists[:, None] & (along < W)[None, :]
    tl.store(at, k.to(tl.bfloat16), mask=inside)
    tl.store(at + W, squares.to(tl.bfloat16), mask=inside)
    apart = tl.where(real, tl.where(apart, 1e30, 0.0), float("-inf"))
    tl.store(apart_pointer + entry * padded + place, apart, mask=exists)
    mean = tl.load(value_mean_pointer + entry * D_V + values, mask=wide, other=0.0)
    inside = real[:, None] & wide[None, :]
    v = tl.load(v_pointer + (entry * n + place[:, None]) * D_V + values[None, :], mask=inside, other=0.0)
    v = tl.where(inside, v.to(tl.float32) - mean[None, :], 0.0).to(centred_pointer.dtype.element_ty)
    at = centred_pointer + (entry * padded + place[:, None]) * D_V + values[None, :]
    tl.store(at, v, mask=exists[:, None] & wide[None, :])


@jit
def sample_kernel(
    rank_pointer, pair_pointer, apart_pointer, log_pointer, clusters, padded, sample, stride,
    W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
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
    keys = entry * padded + place.to(tl.int64) * stride + (place.to(tl.int64) * 2654435761 >> 12) % stride
    at = pair_pointer + keys[:, None] * (2 * W) + along[None, :]
    k = tl.load(at, mask=real[:, None] & there[None, :], other=0.0)
    squares = tl.load(at + W, mask=real[:, None] & there[None, :], other=0.0)
    apart = tl.load(apart_pointer + keys, mask=real, other=0.0)
    x = tl.dot(centre, tl.trans(k)) + tl.dot(half, tl.trans(squares))
    x = tl.where(apart[None, :] > 0.0, -1e30, x)
    tl.store(log_pointer + of_row[:, None] * sample + place[None, :], x, mask=mine[:, None] & real[None, :])


@jit
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


@jit
def _waited_for(acc):
    """acc itself. A use of the last product of a loop's step, without which ptxas makes each product wait alone."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=False, pack=1)


@jit
def far_kernel(
    rank_pointer, pair_pointer, apart_pointer, centred_pointer, bound_pointer,
    word_pointer, total_pointer, value_pointer, key_pointer, tilt_pointer,
    clusters, padded, piece,
    D: tl.constexpr, D_V: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """x = c.k + k'Vk / 2 for a piece of the keys: those above each cluster's bound are near, bits of 1 in `word`.

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
    # A bit for each key, 32 keys a word: lists written here would take as many instructions as all else in the loop.
    column = tl.arange(0, BN)
    bit = (tl.zeros((BN,), tl.int32) + 1) << (column % 32)
    words = word_pointer + (of_row * tl.num_programs(0) + part) * (piece // 32)
    bound *= 1.4426950408889634
    total = tl.zeros((BM,), tl.float32)
    value = tl.zeros((BM, BV), tl.float32)
    far_key = tl.zeros((BM, BD), tl.float32)
    tilt = tl.zeros((BM, BD), tl.float32)
    for begin in range(0, piece, BN):
        keys = entry * padded + part * piece + begin + column
        line = pair_pointer + keys[:, None] * (2 * W) + along[None, :]
        k = tl.load(line, mask=there[None, :], other=0.0)
        squares = tl.load(line + W, mask=there[None, :], other=0.0)
        apart = tl.load(apart_pointer + keys)
        x = tl.dot(centre, tl.trans(k)) + tl.dot(half, tl.trans(squares))
        x = 1.4426950408889634 * x + (apart[None, :] - bound[:, None])
        near = x > 0.0
        word = tl.sum(tl.where(near & (column < 32)[None, :], bit[None, :], 0), 1)
        tl.store(words + begin // 32, word, mask=mine)
        if BN > 32:
            word = tl.sum(tl.where(near & (column >= 32)[None, :], bit[None, :], 0), 1)
            tl.store(words + begin // 32 + 1, word, mask=mine)
        weight = tl.where(near, 0.0, tl.exp2(x))
        total += tl.sum(weight, 1)
        far_key += tl.dot(weight.to(tl.bfloat16), k)
        if D_V == 1:
            weight *= tl.load(centred_pointer + keys)[None, :]
            value += tl.sum(weight, 1)[:, None]
            tilt = _waited_for(tilt + tl.dot(weight.to(tl.bfloat16), k))
        else:
            line = centred_pointer + keys[:, None] * D_V + values[None, :]
            v = tl.load(line, mask=(values < D_V)[None, :], other=0.0)
            value = _waited_for(value + tl.dot(weight.to(tl.bfloat16), v))
    out = (part * tl.num_programs(2) + entry) * clusters + rows
    tl.store(total_pointer + out, total, mask=mine)
    at = out[:, None] * D_V + values[None, :]
    tl.store(value_pointer + at, value, mask=mine[:, None] & (values[None, :] < D_V))
    at = out[:, None] * D + along[None, :]
    inside = mine[:, None] & (along < D)[None, :]
    tl.store(key_pointer + at, far_key, mask=inside)
    if D_V == 1:
        tl.store(tilt_pointer + at, tilt, mask=inside)


@jit
def lists_kernel(word_pointer, count_pointer, near_pointer, words, room, BN: tl.constexpr):
    """The near keys of a cluster, in their order, and how many there are: those that find no room are counted only."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    total = 0
    for first in range(0, words, BN):
        at = first + tl.arange(0, BN)
        word = tl.load(word_pointer + row * words + at, mask=at < words, other=0)
        # How many bits of 1 there are, in pairs, fours and bytes, which a product adds up
        bits = word - ((word >> 1) & 0x55555555)
        bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
        bits = (((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
        place = total + tl.cumsum(bits, 0) - bits
        total += tl.sum(bits, 0)
        while tl.max((word != 0).to(tl.int32), 0) > 0:
            # The lowest bit of 1, whose place is the exponent of its value as a float32
            value = (word & -word).to(tl.uint32, bitcast=True).to(tl.float32)
            key = 32 * at + (value.to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(near_pointer + row * room + place, key, mask=(word != 0) & (place < room))
            place += 1
            word = word & (word - 1)
    tl.store(count_pointer + row, total)


@jit
def finish_kernel(
    rank_pointer, bound_pointer, count_pointer, total_pointer, value_pointer, key_pointer, tilt_pointer,
    log_pointer, clusters, parts, room,
    D: tl.constexpr, D_V: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The far key of a cluster from the sums of the pieces, over those of the first: total, value, key, tilt.

    log: its log weight at the centre, NaN if the cluster's list is full.
    """
    entry = tl.program_id(1).to(tl.int64)
    row = entry * clusters + tl.program_id(0)
    along, values = tl.arange(0, BD), tl.arange(0, BV)
    there, wide = along < D, values < D_V
    total = tl.zeros((BN,), tl.float32)
    value = tl.zeros((BN, BV), tl.float32)
    key = tl.zeros((BN, BD), tl.float32)
    tilt = tl.zeros((BN, BD), tl.float32)
    rows = tl.num_programs(1) * clusters
    for first in range(0, parts, BN):
        part = first + tl.arange(0, BN)
        real = part < parts
        at, some = part * rows + row, real[:, None] & there[None, :]
        total += tl.load(total_pointer + at, mask=real, other=0.0)
        line = value_pointer + at[:, None] * D_V + values[None, :]
        value += tl.load(line, mask=real[:, None] & wide[None, :], other=0.0)
        key += tl.load(key_pointer + at[:, None] * D + along[None, :], mask=some, other=0.0)
        if D_V == 1:
            tilt += tl.load(tilt_pointer + at[:, None] * D + along[None, :], mask=some, other=0.0)
    total, value = tl.maximum(tl.sum(total, 0), 1e-30), tl.sum(value, 0)
    key, tilt = tl.sum(key, 0), tl.sum(tilt, 0)
    value, key = value / total, key / total
    half = tl.load(rank_pointer + row * (2 * W) + W + along, mask=there, other=0.0).to(tl.float32)
    bound = tl.load(bound_pointer + row)
    log = tl.log(total) + bound - tl.sum(half * key * key, 0)
    tl.store(log_pointer + row, tl.where(tl.load(count_pointer + row) > room, float("nan"), log))
    # Other threads may still read the sums of the first piece.
    tl.debug_barrier()
    tl.store(total_pointer + row, total)
    tl.store(value_pointer + row * D_V + values, value, mask=wide)
    tl.store(key_pointer + row * D + along, key, mask=there)
    if D_V == 1:
        tl.store(tilt_pointer + row * D + along, tilt / total - tl.sum(value, 0) * key, mask=there)


@jit
def bases_kernel(
    rank_pointer, k_pointer, mean_pointer, count_pointer, near_pointer, base_pointer, clusters, n, room,
    D: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The logits of a cluster's near keys at its centre, times log2 e: in float32, once for all its tiles."""
    entry = tl.program_id(2).to(tl.int64)
    of_row = entry * clusters + tl.program_id(0)
    place = tl.program_id(1) * BN + tl.arange(0, BN)
    near = place < tl.minimum(tl.load(count_pointer + of_row), room)
    along = tl.arange(0, BD)
    there = along < D
    keys = tl.load(near_pointer + of_row * room + place, mask=near, other=0).to(tl.int64)
    k = tl.load(
        k_pointer + (entry * n + keys[:, None]) * D + along[None, :], mask=near[:, None] & there[None, :], other=0.0
    )
    mean = tl.load(mean_pointer + entry * D + along, mask=there, other=0.0)
    centre = tl.load(rank_pointer + of_row * (2 * W) + along, mask=there, other=0.0).to(tl.float32)
    base = tl.sum((k.to(tl.float32) - mean[None, :]) * centre[None, :], 1)
    tl.store(base_pointer + of_row * room + place, 1.4426950408889634 * base, mask=near)


@jit
def rows_kernel(
    q_pointer, query_pointer, cluster_pointer, k_pointer, pair_pointer, v_pointer, centred_pointer, mean_pointer,
    value_mean_pointer, key_spread_pointer, count_pointer, near_pointer, base_pointer, bound_pointer, rank_pointer,
    total_pointer, far_value_pointer, far_key_pointer, tilt_pointer, far_log_pointer, out_pointer, lost_pointer,
    n_q, n_k, padded, room, clusters, scale, reach, off,
    OWN: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Answers of a tile of queries: near keys and a query's own exactly, the far key to first order; NaN where lost."""
    entry = tl.program_id(1).to(tl.int64)
    tile = entry * tl.num_programs(0) + tl.program_id(0)
    rows = tl.load(query_pointer + tile * BM + tl.arange(0, BM))
    mine = rows >= 0
    # The last tiles may be without queries.
    if tl.max(rows) >= 0:
        of_block = entry * clusters + tl.load(cluster_pointer + tile)
        along, values = tl.arange(0, BD), tl.arange(0, BV)
        there, wide = along < D, values < D_V
        inside = mine[:, None] & there[None, :]
        centre = tl.load(rank_pointer + of_block * (2 * W) + along, mask=there, other=0.0).to(tl.float32)
        n_near = tl.minimum(tl.load(count_pointer + of_block), room)
        q = tl.load(q_pointer + (entry * n_q + rows[:, None]) * D + along[None, :], mask=inside, other=0.0)
        delta = tl.where(inside, scale * q.to(tl.float32) - centre[None, :], 0.0)
        # Rounding is relative to what a query adds to its centre's logits, which are made in float32.
        low = (1.4426950408889634 * delta).to(tl.bfloat16)
        highest = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BV), tl.float32)
        seen = tl.zeros((BM,), tl.int32)
        for first in range(0, n_near, BN):
            place = first + tl.arange(0, BN)
            near = place < n_near
            keys = tl.load(near_pointer + of_block * room + place, mask=near, other=-1)
            k = tl.load(
                pair_pointer + (entry * padded + keys[:, None]) * (2 * W) + along[None, :],
                mask=near[:, None] & (along < W)[None, :],
                other=0.0,
            )
            base = tl.load(base_pointer + of_block * room + place, mask=near, other=-1e30)
            logits = tl.dot(low, tl.trans(k)) + base[None, :]
            if OWN:
                seen = tl.maximum(seen, tl.max((keys[None, :] == rows[:, None]).to(tl.int32), 1))
            higher = tl.maximum(highest, tl.max(logits, 1))
            fade = tl.exp2(highest - higher)
            weights = tl.exp2(logits - higher[:, None])
            total = total * fade + tl.sum(weights, 1)
            if D_V == 1:
                v = tl.load(centred_pointer + entry * padded + keys, mask=near, other=0.0)
                acc = acc * fade[:, None] + tl.sum(weights * v[None, :], 1)[:, None]
            else:
                v = tl.load(
                    centred_pointer + (entry * padded + keys[:, None]) * D_V + values[None, :],
                    mask=near[:, None] & wide[None, :],
                    other=0.0,
                )
                acc = acc * fade[:, None] + tl.dot(weights.to(tl.bfloat16), v)
            highest = higher
        value_mean = tl.load(value_mean_pointer + entry * D_V + values, mask=wide, other=0.0)
        # Loaded again rather than kept in registers all along
        line = q_pointer + (entry * n_q + rows[:, None]) * D + along[None, :]
        q = tl.load(line, mask=inside, other=0.0, eviction_policy="evict_last")
        delta = tl.where(inside, scale * q.to(tl.float32) - centre[None, :], 0.0)
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
            mean = tl.load(mean_pointer + entry * D + along, mask=there, other=0.0)
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
            half = tl.load(rank_pointer + of_block * (2 * W) + W + along, mask=there, other=0.0).to(tl.float32)
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
        kept = kept & (tl.min((tl.abs(answer) < 3e38).to(tl.int32), 1) > 0)
        answer = tl.where(kept[:, None], answer, float("nan")).to(out_pointer.dtype.element_ty)
        at = out_pointer + (entry * n_q + rows[:, None]) * D_V + values[None, :]
        tl.store(at, answer, mask=mine[:, None] & wide[None, :])
        lost = tl.sum((mine & (kept == 0)).to(tl.int32), 0)
        if lost > 0:
            tl.atomic_add(lost_pointer, lost, sem="relaxed")
