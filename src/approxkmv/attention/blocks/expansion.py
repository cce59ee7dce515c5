"""The expansion of attention around the centres of blocks of queries, which two methods share.

With q = c + delta in a block with centre c and (diagonal) covariance V, exp(q.k) = exp(c.k + k'Vk/2)
exp(delta.k - k'Vk/2), where the second factor has mean one over the block if its queries are Gaussian. The first
factor ranks the keys: a block's `near` highest are summed exactly for each of its queries, the others with that
weight into one far key per block, to first order in delta in the weights and, for few value columns, in the values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from approxkmv.attention.blocks.k_means import k_means
from approxkmv.attention.causal import Sums, exact_sums, merged
from approxkmv.compute.counting import count
from approxkmv.compute.loops import compiled_loops, native_bfloat16
from approxkmv.compute.scratch import scratch
from approxkmv.compute.threads import over_threads

# Each tilted column of v costs d more columns in the far sums; beyond these the far value is the block's mean.
_TILTED_COLUMNS = 2
# For more columns than these a product of matrices is faster than a product with each.
_FEW_COLUMNS = 8
# oneDNN compiles a kernel for each new shape of a bfloat16 product, so that shapes should repeat.
_ROWS_OF_BFLOAT16 = 16
_KEYS_OF_BFLOAT16 = 64
# One key in so many decides the threshold above which a block's keys are near.
_SAMPLED_KEYS = 8
# Eigenvalues to this power weigh the axes in the distance of queries. One half would be the standard deviation of the
# change of the logits; a little less keeps weight on axes along which only the keys near the top differ.
_METRIC_POWER = 0.4
# So many keys decide the axes: the errors are the same with all of 4,096 (GloVe and heads of a model), the time is not.
_KEYS_FOR_AXES = 512

# Keys whose logits vary this much more over the queries than other keys' do, and by more than so many nats, stand
# apart: of some heads and of GloVe none has over twice the spread of the others.
_APART, _APART_NATS = 4.0, 4.0
# So many rows decide how far the others reach.
_SAMPLED_FOR_VARIANCES = 256
# A query whose logits have more than this variance around those of its block's centre is out of reach however little
# the far keys weigh: 0.1 to 60 on heads of models and GloVe at blocks of 512 or fewer. Below it, one whose sum is
# expected to be off by more than so many times itself.
REACH = 64.0
_OFF = 3.0

# queries, rows, labels, starts and sizes of Blocks
Grouped = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Blocks:
    """Queries in blocks of near neighbours, each block's rows contiguous and padded to a multiple of some rows."""

    queries: np.ndarray
    """(padded n,) the query in each row, -1 where padded."""
    rows: np.ndarray
    labels: np.ndarray
    """(n,) row and block of each query."""
    starts: np.ndarray
    sizes: np.ndarray
    """First row and padded number of rows of each block."""
    centres: torch.Tensor
    """(blocks, d)"""
    deltas: torch.Tensor
    """(padded n, d) query minus its block's centre, zero where padded."""
    variances: torch.Tensor
    """(blocks, r) mean square of the points' distances from their block's, along each of their axes."""
    row_variances: torch.Tensor
    """(padded n,) each point's squares of these distances, times the axes' importance, in all; zero where padded."""

    def __len__(self) -> int:
        return len(self.sizes)

    def of_rows(self, per_block: torch.Tensor) -> torch.Tensor:
        """Repeat (blocks, ...) for each row of each block."""
        return per_block.repeat_interleave(torch.from_numpy(self.sizes), 0)

    def of_queries(self, per_row: torch.Tensor) -> torch.Tensor:
        """Rows of the blocks (padded n, ...) in the order of the queries (n, ...)."""
        return per_row[torch.from_numpy(self.rows)]

    def logit_variances(self, k: torch.Tensor, apart: np.ndarray) -> torch.Tensor:
        """(padded n,) of each row's logits around its block's, over keys k (n_k, d) but those that stand apart."""
        if self.variances.shape[1] > 0:
            return self.row_variances
        # Without axes the variances are those of the columns.
        return self.deltas.square() @ variances_of(without(k, apart))

    def in_rows(self, per_query: torch.Tensor) -> torch.Tensor:
        """Something of the queries (n, ...) in the order of the blocks' rows (padded n, ...), zero where padded."""
        out = per_query.new_zeros(len(self.deltas), *per_query.shape[1:])
        out[torch.from_numpy(self.rows)] = per_query
        return out


def make_blocks(
    q: torch.Tensor, scale: float, points: torch.Tensor, importance: torch.Tensor, labels: torch.Tensor, multiple: int
) -> Blocks:
    """Blocks of the queries, scale times q (n, d), and of their points (n, r), that share a label.

    importance (r,): what a square along each of the points' axes counts in `row_variances`.
    """
    loops = compiled_loops("attention.blocks.loops")
    grouped: Grouped = (loops.group if loops is not None else _group)(labels.numpy(), multiple)
    queries, rows, block_of, starts, sizes = grouped
    number = len(starts)
    deltas = scratch("deltas", len(queries), q.shape[1])
    if loops is not None:
        centres, variances = q.new_empty(number, q.shape[1]), q.new_empty(number, points.shape[1])
        row_variances = q.new_empty(len(queries))
        given = q.contiguous().numpy(), np.float32(scale), points.numpy(), importance.numpy()
        written = (t.numpy() for t in (deltas, centres, variances, row_variances))
        loops.centre_blocks(*given, queries, starts, sizes, *written)
        return Blocks(*grouped, centres, deltas, variances, row_variances)
    of_query = torch.from_numpy(block_of)
    counts = torch.bincount(of_query).unsqueeze(1)

    def means(of_queries: torch.Tensor) -> torch.Tensor:
        return q.new_zeros(number, of_queries.shape[1]).index_add_(0, of_query, of_queries) / counts

    centres = scale * means(q)
    squares = (points - means(points)[of_query]).square()
    deltas.zero_()[torch.from_numpy(rows)] = scale * q - centres[of_query]
    row_variances = q.new_zeros(len(queries))
    row_variances[torch.from_numpy(rows)] = squares @ importance
    return Blocks(*grouped, centres, deltas, means(squares), row_variances)


def _group(labels: np.ndarray, multiple: int) -> Grouped:
    """queries, rows, labels, starts and sizes of `Blocks`: points (n,) with a label in blocks, a block for each used.

    A block's rows are padded to a multiple of some.
    """
    _, block_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sizes = -(-counts // multiple) * multiple
    starts = sizes.cumsum() - sizes
    order = np.argsort(block_of, kind="stable")
    rows = np.empty_like(block_of)
    rows[order] = np.arange(len(labels)) + np.repeat(starts - (counts.cumsum() - counts), counts)
    queries = np.full(int(sizes.sum()), -1)
    queries[rows] = np.arange(len(labels))
    return queries, rows, block_of, starts, sizes


def principal_axes(k: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` leading axes (d, count) of the covariance of the keys k (n, d), and their eigenvalues."""
    if count == 0:
        return k.new_empty(k.shape[1], 0), k.new_empty(0)
    some = k[:: max(1, len(k) // _KEYS_FOR_AXES)]
    some = some - some.mean(0)
    values, vectors = torch.linalg.eigh(some.mT @ some / len(some))
    return vectors.flip(1)[:, :count], values.flip(0)[:count].clamp_min(0)


def spreads(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(n,) variance of the products of each of points (n, d), less their mean, with others (m, d), by column.

    Samples of the rows decide the mean and the variances of the columns.
    """
    loops = compiled_loops("attention.blocks.loops")
    if loops is not None:
        out = np.empty(len(points), np.float32)
        loops.spreads(points.contiguous().numpy(), others.contiguous().numpy(), _SAMPLED_FOR_VARIANCES, out)
        return torch.from_numpy(out)
    return (points - _sample(points).mean(0)).square() @ variances_of(others)


def most_variance(far_keys: int) -> float:
    """Up to this variance of its logits around its block's no row of so many far keys is lost."""
    return min(REACH, math.log(_OFF**2 * far_keys))


def beyond_reach(variances: torch.Tensor, known: torch.Tensor, far_log: torch.Tensor, far_keys: int) -> torch.Tensor:
    """(rows,) whether a row is out of reach of its block: its sum is expected to be off by more than _OFF times itself.

    The exponentials of n far keys, of logits with a variance s around the block's, are about lognormal: their sum is
    off by sqrt(exp(s) / n) of itself, since a few of them make it up and no centre knows which.

    Args:
        variances: (rows,) s. far_keys: n.
        known, far_log: (rows,) logs of the sums over the keys that the row meets itself, and over the far ones.
    """
    share = torch.nn.functional.logsigmoid(far_log - known)
    # A NaN is lost too.
    return ~(share + 0.5 * variances <= math.log(_OFF * far_keys**0.5)) | (variances > REACH)


def _sample(points: torch.Tensor) -> torch.Tensor:
    return points[:: max(1, len(points) // _SAMPLED_FOR_VARIANCES)]


def variances_of(points: torch.Tensor) -> torch.Tensor:
    """(d,) of the columns of points (n, d), from a sample of the rows."""
    some = _sample(points)
    return (some - some.mean(0)).square_().mean(0)


def stand_apart(q: torch.Tensor, k: torch.Tensor, scale: float) -> np.ndarray:
    """The keys of k (n_k, d) so much larger than the others that no centre of a block may speak for its queries.

    Of queries q (n_q, d) some have a logit of a hundred, some of minus a hundred with a key a hundred times as long.
    Such a key is summed exactly for every query.
    """
    found = spreads(k, q).numpy()
    some = found[:: max(1, len(found) // _SAMPLED_FOR_VARIANCES)]
    usual = np.partition(some, len(some) // 2)[len(some) // 2]
    bar = max(_APART**2 * float(usual), (_APART_NATS / scale) ** 2)
    if not float(found.max()) > bar:
        return np.empty(0, np.int64)
    apart = np.flatnonzero(found > bar)
    # So many are no exceptions.
    return apart if len(apart) <= len(k) / 16 else apart[:0]


def without(points: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """points (n, d) but those rows."""
    return torch.from_numpy(np.delete(points.numpy(), rows, axis=0)) if len(rows) else points


def with_keys_apart(
    rest: Sums, apart: np.ndarray, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mean: torch.Tensor, scale: float
) -> Sums:
    """The sums over the other keys less `mean`, and with them those over the keys that stand apart."""
    keys = torch.from_numpy(apart)
    return merged(rest, exact_sums(q * scale, k[keys] - mean, v[keys])) if len(keys) else rest


@dataclass(frozen=True)
class Seen:
    """What each row of the blocks sees of its block's far key, and of the key of the same index as its query.

    In self-attention that key is often the query's nearest; seen from the block's centre it is one of many, and its
    block does not list it as near.
    """

    log_weight: torch.Tensor
    """(rows,) of the far key."""
    value: torch.Tensor
    """Of the far key: (rows, d_v) where it is tilted, or (blocks, d_v)."""
    own_log: torch.Tensor
    """(rows,) q_i.(k_i - mean), -inf where the key is near or there is none."""
    own_share: torch.Tensor
    """(rows,) the key's part of the far key's weight, as the block's centre sees it, and"""
    own_share_seen: torch.Tensor
    """(rows,) to first order in the row's distance from the centre; both 0 where the key is near or there is none."""


@dataclass(frozen=True)
class Expansion:
    """Everything that is known about the blocks before a single query is looked at again."""

    blocks: Blocks
    logit_variances: torch.Tensor
    """(rows,) as Blocks has them."""
    far_keys: int
    """About so many keys of each block are far."""
    mean: torch.Tensor
    """(d,) of the keys, which are taken relative to it: attention does not see a common shift."""
    rounded: torch.Tensor | None
    """(n_k, d) the keys less their mean in bfloat16, if those were asked for."""
    logs: torch.Tensor
    """(blocks, n_k) c.k + k'Vk/2."""
    weights: torch.Tensor
    """(blocks, 1 + tilts, n_k) exp(logs - highest), zero for the near keys; then these times each tilted column."""
    apart: np.ndarray
    """Keys that are neither near nor far: their logs are -inf, their weights 0."""
    thresholds: torch.Tensor
    """(blocks,) the least of logs at which a key is near."""
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
    """(blocks, 1 + tilts, d) the weighted mean of the far keys, relative to `mean`; then, where there are few columns,
    the weighted covariance of each column of the far values with the far keys."""

    @property
    def tilted(self) -> bool:
        """Whether the far value is of first order in the row's distance from the centre, and not the block's mean."""
        return self.far_axes.shape[1] > 1

    def _own_apart(self, k: torch.Tensor | None) -> np.ndarray:
        return self.apart if k is not None else self.apart[:0]

    def lost(self, near: torch.Tensor, scales: torch.Tensor, seen: Seen) -> torch.Tensor:
        """(n_q,) `beyond_reach` of each query: near (rows,) and scales (blocks,) are the near keys' sums."""
        variances = self.logit_variances
        if float(variances.max()) <= most_variance(self.far_keys):
            return torch.zeros(len(self.blocks.rows), dtype=torch.bool)
        known = torch.logaddexp(near.log() + self.blocks.of_rows(scales), seen.own_log)
        return self.blocks.of_queries(beyond_reach(variances, known, seen.log_weight, self.far_keys))

    def seen(self, k: torch.Tensor | None) -> Seen:
        """What the rows see of the far keys and, if the keys k (n, d) are given, of their own."""
        blocks = self.blocks
        rows, d_v = len(blocks.deltas), self.far_value.shape[1]
        count(kernel_evaluations=rows + (0 if k is None else len(blocks.rows)))
        loops = compiled_loops("attention.blocks.loops")
        if loops is not None:
            whole = torch.empty(4, rows)
            value = torch.empty(rows, d_v) if self.tilted else self.far_value
            out = Seen(whole[0], value, whole[1], whole[2], whole[3])
            given = [blocks.queries, blocks.starts, blocks.sizes, as_numbers(self.logs), as_numbers(self.weights)]
            keys = self.mean.unsqueeze(0) if k is None else k.contiguous()
            parts = (
                *(self.thresholds, self.total, self.far_log, self.far_value, self.far_axes),
                *(blocks.centres, blocks.deltas, keys, self.mean),
                *(out.log_weight, out.value, out.own_log, out.own_share, out.own_share_seen),
            )
            given += [t.numpy() for t in parts]
            over_threads(lambda first, last: loops.see(first, last, k is not None, *given), len(blocks))
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
            share[at] = self.weights[of_query, 0, each].float() / self.total[of_query] * light
        return Seen(log_weight, value, log, share, share * (1 + lean))


def as_numbers(stored: torch.Tensor) -> np.ndarray:
    """float32 numbers, or the bits of bfloat16 ones, which NumPy does not have: what the compiled loops take."""
    return (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()


def project(blocks: Blocks, axes: torch.Tensor) -> torch.Tensor:
    """deltas (rows, d) of each block times its own axes (blocks, r, d): (rows, r)."""
    out = torch.empty(len(blocks.deltas), axes.shape[1])
    for b, (start, rows) in enumerate(zip(blocks.starts.tolist(), blocks.sizes.tolist(), strict=True)):
        torch.mm(blocks.deltas[start : start + rows], axes[b].mT, out=out[start : start + rows])
    return out


@dataclass(frozen=True)
class Clustering:
    """How queries are put into blocks, and which keys are near."""

    block: int = 128
    """Queries of a block, about."""
    near: int = 256
    """Near keys of a block, about."""
    directions: int = 48
    """Leading axes of the keys along which queries are clustered, and a block's second moment is taken; without any
    there is one block, and the expansion is of first order."""
    iterations: int = 3
    sampled: int = 16
    """See `k_means`."""


def expand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    apart: np.ndarray,
    clustering: Clustering,
    *,
    scale: float,
    low: torch.dtype,
) -> Expansion:
    """Cluster the queries q (n_q, d), choose each block's near keys and sum the others at its centre.

    Products of bfloat16 (low) take numbers by twos: d is then even. Much of what is returned is scratch: it holds
    until the next call in this thread.
    """
    n_k, d_v = v.shape
    d = q.shape[1]
    loops = compiled_loops("attention.blocks.loops")
    multiple = _ROWS_OF_BFLOAT16 if low == torch.bfloat16 and loops is None else 1
    mean = k.mean(0)
    axes, spread = principal_axes(without(k, apart), min(clustering.directions, d))
    r = len(spread)
    metric = spread.pow(_METRIC_POWER).clamp_min(1e-15)
    # Clustering and curvature are estimates: half the digits do for their coordinates.
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
        # In a block of their own they do not move the centre of others.
        labels[blocks.of_queries(logit_variances) > REACH] = clusters
        blocks = make_blocks(q, scale, points, importance, labels, multiple)
        logit_variances = blocks.logit_variances(k, apart)

    # An array of its own, since oneDNN's products of bfloat16 read past the rows of a view, and NaN there makes NaN.
    keys = torch.sub(k, mean, out=scratch("keys", n_k, d, dtype=low))
    # Columns: the squares along the leading axes, then the keys.
    features = scratch("features", n_k, r + d, dtype=low)
    features[:, r:] = keys
    if r > 0:
        torch.square(torch.mm(keys, axes.to(low), out=scratch("along", n_k, r, dtype=low)), out=features[:, :r])
    variances = blocks.variances / metric.square()
    ranks = torch.cat([0.5 * variances, blocks.centres], 1).to(low)
    logs = torch.mm(ranks, features.mT, out=scratch("logs", len(blocks), n_k, dtype=low))
    logs[:, torch.from_numpy(apart)] = -torch.inf
    count(kernel_evaluations=logs.numel())
    tilts = d_v if d_v <= _TILTED_COLUMNS else 0
    weights = scratch("weights", len(blocks), 1 + tilts, n_k, dtype=low)
    first = generator.initial_seed() % _SAMPLED_KEYS
    highest, thresholds, chosen, ends, total, far_value = choose_keys(
        logs, clustering.near, first, v[:, :tilts], weights
    )
    far_axes = torch.mm(weights.view(-1, n_k), keys).float().view(len(blocks), 1 + tilts, d)
    if tilts == 0:
        far_value = torch.mm(weights[:, 0], v.to(low)).float()
    far_log = torch.empty(len(blocks))
    if loops is not None:
        given = (highest, variances, axes.contiguous(), total, far_log, far_value, far_axes)
        loops.centre_far(*(t.numpy() for t in given))
    else:
        total.clamp_min_(1e-30)
        far_axes /= total.view(-1, 1, 1)
        far_value /= total.unsqueeze(1)
        if tilts:
            far_axes[:, 1:] -= far_value.unsqueeze(2) * far_axes[:, :1]
        # The far key's own second-order term is in its weight already.
        second = 0.5 * (variances * (far_axes[:, 0] @ axes).square()).sum(1)
        torch.sub(total.log() + highest, second, out=far_log)
    rounded = keys if low == torch.bfloat16 else None
    return Expansion(
        *(
            blocks,
            logit_variances,
            max(1, n_k - clustering.near),
            mean,
            rounded,
            logs,
            weights,
            apart,
            thresholds,
            chosen,
            ends,
        ),
        *(total, far_log, far_value, far_axes),
    )


def of_one_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: int, scale: float, near: int
) -> tuple[list[Any], list[np.ndarray]]:
    """What the compiled loops for one block of all queries and no axes take: their inputs, and room to work in."""
    n_k, d_v = v.shape
    tilts = d_v if d_v <= _TILTED_COLUMNS else 0
    first = seed % _SAMPLED_KEYS
    arrays = [t.contiguous().numpy() for t in (q, k, v)]
    inputs = [arrays[0], np.float32(scale), arrays[1], arrays[2], _rank_of_bar(n_k, near, first), first, _SAMPLED_KEYS]
    room = scratch("deltas", *q.shape), scratch("logs", 1, n_k), scratch("weights", 1, 1 + tilts, n_k)
    return [*inputs, tilts], [t.numpy() for t in room]


def in_one_block(q: torch.Tensor, k: torch.Tensor, scale: float, near: int) -> bool:
    """Whether no query can be lost in one block of all of them."""
    return scale**2 * spreads(q, k).numpy().max() <= most_variance(len(k) - near)


def _rank_of_bar(n_k: int, near: int, first: int) -> int:
    """The rank, from below, of the threshold among the sampled keys."""
    in_sample = len(range(first, n_k, _SAMPLED_KEYS))
    return in_sample - min(max(1, near // _SAMPLED_KEYS), in_sample)


def choose_keys(
    logs: torch.Tensor, near: int, first: int, v: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    """The highest log of a far key and the threshold (blocks,), chosen and ends of an expansion, sums of its weights.

    About `near` keys of each block have a log (blocks, n_k) of at least its threshold, as a sample of the keys from
    the one at `first` on finds it. weights (blocks, 1 + tilts, n_k) are written: exp(logs - highest) of the others,
    times 1 and the columns of v (n_k, tilts); their sums are (blocks,) and (blocks, tilts). The highest is that of the
    far keys, since beside a near key of a much higher log all of their weights may vanish.
    """
    blocks, n_k = logs.shape
    tilts = v.shape[1]
    kept = _rank_of_bar(n_k, near, first)
    loops = compiled_loops("attention.blocks.loops")
    if loops is not None:
        highest, thresholds = torch.empty(blocks), torch.empty(blocks)
        totals, values = torch.empty(blocks), torch.empty(blocks, tilts)
        counts, columns = np.empty(blocks, np.int64), v.mT.contiguous().numpy()
        bits = as_numbers(logs)
        given = bits, kept, first, _SAMPLED_KEYS, columns, as_numbers(weights), counts
        written = highest.numpy(), thresholds.numpy(), totals.numpy(), values.numpy()
        over_threads(lambda low, high: loops.fill_weights(low, high, *given, *written), blocks)
        ends = counts.cumsum()
        chosen = np.empty(ends[-1], np.int64)
        over_threads(lambda low, high: loops.list_near(low, high, bits, written[1], ends, chosen), blocks)
        return highest, thresholds, chosen, ends, totals, values
    sample = logs[:, first::_SAMPLED_KEYS].float()
    thresholds = torch.from_numpy(np.partition(sample.numpy(), kept, axis=1)[:, kept].copy())
    is_near = logs >= thresholds.to(logs.dtype).unsqueeze(1)
    top = logs.masked_fill(is_near, -torch.inf).amax(1).float()
    highest = torch.where(top.isfinite(), top, thresholds)
    torch.sub(logs, highest.to(logs.dtype).unsqueeze(1), out=weights[:, 0]).masked_fill_(is_near, -torch.inf).exp_()
    torch.mul(weights[:, :1], v.mT.to(logs.dtype), out=weights[:, 1:])
    chosen = np.flatnonzero(is_near.numpy())
    ends = np.searchsorted(chosen, np.arange(1, blocks + 1) * n_k)
    return highest, thresholds, chosen % n_k, ends, weights[:, 0].float().sum(1), weights[:, 1:].float().sum(2)


def sums_of_keys(
    blocks: Blocks,
    k: torch.Tensor,
    mean: torch.Tensor,
    v: torch.Tensor,
    chosen: np.ndarray,
    ends: np.ndarray,
    extra: torch.Tensor | None,
    low: torch.dtype,
    rounded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (rows, 1 + d_v) of exp(q.(k - mean) + extra) [1, v] over each block's chosen keys, and their log scales.

    Block b's keys are chosen[ends[b-1]:ends[b]], its sums are divided by exp(scale_b); extra (len(chosen),) or 0.
    rounded is that of the expansion: with it products of bfloat16 numbers do, where the CPU has them.
    """
    number, d_v = len(blocks), v.shape[1]
    sums, scales = torch.empty(len(blocks.deltas), 1 + d_v), torch.empty(number)
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    # Each key with each query, padded rows too, and with the block's centre
    count(kernel_evaluations=int((blocks.sizes + 1) @ lengths))
    loops = compiled_loops("attention.blocks.loops")
    if extra is None:
        extra = torch.zeros(len(chosen))
    if loops is not None:
        given = [t.contiguous().numpy() for t in (k, mean, v, extra, blocks.centres, scales, sums)]
        fixed = blocks.deltas.numpy(), blocks.starts, blocks.sizes, chosen, ends
        bits = as_numbers(rounded) if rounded is not None and native_bfloat16() else None
        loop = loops.sums_of_keys if d_v <= loops.FEW_COLUMNS else loops.wide_sums_of_keys
        over_threads(lambda first, last: loop(first, last, *fixed, *given, bits), number)
        return sums, scales
    step = _KEYS_OF_BFLOAT16 if low == torch.bfloat16 else 1
    indices = torch.from_numpy(chosen)
    most = -(-int(lengths.max()) // step) * step
    keys = torch.zeros(most, k.shape[1])
    low_keys = keys if low == torch.float32 else torch.zeros(most, k.shape[1], dtype=low)
    pairs = torch.zeros(most, 1 + d_v)
    space = torch.empty(int(blocks.sizes.max()) * most, dtype=low)
    low_deltas = blocks.deltas.to(low)
    begin = 0
    each = zip(blocks.starts.tolist(), blocks.sizes.tolist(), ends.tolist(), strict=True)
    for b, (start, rows, end) in enumerate(each):
        here, m = indices[begin:end], end - begin
        wide = -(-m // step) * step
        torch.sub(k[here], mean, out=keys[:m])
        base = keys[:m] @ blocks.centres[b] + extra[begin:end]
        begin = end
        # Of keys of weight 0 alone it would be -inf.
        scales[b] = base.max().clamp_min(-1e30)
        part = pairs[:wide]
        part[m:] = 0
        torch.exp(base - scales[b], out=part[:m, 0])
        torch.mul(v[here], part[:m, :1], out=part[:m, 1:])
        if low == torch.bfloat16:
            low_keys[:m] = keys[:m]
        logits = space[: rows * wide].view(rows, wide)
        torch.mm(low_deltas[start : start + rows], low_keys[:wide].mT, out=logits)
        logits.exp_()
        if low == torch.bfloat16:
            sums[start : start + rows] = torch.mm(logits, part.to(low)).float()
        elif d_v < _FEW_COLUMNS:
            for c in range(1 + d_v):
                sums[start : start + rows, c] = torch.mv(logits, part[:, c])
        else:
            torch.mm(logits, part, out=sums[start : start + rows])
    return sums, scales
