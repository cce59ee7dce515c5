"""The expansion of attention around the centres of blocks of queries, used by two methods.

For q = c + delta in a block with centre c and (diagonal) covariance V, exp(q.k) = exp(c.k + k'Vk/2)
exp(delta.k - k'Vk/2), where the second factor has mean one over the block if its queries are Gaussian. The first
factor ranks the keys: the `near` highest of a block are summed exactly for each of its queries; the others, with that
weight, form one far key per block, to first order in delta in the weights and, with few value columns, in the values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from approxkmv.attention.blocks.arrays import FarArrays, OneBlock, SeenArrays, Threshold
from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.blocks.grouping import Blocks, make_blocks, project
from approxkmv.attention.blocks.k_means import k_means
from approxkmv.attention.blocks.near_keys import SAMPLED_KEYS, as_numbers, choose_keys, rank_of_bar
from approxkmv.attention.blocks.reach import REACH, beyond_reach, most_variance, spreads, without
from approxkmv.compute.counting import count
from approxkmv.compute.scratch import scratch
from approxkmv.compute.threads import over_threads

# Each tilted column of v adds d columns to the far sums; with more columns than this the far value is the block's mean.
TILTED_COLUMNS = 2
# oneDNN compiles a kernel for each new shape of a bfloat16 product, so shapes should repeat.
_ROWS_OF_BFLOAT16 = 16
# Power of the eigenvalues by which axes are weighted in distances of queries. One half would be the standard deviation
# of the change of the logits; slightly less keeps weight on axes along which only the keys near the top differ.
METRIC_POWER = 0.4
# Keys that determine the axes: 4,096 give the same errors (GloVe and heads of a model), but take longer.
_KEYS_FOR_AXES = 512


def principal_axes(k: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` leading axes (d, count) of the covariance of the keys k (n, d), and their eigenvalues."""
    if count == 0:
        return k.new_empty(k.shape[1], 0), k.new_empty(0)
    some = k[:: max(1, len(k) // _KEYS_FOR_AXES)]
    some = some - some.mean(0)
    values, vectors = torch.linalg.eigh(some.mT @ some / len(some))
    return vectors.flip(1)[:, :count], values.flip(0)[:count].clamp_min(0)


@dataclass(frozen=True)
class Seen:
    """What each row of the blocks sees of its block's far key, and of the key with the same index as its query.

    In self-attention that key is often the query's nearest, but from the block's centre it is one of many, and the
    block does not list it as near.
    """

    log_weight: torch.Tensor
    """(rows,) of the far key."""
    value: torch.Tensor
    """Of the far key: (rows, d_v) where it is tilted, or (blocks, d_v)."""
    axes: torch.Tensor
    """(blocks, 1 + tilts, d) `far_axes` of the expansion."""
    own_log: torch.Tensor
    """(rows,) q_i.(k_i - mean), -inf if the key is near or does not exist."""
    own_share: torch.Tensor
    """(rows,) the key's part of the far key's weight, as seen from the block's centre, and"""
    own_share_seen: torch.Tensor
    """(rows,) to first order in the row's distance from the centre; both 0 if the key is near or does not exist."""

    @cached_property
    def arrays(self) -> SeenArrays:
        """For the compiled loops."""
        return SeenArrays(*(getattr(self, name).numpy() for name in SeenArrays._fields))


@dataclass(frozen=True)
class Expansion:
    """Everything known about the blocks before individual queries are processed."""

    blocks: Blocks
    logit_variances: torch.Tensor
    """(rows,) as in Blocks."""
    far_keys: int
    """The approximate number of far keys per block."""
    mean: torch.Tensor
    """(d,) mean of the keys, which are taken relative to it: attention is invariant to a common shift."""
    rounded: torch.Tensor | None
    """(n_k, d) the keys less their mean in bfloat16, if requested."""
    logs: torch.Tensor
    """(blocks, n_k) c.k + k'Vk/2."""
    weights: torch.Tensor
    """(blocks, 1 + tilts, n_k) exp(logs - highest), zero for the near keys; then these times each tilted column."""
    apart: np.ndarray
    """Keys that are neither near nor far: their logs are -inf, their weights 0."""
    thresholds: torch.Tensor
    """(blocks,) the threshold of `logs` above which a key is near."""
    chosen: np.ndarray
    ends: np.ndarray
    """The near keys of block b are chosen[ends[b-1]:ends[b]]."""
    total: torch.Tensor
    """(blocks,) sum of the weights."""
    far_log: torch.Tensor
    """(blocks,) log of the far key's weight at the centre."""
    far_value: torch.Tensor
    """(blocks, d_v) weighted mean of the far values."""
    far_axes: torch.Tensor
    """(blocks, 1 + tilts, d) the weighted mean of the far keys, relative to `mean`; then, with few columns, the
    weighted covariance of each column of the far values with the far keys."""

    @property
    def tilted(self) -> bool:
        """Whether the far value is of first order in the row's distance from the centre, not the block's mean."""
        return self.far_axes.shape[1] > 1

    @cached_property
    def arrays(self) -> FarArrays:
        """For the compiled loops."""
        rest = self.thresholds, self.total, self.far_log, self.far_value, self.far_axes
        return FarArrays(as_numbers(self.logs), as_numbers(self.weights), *(t.numpy() for t in rest))

    def _own_apart(self, k: torch.Tensor | None) -> np.ndarray:
        return self.apart if k is not None else self.apart[:0]

    def lost(
        self, near: torch.Tensor, scales: torch.Tensor, seen: Seen, others: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(n_q,) `beyond_reach` of each query: near (rows,) and scales (blocks,) are the near keys' sums.

        others (n_q,): logs of its sum over other keys, which count with them.
        """
        variances = self.logit_variances
        if float(variances.max()) <= most_variance(self.far_keys):
            return torch.zeros(len(self.blocks.rows), dtype=torch.bool)
        known = torch.logaddexp(near.log() + self.blocks.of_rows(scales), seen.own_log)
        if others is not None:
            known = torch.logaddexp(known, self.blocks.in_rows(others))
        return self.blocks.of_queries(beyond_reach(variances, known, seen.log_weight, self.far_keys))

    def seen(self, k: torch.Tensor | None) -> Seen:
        """What the rows see of the far keys and, if the keys k (n, d) are given, of their own keys."""
        blocks = self.blocks
        rows, d_v = len(blocks.deltas), self.far_value.shape[1]
        count(kernel_evaluations=rows + (0 if k is None else len(blocks.rows)))
        loops = block_loops()
        if loops is not None:
            whole = torch.empty(4, rows)
            value = torch.empty(rows, d_v) if self.tilted else self.far_value
            out = Seen(whole[0], value, self.far_axes, whole[1], whole[2], whole[3])
            keys = self.mean.unsqueeze(0) if k is None else k.contiguous()
            given = blocks.arrays, self.arrays, keys.numpy(), self.mean.numpy(), out.arrays
            over_threads(lambda first, last: loops.expansion.see(first, last, k is not None, *given), len(blocks))
            out.own_log[torch.from_numpy(blocks.rows[self._own_apart(k)])] = -torch.inf
            return out
        seen = project(blocks, self.far_axes)
        log_weight = seen[:, 0] + blocks.of_rows(self.far_log)
        value = blocks.of_rows(self.far_value) + seen[:, 1:] if self.tilted else self.far_value
        log, share, lean = torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows)
        if k is not None:
            at, of_query = torch.from_numpy(blocks.rows), torch.from_numpy(blocks.labels)
            each = torch.arange(len(at))
            deltas, keys = blocks.deltas[at], k - self.mean
            light = self.logs[of_query, each] < self.thresholds.to(self.logs.dtype)[of_query]
            own = ((blocks.centres[of_query] + deltas) * keys).sum(1)
            log[at] = own.masked_fill_(~light, -torch.inf)
            log[at[torch.from_numpy(self._own_apart(k))]] = -torch.inf
            lean[at] = (deltas * (keys - self.far_axes[of_query, 0])).sum(1)
            share[at] = self.weights[of_query, 0, each].float() / self.total[of_query]
        return Seen(log_weight, value, self.far_axes, log, share, share * (1 + lean))


@dataclass(frozen=True)
class Clustering:
    """How queries are grouped into blocks, and how many keys are near."""

    block: int = 128
    """Approximate number of queries per block."""
    near: int = 256
    """Approximate number of near keys per block."""
    directions: int = 48
    """Leading axes of the keys along which queries are clustered and second moments of blocks are taken; with 0 there
    is one block, and the expansion is of first order."""
    iterations: int = 3
    sampled: int = 16
    """See `k_means`."""


@dataclass(frozen=True)
class KeySide:
    """What an expansion needs of its keys, whatever the queries; see `key_side`."""

    k: torch.Tensor
    """(n_k, d), with a column of zeros if d was odd and products are of bfloat16."""
    v: torch.Tensor
    """(n_k, d_v)"""
    apart: np.ndarray
    """Keys that no block's centre represents: see `reach.stand_apart`."""
    mean: torch.Tensor
    """(d,) what is subtracted from the keys."""
    axes: torch.Tensor
    """(d, r) and"""
    spread: torch.Tensor
    """(r,) the variance of the keys along them."""
    keys: torch.Tensor
    """(n_k, d) k - mean, and"""
    features: torch.Tensor
    """(n_k, r + d) its squares along the axes, then itself, and"""
    values: torch.Tensor
    """(n_k, d_v) v, in the dtype of the products."""

    def first(self, n: int, apart: np.ndarray) -> KeySide:
        """The first n keys, of which others may stand apart; mean and axes stay, the spread is theirs."""
        whole = self.k, self.v, self.keys, self.features, self.values
        k, v, keys, features, values = (t[:n] for t in whole)
        some = torch.from_numpy(np.setdiff1d(np.arange(0, n, max(1, n // _KEYS_FOR_AXES)), apart))
        squares, centre = features[some].float().mean(0).tensor_split([len(self.spread)])
        spread = (squares - (centre @ self.axes).square()).clamp_min(0)
        return replace(self, k=k, v=v, apart=apart, spread=spread, keys=keys, features=features, values=values)


def key_side(
    k: torch.Tensor,
    v: torch.Tensor,
    apart: np.ndarray,
    clustering: Clustering,
    values: torch.Tensor,
    known: int | None = None,
) -> KeySide:
    """The KeySide of k (n_k, d), v (n_k, d_v), of which values are v in the dtype of the products.

    Its mean and axes are those of the first `known` keys. Much of it is scratch: it is valid until the next call in
    this thread.
    """
    low = values.dtype
    if low == torch.bfloat16 and k.shape[1] % 2:
        # Its products process numbers in pairs.
        k = torch.nn.functional.pad(k, (0, 1))
    n_k, d = k.shape
    mean = k[:known].mean(0)
    axes, spread = principal_axes(without(k[:known], apart), min(clustering.directions, d))
    r = len(spread)
    # A separate array, since oneDNN's bfloat16 products read past the rows of a view, where NaN would spread.
    keys = torch.sub(k, mean, out=scratch("keys", n_k, d))
    keys = keys if low == keys.dtype else scratch("keys", n_k, d, dtype=low).copy_(keys)
    features = scratch("features", n_k, r + d, dtype=low)
    features[:, r:] = keys
    if r > 0:
        torch.square(torch.mm(keys, axes.to(low), out=scratch("along", n_k, r, dtype=low)), out=features[:, :r])
    return KeySide(k, v, apart, mean, axes, spread, keys, features, values)


def expand(
    q: torch.Tensor, side: KeySide, generator: torch.Generator, clustering: Clustering, *, scale: float
) -> Expansion:
    """Cluster the queries q (n_q, d), choose the near keys of each block and sum the others at its centre.

    q has as many columns as side.k. Much of the result is scratch: it is valid until the next call in this thread.
    """
    k, v, apart, axes, spread = side.k, side.v, side.apart, side.axes, side.spread
    n_k, d_v = v.shape
    d, r, low = q.shape[1], len(spread), side.keys.dtype
    loops = block_loops()
    multiple = _ROWS_OF_BFLOAT16 if low == torch.bfloat16 and loops is None else 1
    metric = spread.pow(METRIC_POWER).clamp_min(1e-15)
    # Clustering and curvature are estimates: half the digits suffice for their coordinates.
    some = q if low == q.dtype else scratch("low queries", len(q), d, dtype=low).copy_(q)
    points = torch.mm(some, (scale * axes * metric).to(low), out=scratch("points", len(q), r, dtype=low))
    if low != torch.float32:
        points = scratch("points", len(q), r).copy_(points)
    clusters = -(-len(q) // clustering.block)
    labels = torch.zeros(len(q), dtype=torch.int64)
    if clusters > 1 and r > 0:
        labels = k_means(points, clusters, clustering.iterations, clustering.sampled, generator)
    importance = spread / metric.square()
    blocks = make_blocks(q, scale, points, importance, labels, multiple)
    logit_variances = blocks.logit_variances(k, apart)
    if float(logit_variances.max()) > REACH:
        # In a block of their own they do not shift the centres of others.
        labels[blocks.of_queries(logit_variances) > REACH] = clusters
        blocks = make_blocks(q, scale, points, importance, labels, multiple)
        logit_variances = blocks.logit_variances(k, apart)

    variances = blocks.variances / metric.square()
    ranks = torch.cat([0.5 * variances, blocks.centres], 1).to(low)
    logs = torch.mm(ranks, side.features.mT, out=scratch("logs", len(blocks), n_k, dtype=low))
    logs[:, torch.from_numpy(apart)] = -torch.inf
    count(kernel_evaluations=logs.numel())
    tilts = d_v if d_v <= TILTED_COLUMNS else 0
    weights = scratch("weights", len(blocks), 1 + tilts, n_k, dtype=low)
    first = _first(generator.initial_seed(), n_k)
    highest, thresholds, chosen, ends, total, far_value = choose_keys(
        logs, clustering.near, first, v[:, :tilts], weights
    )
    far_axes = torch.mm(weights.view(-1, n_k), side.keys).float().view(len(blocks), 1 + tilts, d)
    if tilts == 0:
        far_value = torch.mm(weights[:, 0], side.values).float()
    far_log = torch.empty(len(blocks))
    if loops is not None:
        given = (highest, variances, axes.contiguous(), total, far_log, far_value, far_axes)
        loops.expansion.centre_far(*(t.numpy() for t in given))
    else:
        total.clamp_min_(1e-30)
        far_axes /= total.view(-1, 1, 1)
        far_value /= total.unsqueeze(1)
        if tilts:
            far_axes[:, 1:] -= far_value.unsqueeze(2) * far_axes[:, :1]
        # The far key's own second-order term is already in its weight.
        second = 0.5 * (variances * (far_axes[:, 0] @ axes).square()).sum(1)
        torch.sub(total.log() + highest, second, out=far_log)
    rounded = side.keys if low == torch.bfloat16 else None
    of_queries = blocks, logit_variances, n_k - clustering.near, side.mean, rounded
    return Expansion(*of_queries, logs, weights, apart, thresholds, chosen, ends, total, far_log, far_value, far_axes)


def _first(seed: int, n_k: int) -> int:
    """Where the sample of the keys begins, from which thresholds are estimated."""
    return min(seed % SAMPLED_KEYS, n_k - 1)


def of_one_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: int, scale: float, near: int) -> OneBlock:
    """Inputs and scratch of the compiled loops for one block of all queries without axes."""
    n_k, d_v = v.shape
    tilts = d_v if d_v <= TILTED_COLUMNS else 0
    first = _first(seed, n_k)
    queries, keys, values = (t.contiguous().numpy() for t in (q, k, v))
    threshold = Threshold(rank_of_bar(n_k, near, first), first, SAMPLED_KEYS)
    room = scratch("deltas", *q.shape), scratch("logs", 1, n_k), scratch("weights", 1, 1 + tilts, n_k)
    deltas, logs, weights = (t.numpy() for t in room)
    return OneBlock(queries, np.float32(scale), keys, values, threshold, tilts, deltas, logs, weights)


def in_one_block(q: torch.Tensor, k: torch.Tensor, scale: float, near: int) -> bool:
    """Whether no query can be lost in a single block of all queries."""
    return scale**2 * spreads(q, k).numpy().max() <= most_variance(len(k) - near)
