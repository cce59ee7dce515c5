"""Clusters of the queries in few kernels, for `fused`: samples of the inputs, k-means, tiles, centres.

Means and spreads are of samples, since centring by any point changes no answer. Queries are read as they are, in any
floating-point type, and centred where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from approxkmv.attention.blocks.cuda.expansion import METRIC_POWER, TILE, most_tiles
from approxkmv.attention.blocks.reach import APART, APART_NATS
from approxkmv.attention.kernels.triton import jit, tl, triton

# Rows from which means and spreads are estimated; at most one less than twice as many
_SAMPLED = 512
# Tiles of a cluster, evenly spaced, from which its centre is made
_TILES_OF_A_CENTRE = 16


@jit
def sampled_kernel(
    q_pointer, k_pointer, v_pointer, query_mean_pointer, query_variance_pointer, key_mean_pointer, key_spread_pointer,
    bar_pointer, value_mean_pointer, weight_pointer, rank_pointer, usual_pointer,
    n_q, n_k, q_step, k_step, scale, power, factor, least,
    D: tl.constexpr, D_V: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    ROOM: tl.constexpr,
):  # fmt: skip
    """What every q_step-th query and k_step-th key and value say: the fields of `Sampled`. usual: ROOM numbers each."""
    entry = tl.program_id(0).to(tl.int64)
    along, values = tl.arange(0, BD), tl.arange(0, BV)
    there, wide = along < D, values < D_V
    q_number, k_number = (n_q + q_step - 1) // q_step, (n_k + k_step - 1) // k_step
    # Relative to a row, so that the squares do not cancel
    row = entry * n_q + q_number // 2 * q_step
    q_shift = tl.load(q_pointer + row * D + along, mask=there, other=0.0).to(tl.float32)
    row = entry * n_k + k_number // 2 * k_step
    k_shift = tl.load(k_pointer + row * D + along, mask=there, other=0.0).to(tl.float32)
    # Added up over rows at the end alone, so that loads need not wait for sums across threads
    queries = tl.zeros((BN, BD), tl.float32)
    squares = tl.zeros((BN, BD), tl.float32)
    keys = tl.zeros((BN, BD), tl.float32)
    sums = tl.zeros((BN, BV), tl.float32)
    for first in range(0, tl.maximum(q_number, k_number), BN):
        q_rows, k_rows = (first + tl.arange(0, BN)) * q_step, (first + tl.arange(0, BN)) * k_step
        q_inside, k_inside = (q_rows < n_q)[:, None] & there[None, :], (k_rows < n_k)[:, None] & there[None, :]
        v_inside = (k_rows < n_k)[:, None] & wide[None, :]
        q = tl.load(q_pointer + (entry * n_q + q_rows[:, None]) * D + along[None, :], mask=q_inside, other=0.0)
        k = tl.load(k_pointer + (entry * n_k + k_rows[:, None]) * D + along[None, :], mask=k_inside, other=0.0)
        v = tl.load(v_pointer + (entry * n_k + k_rows[:, None]) * D_V + values[None, :], mask=v_inside, other=0.0)
        q = tl.where(q_inside, q.to(tl.float32) - q_shift[None, :], 0.0)
        queries += q
        squares += q * q
        keys += tl.where(k_inside, k.to(tl.float32) - k_shift[None, :], 0.0)
        sums += v.to(tl.float32)
    query = tl.sum(queries, 0) / q_number
    variance = scale * scale * tl.maximum(tl.sum(squares, 0) / q_number - query * query, 0.0)
    query = q_shift + query
    key = k_shift + tl.sum(keys, 0) / k_number
    tl.store(query_mean_pointer + entry * D + along, query, mask=there)
    tl.store(query_variance_pointer + entry * D + along, variance, mask=there)
    tl.store(key_mean_pointer + entry * D + along, key, mask=there)
    tl.store(value_mean_pointer + entry * D_V + values, tl.sum(sums, 0) / k_number, mask=wide)
    tl.store(rank_pointer + entry * (2 * W) + along, (scale * query).to(tl.bfloat16), mask=along < W)
    tl.store(rank_pointer + entry * (2 * W) + W + along, (0.5 * variance).to(tl.bfloat16), mask=along < W)
    for first in range(0, k_number, BN):
        place = first + tl.arange(0, BN)
        rows = place * k_step
        inside = (rows < n_k)[:, None] & there[None, :]
        k = tl.load(k_pointer + (entry * n_k + rows[:, None]) * D + along[None, :], mask=inside, other=0.0)
        k = tl.where(inside, k.to(tl.float32) - key[None, :], 0.0)
        tl.store(usual_pointer + entry * ROOM + place, tl.sum(k * k * variance[None, :], 1), mask=place < ROOM)
    # Other threads have written some of what each reads.
    tl.debug_barrier()
    place = tl.arange(0, ROOM)
    spreads = tl.load(usual_pointer + entry * ROOM + place, mask=place < k_number, other=0.0)
    # Their lower median: numbers that are not negative are in the order of their bits.
    bits = tl.where(place < k_number, spreads.to(tl.int32, bitcast=True), 2147483647)
    low, high = tl.full((), 0, tl.int32), tl.full((), 2139095040, tl.int32)
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = tl.sum((bits <= middle).to(tl.int32), 0) > (k_number - 1) // 2
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    bar = tl.maximum(factor * high.to(tl.float32, bitcast=True), least)
    many = tl.sum((spreads > bar).to(tl.int32), 0) * 16 > k_number
    bar = tl.where(many, float("inf"), bar)
    tl.store(bar_pointer + entry, bar)
    kept = tl.zeros((BN,), tl.float32)
    squares = tl.zeros((BN, BD), tl.float32)
    for first in range(0, k_number, BN):
        rows = (first + tl.arange(0, BN)) * k_step
        inside = (rows < n_k)[:, None] & there[None, :]
        k = tl.load(k_pointer + (entry * n_k + rows[:, None]) * D + along[None, :], mask=inside, other=0.0)
        k = tl.where(inside, k.to(tl.float32) - key[None, :], 0.0)
        usual = (rows < n_k) & (tl.sum(k * k * variance[None, :], 1) <= bar)
        kept += usual.to(tl.float32)
        squares += tl.where(usual[:, None], k * k, 0.0)
    spread = tl.sum(squares, 0) / tl.sum(kept, 0)
    tl.store(key_spread_pointer + entry * D + along, spread, mask=there)
    # No logarithm of 0
    weight = scale * tl.exp2(power * tl.log2(tl.maximum(spread, 1e-30)))
    tl.store(weight_pointer + entry * D + along, weight, mask=there)


@jit
def means_kernel(
    q_pointer, mean_pointer, weight_pointer, first_pointer, centre_pointer, norm_pointer, total_pointer, count_pointer,
    n, step, clusters,
    FIRST: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Centres for `nearest_kernel`: every step-th query if FIRST, or the means of what it summed, which become 0."""
    entry = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    along = tl.arange(0, BD)
    mine, there = rows < clusters, along < D
    inside = mine[:, None] & there[None, :]
    of_row = entry * clusters + rows
    at = of_row[:, None] * D + along[None, :]
    if FIRST:
        first = (tl.load(first_pointer) % step).to(tl.int32)
        q = tl.load(q_pointer + (entry * n + rows[:, None] * step + first) * D + along[None, :], mask=inside, other=0.0)
        mean = tl.load(mean_pointer + entry * D + along, mask=there, other=0.0)
        weight = tl.load(weight_pointer + entry * D + along, mask=there, other=0.0)
        centre = (q.to(tl.float32) - mean[None, :]) * weight[None, :]
        # A centre without queries stays where it is.
        moves = mine
    else:
        count = tl.load(count_pointer + of_row, mask=mine, other=0)
        moves = count > 0
        centre = tl.load(total_pointer + at, mask=inside, other=0.0) / tl.maximum(count, 1).to(tl.float32)[:, None]
    tl.store(centre_pointer + at, centre.to(tl.bfloat16), mask=inside & moves[:, None])
    tl.store(norm_pointer + of_row, tl.sum(centre * centre, 1), mask=moves)
    # Other threads may read what each sets to 0.
    tl.debug_barrier()
    tl.store(total_pointer + at, tl.zeros((BM, BD), tl.float32), mask=inside)
    tl.store(count_pointer + of_row, tl.zeros((BM,), tl.int32), mask=mine)


@jit
def nearest_kernel(
    q_pointer, mean_pointer, weight_pointer, centre_pointer, norm_pointer, label_pointer, total_pointer, count_pointer,
    n, points, step, clusters,
    SUMS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The nearest centre of (q - mean) weight, for every step-th of n queries; how many each centre has.

    norm: |centre|^2. If SUMS, each centre's queries are summed, otherwise the labels stored.
    """
    entry = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    along = tl.arange(0, BD)
    there, mine = along < D, rows < points
    inside = mine[:, None] & there[None, :]
    line = q_pointer + (entry * n + rows[:, None] * step) * D + along[None, :]
    mean = tl.load(mean_pointer + entry * D + along, mask=there, other=0.0)
    weight = tl.load(weight_pointer + entry * D + along, mask=there, other=0.0)
    q = tl.load(line, mask=inside, other=0.0).to(tl.float32)
    q = ((q - mean[None, :]) * weight[None, :]).to(tl.bfloat16)
    least = tl.full((BM,), float("inf"), tl.float32)
    label = tl.zeros((BM,), tl.int32)
    for first in range(0, clusters, BN):
        some = first + tl.arange(0, BN)
        real = some < clusters
        centre = tl.load(
            centre_pointer + (entry * clusters + some[:, None]) * D + along[None, :],
            mask=real[:, None] & there[None, :],
            other=0.0,
        )
        norm = tl.load(norm_pointer + entry * clusters + some, mask=real, other=float("inf"))
        gap = norm[None, :] - 2.0 * tl.dot(q, tl.trans(centre))
        closest = tl.min(gap, 1)
        # The first of equals, as argmin
        at = tl.min(tl.where(gap == closest[:, None], some[None, :], 2147483647), 1)
        label = tl.where(closest < least, at, label)
        least = tl.minimum(least, closest)
    of_row = entry * clusters + label
    tl.atomic_add(count_pointer + of_row, 1, mask=mine, sem="relaxed")
    if SUMS:
        # Loaded again rather than kept in registers all along
        q = (tl.load(line, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * weight[None, :]
        tl.atomic_add(total_pointer + of_row[:, None] * D + along[None, :], q, mask=inside, sem="relaxed")
    else:
        tl.store(label_pointer + entry * points + rows, label.to(label_pointer.dtype.element_ty), mask=mine)


@jit
def deal_kernel(
    label_pointer, order_pointer, count_pointer, start_pointer, end_pointer, query_pointer, cluster_pointer,
    n, clusters, tiles, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Queries, in the order of their sorted labels, to tiles of BM rows. start and end: see `tiles_of`."""
    entry = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    real = place < n
    label = tl.load(label_pointer + entry * n + place, mask=real, other=0).to(tl.int32)
    query = tl.load(order_pointer + entry * n + place, mask=real, other=0).to(tl.int32)
    of_row = entry * clusters + label
    count = tl.load(count_pointer + of_row, mask=real, other=0)
    within = place - (tl.load(start_pointer + of_row, mask=real, other=0) - count)
    row = BM * (tl.load(end_pointer + of_row, mask=real, other=0) - (count + BM - 1) // BM) + within
    tl.store(query_pointer + entry * tiles * BM + row, query, mask=real)
    tl.store(cluster_pointer + entry * tiles + row // BM, label, mask=real & (within % BM == 0))


@jit
def centres_kernel(
    q_pointer, query_pointer, end_pointer, rank_pointer,
    n, tiles, clusters, scale, most,
    D: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Mean and half the variances of the scaled queries of a cluster, from at most `most` of its tiles.

    Side by side in bfloat16, W numbers each.
    """
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
    total = tl.zeros((BM, BD), tl.float32)
    squares = tl.zeros((BM, BD), tl.float32)
    number = (last - first + step - 1) // step
    for i in range(number):
        place = first + i * step
        rows = tl.load(query_pointer + (entry * tiles + place) * BM + tl.arange(0, BM)).to(tl.int64)
        mine = rows >= 0
        q = tl.load(
            q_pointer + (entry * n + rows[:, None]) * D + along[None, :],
            mask=mine[:, None] & there[None, :],
            other=0.0,
        ).to(tl.float32)
        gap = tl.where(mine[:, None], q - shift[None, :], 0.0)
        count += mine.to(tl.float32)
        total += gap
        squares += gap * gap
    queries = tl.maximum(tl.sum(count, 0), 1.0)
    average = tl.sum(total, 0) / queries
    variance = scale * scale * tl.maximum(tl.sum(squares, 0) / queries - average * average, 0.0)
    at = rank_pointer + (entry * clusters + cluster) * (2 * W) + along
    tl.store(at, (scale * (shift + average)).to(tl.bfloat16), mask=along < W)
    tl.store(at + W, (0.5 * variance).to(tl.bfloat16), mask=along < W)


def launches(d: int, d_v: int) -> dict[str, dict[str, Any]]:
    """Constants and options of each kernel, by its name, but for those that say how long the inputs are."""
    width = max(16, triton.next_power_of_2(d))
    values = 1 if d_v == 1 else max(16, triton.next_power_of_2(d_v))
    padded = -(-d // 16) * 16
    size = {"D": d, "BD": width}
    rows = {"BN": 8192 // max(width, values), "num_warps": 16}
    return {
        "sampled_kernel": {**size, "D_V": d_v, "W": padded, "BV": values, **rows},
        "means_kernel": {**size, "BM": 16},
        "nearest_kernel": {**size, "BM": 128, "BN": 64, "num_warps": 8},
        "deal_kernel": {"BM": TILE, "BN": 256},
        "centres_kernel": {**size, "BM": TILE, "W": padded},
    }


def _empty(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=like.device)


@dataclass(frozen=True)
class Sampled:
    """What samples say of the inputs; (batch, d), float32."""

    query_mean: torch.Tensor
    query_variance: torch.Tensor
    """Of scaled queries."""
    key_mean: torch.Tensor
    key_spread: torch.Tensor
    """Mean squares of the keys less their mean, without those that stand apart."""
    bar: torch.Tensor
    """(batch,) keys apart have a larger sum of squares times query_variance, as in `reach.stand_apart`."""
    value_mean: torch.Tensor
    """(batch, d_v)"""
    weight: torch.Tensor
    """Of the axes in distances of queries."""
    ranks: torch.Tensor
    """(batch, 1, 2 W) bfloat16, as of `ranks_of`, where all queries are one cluster."""

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Sampled:
        """Of q (batch, n_q, d), k (batch, n_k, d), v (batch, n_k, d_v)."""
        batch, n_q, d = q.shape
        n_k, d_v = v.shape[1:]
        steps = [max(1, n // _SAMPLED) for n in (n_q, n_k)]
        launched = launches(d, d_v)["sampled_kernel"]
        numbers = [-(-n // step) for n, step in zip((n_q, n_k), steps, strict=True)]
        room = triton.next_power_of_2(max(numbers))
        widths = {"query_mean": d, "query_variance": d, "key_mean": d, "key_spread": d, "bar": 1, "value_mean": d_v}
        widths["weight"] = d
        found = {name: _empty(q, batch, width) for name, width in widths.items()}
        found["ranks"] = _empty(q, batch, 1, 2 * launched["W"], dtype=torch.bfloat16)
        usual = _empty(q, batch, room)
        sampled_kernel[(batch,)](
            q, k, v, *found.values(), usual, n_q, n_k, *steps, scale, METRIC_POWER, APART**2, APART_NATS**2,
            ROOM=room, **launched,
        )  # fmt: skip
        return cls(**found)


def labels_of_queries(
    q: torch.Tensor, s: Sampled, first: torch.Tensor, clusters: int, iterations: int, sampled: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k-means cluster (batch, n) of each query, as in `expansion.labels_of_queries`.

    And how many queries each has, (batch, clusters) int32.
    """
    batch, n, d = q.shape
    launched = launches(d, 1)
    labels = _empty(q, batch, n, dtype=torch.int16 if clusters < 2**15 else torch.int32)
    centres = _empty(q, batch, clusters, d, dtype=torch.bfloat16)
    norms, totals = _empty(q, batch, clusters), _empty(q, batch, clusters, d)
    counts = _empty(q, batch, clusters, dtype=torch.int32)

    def means(start: bool) -> None:
        means_kernel[(triton.cdiv(clusters, launched["means_kernel"]["BM"]), batch)](
            q, s.query_mean, s.weight, first, centres, norms, totals, counts, n, n // clusters, clusters,
            FIRST=start, **launched["means_kernel"],
        )  # fmt: skip

    def nearest(step: int, sums: bool) -> None:
        points = len(range(0, n, step))
        nearest_kernel[(triton.cdiv(points, launched["nearest_kernel"]["BM"]), batch)](
            q, s.query_mean, s.weight, centres, norms, labels, totals, counts, n, points, step, clusters,
            SUMS=sums, **launched["nearest_kernel"],
        )  # fmt: skip

    means(start=True)
    for _ in range(iterations):
        nearest(max(1, n // (sampled * clusters)), sums=True)
        means(start=False)
    nearest(1, sums=False)
    return labels, counts


def tiles_of(
    labels: torch.Tensor, counts: torch.Tensor, clusters: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`queries`, `clusters` (-1 for a tile without queries) and `ends` of `expansion.Tiles`.

    For labels (batch, n), of which each cluster has counts (batch, clusters).
    """
    batch, n = labels.shape
    number = most_tiles(n, clusters)
    ordered, order = labels.sort(dim=1, stable=True)
    ends, stops = (counts + (TILE - 1)).div_(TILE, rounding_mode="floor").cumsum(1), counts.cumsum(1)
    both = torch.full((batch * number * (TILE + 1),), -1, dtype=torch.int32, device=labels.device)
    queries, of_tile = both.split([batch * number * TILE, batch * number])
    launched = launches(1, 1)["deal_kernel"]
    deal_kernel[(triton.cdiv(n, launched["BN"]), batch)](
        ordered, order, counts, stops, ends, queries, of_tile, n, clusters, number, **launched
    )
    return queries.view(batch, number, TILE), of_tile.view(batch, number), ends


def one_cluster(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`queries` and `clusters` of `expansion.Tiles` where all of q (batch, n, d) is one cluster."""
    batch, n, _ = q.shape
    number = most_tiles(n, 1)
    rows = torch.arange(number * TILE, dtype=torch.int32, device=q.device)
    rows[n:] = -1
    of_tile = torch.zeros(batch, number, dtype=torch.int32, device=q.device)
    return rows.expand(batch, -1).contiguous().view(batch, number, TILE), of_tile


def ranks_of(q: torch.Tensor, queries: torch.Tensor, ends: torch.Tensor, scale: float) -> torch.Tensor:
    """(batch, clusters, 2 W) bfloat16: centres of the scaled queries of each cluster and half their variances.

    Each in W columns, d rounded up to whole 16.
    """
    batch, n, d = q.shape
    clusters = ends.shape[1]
    launched = launches(d, 1)["centres_kernel"]
    ranks = _empty(q, batch, clusters, 2 * launched["W"], dtype=torch.bfloat16)
    centres_kernel[(clusters, batch)](
        q, queries, ends, ranks, n, queries.shape[1], clusters, scale, _TILES_OF_A_CENTRE, **launched
    )  # fmt: skip
    return ranks
