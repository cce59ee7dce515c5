"""Blocks of queries: near keys exactly, far keys to first order around the block's centre, for x of any signs.

For q = c + delta in a block with centre c and covariance V of its deltas, K_ij = 2^(-|q|^2/2) 2^(c.k - |k|^2/2)
2^(delta.k). Over Gaussian deltas the best fit of 2^(delta.k) of first order is 2^(ln 2 k'Vk/2) (1 + ln 2 delta.k), so
a key has the weight w_j = 2^(c.k - |k|^2/2 + ln 2 k'Vk/2), which ranks the keys. The `near` highest of a block are
summed exactly for each of its queries; of the others only the sums of w x and w x k are kept. What does not depend on x
goes into the exponent: 2^(delta.k) = 2^(delta.m) 2^(ln 2 (delta'C delta - tr VC)/2) 2^(delta.(k - m)), where m and C
are the weighted mean and covariance of the far keys, and the last factor is taken to first order. The second makes up
for what the weights assume of all queries of a block alike. So the product is linear in x, and its transpose is as
cheap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from approxkmv.attention.blocks.expansion import METRIC_POWER, principal_axes
from approxkmv.attention.blocks.grouping import block_size
from approxkmv.attention.blocks.k_means import k_means
from approxkmv.attention.blocks.near_keys import SAMPLED_KEYS, as_numbers, rank_of_bar
from approxkmv.compute.counting import count
from approxkmv.compute.threads import over_threads
from approxkmv.operator.exact import loops_for, room, weigh
from approxkmv.operator.points import Points, key_side, parts_of, query_side, side_by_side

# Leading axes along which queries are clustered and blocks have second moments; Lloyd's iterations, on so many queries
# per block: as in `attention.blocks`.
_AXES, _ITERATIONS, _SAMPLED = 48, 3, 16
# Queries per block are the root of their number times the first of these for which the exponents of the median query
# vary by at most so much around its block's, in nats squared, or the last: large blocks do where many dimensions make
# all distances alike.
_PER_ROOT, _VARY = (1.1, 0.5), 1.0
# Limit of log2 of a second-order factor: farther out the far keys are hardly Gaussian.
_MOST_BENT = 2.0
# Near keys of the plan, and keys drawn, from which each block's covariance is estimated; along so many axes in full.
PREDICTING, _OF_COVARIANCE, _FULL_AXES = 256, 1024, 128
# Blocks whose weights of all keys are in memory at once.
STRIP = 64
# oneDNN compiles a kernel for each shape of a bfloat16 product, so shapes should repeat: near keys are padded to a
# multiple of the first, and rows, with those of the next block, to one of the second.
_SHAPES = {torch.bfloat16: (128, 64)}
# Keys whose weights are multiplied by x at once, while they stay in the cache.
_CHUNK = 2048
# A plan keeps its weights and lists of near keys if they take at most so many bytes; else each product makes them anew.
KEPT = 1 << 28
_LN2 = math.log(2)
# Queries whose exponents vary more than this around those of their block, in nats squared, and this many times more
# than the median query's, are blocks of their own, where the product is exact; at most one in so many, the farthest.
_REACH, _TIMES, ONE_IN = 2.0, 3.0, 32
_MOST_NATS = 30.0
# Sizes of x within this factor of each other do not change which keys are near; the least that counts, of their mean.
_EVEN, _LEAST_SIZE = 1.5, 1e-3

Strip = tuple[torch.Tensor, list[torch.Tensor]]
"""Some blocks' weights (blocks, n_k) of their far keys over 2^threshold, 0 for near keys; each block's near keys."""


@dataclass(frozen=True)
class Plan:
    """What depends on the number of near keys, but not on x: their least log weights, and moments of the far keys."""

    near: int
    thresholds: torch.Tensor
    """(blocks,) base 2."""
    totals: torch.Tensor
    """(blocks,) sum of the far keys' weights over 2^threshold."""
    means: torch.Tensor
    """(blocks, d) their weighted mean."""
    factors: torch.Tensor
    """(rows,) 2^threshold as each row sees it: times the totals, the sum of its far entries of K."""
    strips: list[Strip] | None
    """Of all blocks, or None where they would take more than `KEPT` bytes."""


@dataclass(frozen=True)
class Keys:
    """The keys as products take them, one row of zeros behind them, and what ranks them; shared by all blocks."""

    side: torch.Tensor
    """(n_k + 1, width): `key_side` and a row of zeros."""
    features: torch.Tensor
    """(n_k, width), whose products with `Blocks.ranks` are log2 of the keys' weights."""
    unit: torch.Tensor
    """(n_k, 1 + d): ones and the keys."""
    axes: torch.Tensor
    """(d, axes) along which blocks have second moments."""


@dataclass(frozen=True)
class Blocks:
    """Queries in blocks, made once for queries and keys; exponents are of the dtype of `keys`, sums of the points'."""

    points: Points
    keys: Keys
    order: torch.Tensor
    """(rows,) the queries block by block, and"""
    of_row: torch.Tensor
    """(rows,) their blocks."""
    sizes: torch.Tensor
    """(blocks,) how many queries each block has."""
    centres: torch.Tensor
    """(blocks, d)"""
    variances: torch.Tensor
    """(blocks, axes)"""
    bends: torch.Tensor
    """(rows,) log2 of the second-order factor of each row's far keys."""
    deltas: torch.Tensor
    """(rows, d) of each query from its block's centre."""
    side: torch.Tensor
    """(rows and a few of zeros, width): `query_side` of each row."""
    ranks: torch.Tensor
    """(blocks, width): see `Keys.features`."""
    sizes_of_x: torch.Tensor | None = None
    """(n_k,) by which keys are ranked besides their weights, or None."""

    def __len__(self) -> int:
        return len(self.centres)

    @property
    def of_blocks(self) -> list[slice]:
        """The rows of each block."""
        ends = self.sizes.cumsum(0).tolist()
        return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def of_queries(self, queries: torch.Tensor) -> Blocks:
        """The blocks of these queries with no others in them."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=self.order.device)
        rows = place[queries].sort().values
        chosen, of_row, sizes = self.of_row[rows].unique(return_inverse=True, return_counts=True)
        parts = self.order[rows], of_row, sizes, self.centres[chosen], self.variances[chosen], self.bends[rows]
        made = self.deltas[rows], _with_zeros(self.side[rows]), self.ranks[chosen]
        return Blocks(self.points, self.keys, *parts, *made, self.sizes_of_x)

    def ranked_by(self, x: torch.Tensor) -> Blocks:
        """The same blocks, whose near keys are those with the highest weight times size in x (n_k, m)."""
        sizes = x.norm(dim=1)
        sizes = (sizes / sizes.square().mean().sqrt()).clamp_min(_LEAST_SIZE)
        if float(sizes.max()) < _EVEN * float(sizes.min()):
            return self
        features, d = self.keys.features.clone(), self.points.keys.shape[1]
        halves = parts_of(sizes.log2() - self.points.key_halves, features.dtype)
        features[:, d : d + len(halves)] = torch.stack(halves, 1)
        return replace(self, keys=replace(self.keys, features=features), sizes_of_x=sizes)

    def plan(self, near: int) -> Plan:
        """The plan for about `near` near keys per block."""
        n_k, d = self.points.keys.shape
        thresholds, totals = self.centres.new_empty(2, len(self))
        means = self.centres.new_empty(len(self), d)
        rank = rank_of_bar(n_k, near, 0)
        left = KEPT - len(self) * n_k * means.element_size()
        strips: list[Strip] = []
        for at in range(0, len(self), STRIP):
            here = slice(at, at + STRIP)
            logs = self._logs(here)
            thresholds[here] = _ranked(logs[:, ::SAMPLED_KEYS].to(means.dtype), rank)
            weights, lists = self._split(logs, thresholds[here], left >= 0)
            moments = weights @ self.keys.unit
            totals[here] = moments[:, 0]
            means[here] = moments[:, 1:] / moments[:, :1].clamp_min(1e-30)
            left -= sum(listed.nbytes for listed in lists)
            strips = [*strips, (weights, lists)] if left >= 0 else []
        return Plan(near, thresholds, totals, means, self._factors(thresholds, means), strips or None)

    def _strips(self, plan: Plan) -> Iterator[tuple[int, Strip]]:
        """The first block of each strip, and the strip, which may last until the next."""
        for i, at in enumerate(range(0, len(self), STRIP)):
            if plan.strips is None:
                here = slice(at, at + STRIP)
                yield at, self._split(self._logs(here), plan.thresholds[here], keep=False)
            else:
                yield at, plan.strips[i]

    def _logs(self, strip: slice) -> torch.Tensor:
        ranks, features = self.ranks[strip], self.keys.features
        count(kernel_evaluations=len(ranks) * len(features))
        return torch.mm(ranks, features.mT, out=room("logs", len(ranks), len(features), like=features))

    def _split(self, logs: torch.Tensor, thresholds: torch.Tensor, keep: bool) -> Strip:
        """A strip, in memory of its own if it is to be kept.

        Lists of near keys go on with n_k, the row of zeros, up to a multiple.
        """
        n_k, (multiple, _) = logs.shape[1], _SHAPES.get(logs.dtype, (1, 1))
        weights = thresholds.new_empty(logs.shape) if keep else room("weights", *logs.shape, like=thresholds)
        loops = loops_for(logs)
        if loops is not None:
            near = room("near", len(logs), n_k + multiple, like=self.order)
            counts = np.empty(len(logs), np.int64)
            given = as_numbers(logs), thresholds.numpy(), multiple, weights.numpy(), near.numpy(), counts
            over_threads(lambda low, high: loops.split_keys(low, high, *given), len(logs))
            lists = [row[:number] for row, number in zip(near, counts.tolist(), strict=True)]
            return weights, [listed.clone() for listed in lists] if keep else lists
        torch.sub(logs, thresholds.unsqueeze(1), out=weights)
        is_near = weights >= 0
        weights.exp2_().masked_fill_(is_near, 0)
        keys = is_near.nonzero()[:, 1].split(is_near.sum(1).tolist())
        return weights, [torch.cat([some, some.new_full((-len(some) % multiple,), n_k)]) for some in keys]

    def _factors(self, thresholds: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        # The second order of the mean's own factor is already in its weight.
        second = 0.5 * _LN2 * (self.variances * (mean @ self.keys.axes).square()).sum(1)
        logs = self.deltas.new_empty(len(self.deltas))
        for b, rows in enumerate(self.of_blocks):
            torch.mv(self.deltas[rows], mean[b], out=logs[rows])
        logs += (thresholds - second)[self.of_row] + self.bends
        # No entry of K is above 1, however far from its block's centre a query is.
        return logs.sub_(self.points.query_halves[self.order]).clamp_max_(0.0).exp2_()

    def second_order(self, plan: Plan) -> torch.Tensor:
        """(rows,) ln 2 (delta'C delta - tr VC)/2 of each row; see `bends`.

        C is the covariance of a sample of the block's far keys along the leading axes of all keys; along the others the
        variances of all keys stand for it.
        """
        keys = self.points.keys
        full, spread = principal_axes(keys, keys.shape[1])
        along, deltas = keys @ full[:, :_FULL_AXES], self.deltas @ full
        # The weights assume the block's variances V along the axes of its second moments.
        assumed = self.keys.axes.mT @ full[:, :_FULL_AXES]
        out = deltas[:, _FULL_AXES:].square() @ spread[_FULL_AXES:]
        deltas = deltas[:, :_FULL_AXES].contiguous()
        of_blocks = self.of_blocks
        # Evenly spaced in the sum of the weights, so that keys are drawn in proportion to them
        places = (torch.arange(_OF_COVARIANCE, dtype=torch.float64, device=keys.device) + 0.5) / _OF_COVARIANCE
        for at, (weights, _) in self._strips(plan):
            for b, row in enumerate(weights, at):
                ends = row.cumsum(0, dtype=torch.float64)
                sample = along[torch.searchsorted(ends, places * ends[-1])]
                sample -= sample.mean(0)
                covariance = (sample.mT @ sample).div_(_OF_COVARIANCE)
                own = of_blocks[b]
                some = deltas[own]
                out[own] += ((some @ covariance) * some).sum(1)
                out[own] -= self.variances[b] @ ((assumed @ covariance) * assumed).sum(1)
        return out.mul_(0.5 * _LN2).clamp_(-_MOST_BENT, _MOST_BENT)

    def doubts(self, plan: Plan) -> torch.Tensor:
        """(n_q,) predicted sizes of errors: of each query's far sum, times how much its exponents vary around it.

        That is, their variance in nats squared, and what the second order of the row's powers changes, twice over.
        """
        nats = _variances(self.deltas @ self.keys.axes, self.points.keys @ self.keys.axes).clamp_max(_MOST_NATS)
        varied = nats + (2 * _LN2 * self.bends.abs()).expm1()
        out = torch.empty_like(self.points.query_halves)
        out[self.order] = plan.factors * plan.totals[self.of_row] * varied
        return out

    def products(self, plan: Plan, x: torch.Tensor | None, y: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Kx (rows, m) for x (n_k, m) and K^T y (n_k, m) for y (rows, m), without columns where None is given.

        Rows are in the order of the blocks.
        """
        unit = self.keys.unit
        n_k, columns = unit.shape
        x = unit.new_zeros(n_k, 0) if x is None else x
        y = unit.new_zeros(len(self.order), 0) if y is None else y
        width, height = x.shape[1], y.shape[1]
        even = (x if self.sizes_of_x is None else x / self.sizes_of_x.unsqueeze(1)).mT.contiguous()
        of_near = torch.cat([x, x.new_zeros(1, width)]).mT.contiguous()
        forward, backward = unit.new_empty(width, len(self.order)), unit.new_zeros(n_k + 1, height)
        far_backward = unit.new_zeros(n_k, height)
        rows_of_y, weighted = y.mT.contiguous(), (plan.factors.unsqueeze(1) * y).mT.contiguous()
        # Around their weighted mean the far keys' sum has no first order.
        constant = bool((even == even[:, :1]).all())
        of_blocks, (_, multiple) = self.of_blocks, _SHAPES.get(self.side.dtype, (1, 1))
        for at, (weights, lists) in self._strips(plan):
            blocks, mean = len(weights), plan.means[at : at + STRIP].unsqueeze(1)
            # Sums over the far keys of their weights times x [1, k]; over the rows of their factors times y [1, delta]
            moments, given = unit.new_zeros(blocks, width, columns), unit.new_zeros(blocks, height, columns)
            for b, rows in enumerate(of_blocks[at : at + STRIP] if height else []):
                torch.mm(weighted[:, rows], self.deltas[rows], out=given[b, :, 1:])
                torch.sum(weighted[:, rows], 1, out=given[b, :, 0])
            given[:, :, 1:] *= _LN2
            given[:, :, 0] -= (given[:, :, 1:] * mean).sum(2)
            if constant:
                moments[:, :, 0] = plan.totals[at : at + STRIP].unsqueeze(1) * even[:, 0]
            for j in range(0, 0 if constant and not height else n_k, _CHUNK):
                some, ones_and_keys = weights[:, j : j + _CHUNK], unit[j : j + _CHUNK]
                for c in range(0 if constant else width):
                    scaled = room("scaled", *some.shape, like=unit)
                    moments[:, c].addmm_(torch.mul(some, even[c, j : j + _CHUNK], out=scaled), ones_and_keys)
                for c in range(height):
                    far_backward[j : j + _CHUNK, c] += (some.mT @ given[:, c]).mul_(ones_and_keys).sum(1)
            if not constant:
                moments[:, :, 1:] -= moments[:, :, :1] * mean
                moments[:, :, 1:] *= _LN2
            for b, (rows, listed) in enumerate(zip(of_blocks[at : at + STRIP], lists, strict=True)):
                number, size = len(listed), rows.stop - rows.start
                padded = size + -size % multiple
                left = self.side[rows.start : rows.start + padded]
                right = room("near keys", number, left.shape[1], like=left)
                torch.index_select(self.keys.side, 0, listed, out=right)
                if width:
                    count(kernel_evaluations=size * number, other_products=(padded - size) * number)
                    far, first = moments[b, :, :1], moments[b, :, 1:]
                    far = far if constant else torch.mm(first, self.deltas[rows].mT).add_(far)
                    torch.mul(far, plan.factors[rows], out=forward[:, rows])
                    logs = torch.mm(left, right.mT, out=room("tile", padded, number, like=left))
                    weigh(logs[:size], of_near[:, listed], forward[:, rows])
                if height:
                    count(kernel_evaluations=padded * number)
                    logs = torch.mm(right, left.mT, out=room("tile", number, padded, like=left))
                    # Rows of the next block could overflow.
                    logs[:, size:] = 0
                    of_rows, sums = unit.new_zeros(height, padded), unit.new_zeros(height, number)
                    of_rows[:, :size] = rows_of_y[:, rows]
                    weigh(logs, of_rows, sums)
                    backward.index_add_(0, listed, sums.mT)
        backward = backward[:n_k]
        backward += far_backward if self.sizes_of_x is None else far_backward / self.sizes_of_x.unsqueeze(1)
        return forward.mT, backward


def _with_zeros(side: torch.Tensor) -> torch.Tensor:
    """With rows of zeros behind the last block's."""
    return torch.cat([side, side.new_zeros(_SHAPES.get(side.dtype, (1, 1))[1] - 1, side.shape[1])])


def _ranked(values: torch.Tensor, rank: int) -> torch.Tensor:
    """(rows,) the number with this rank, from below, in each row of values."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), rank, axis=1)[:, rank].copy())
    return values.kthvalue(rank + 1, 1).values


def clusters_of(n_q: int, n_k: int, times: float = _PER_ROOT[0], block: int | None = None) -> int:
    """Clusters of about `block` queries, or `times` the root of the larger number; the least of all by default."""
    usual = max(1, round(max(n_q, n_k) ** 0.5 * times))
    return max(1, -(-n_q // (block or block_size(usual, n_q, n_k))))


def make_blocks(points: Points, low: torch.dtype, seed: int, block: int | None = None) -> tuple[Blocks, Plan]:
    """Cluster the queries into blocks of about `block` of them, or as their number says, and make the first plan."""
    n_q, n_k = len(points.queries), len(points.keys)
    axes, spread = principal_axes(points.keys, min(_AXES, points.keys.shape[1]))
    # Clustering runs on the CPU: it takes a small part of the time of a product.
    coordinates = (points.queries @ (axes * spread.pow(METRIC_POWER).clamp_min(1e-15))).float().cpu()
    for times in _PER_ROOT:
        clusters = clusters_of(n_q, n_k, times, block)
        labels = k_means(coordinates, clusters, _ITERATIONS, _SAMPLED, torch.Generator().manual_seed(seed))
        nats = _around_clusters(coordinates, labels, points, axes.cpu(), spread.cpu())
        if block or float(nats.median()) <= _VARY:
            break
    if clusters > 1:
        apart = _out_of_reach(nats)
        labels[apart] = clusters + torch.arange(len(apart))
    device = points.queries.device
    _, of_query, sizes = labels.to(device).unique(return_inverse=True, return_counts=True)
    order = of_query.argsort(stable=True)
    of_row = of_query[order]
    queries = points.queries[order]

    def means(of_rows: torch.Tensor) -> torch.Tensor:
        sums = of_rows.new_zeros(len(sizes), of_rows.shape[1]).index_add_(0, of_row, of_rows)
        return sums / sizes.unsqueeze(1)

    centres = means(queries)
    variances = means(((queries - centres[of_row]) @ axes).square())
    squares = (points.keys @ axes).square()
    features = side_by_side(points.keys.to(low), *parts_of(-points.key_halves, low), squares.to(low))
    side = key_side(points, low)
    unit = torch.cat([torch.ones_like(points.keys[:, :1]), points.keys], 1)
    keys = Keys(torch.cat([side, torch.zeros_like(side[:1])]), features, unit, axes)
    ones = [torch.ones_like(half[:, 0]) for half in parts_of(centres[:, :1], low)]
    ranks = side_by_side(centres.to(low), *ones, (0.5 * _LN2 * variances).to(low))
    made = queries - centres[of_row], _with_zeros(query_side(points, order, low)), ranks
    flat = Blocks(points, keys, order, of_row, sizes, centres, variances, torch.zeros_like(points.query_halves), *made)
    plan = flat.plan(min(PREDICTING, max(1, n_k // 4)))
    blocks = replace(flat, bends=flat.second_order(plan))
    return blocks, replace(plan, factors=blocks._factors(plan.thresholds, plan.means))


def _variances(deltas: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(rows,) of the exponents' changes, in nats, over the keys (n_k, axes), for the deltas (rows, axes)."""
    return _LN2**2 * (deltas.square() @ keys.var(0, correction=min(1, len(keys) - 1)))


def _around_clusters(
    coordinates: torch.Tensor, labels: torch.Tensor, points: Points, axes: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """(n_q,) how much each query's exponents vary around those of its cluster's centre, in nats squared."""
    counts = torch.bincount(labels).unsqueeze(1)
    means = coordinates.new_zeros(len(counts), coordinates.shape[1]).index_add_(0, labels, coordinates) / counts
    deltas = (coordinates - means[labels]) / spread.float().pow(METRIC_POWER).clamp_min(1e-15)
    return _variances(deltas, points.keys.cpu().float() @ axes.float())


def _out_of_reach(nats: torch.Tensor) -> torch.Tensor:
    """The queries for which their cluster's centre says least."""
    bar = max(_REACH, _TIMES * float(nats.median()))
    apart = (nats > bar).nonzero()[:, 0]
    most = len(nats) // ONE_IN
    return apart if len(apart) <= most else nats.topk(most).indices
