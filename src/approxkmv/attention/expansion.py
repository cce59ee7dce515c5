"""The expansion of attention around the centres of blocks of queries, which two methods share.

With q = c + delta in a block with centre c and (diagonal) covariance V, exp(q.k) = exp(c.k + k'Vk/2)
exp(delta.k - k'Vk/2), where the second factor has mean one over the block if its queries are Gaussian. The first
factor ranks the keys: a block's `near` highest are summed exactly for each of its queries, the others with that
weight into one far key per block, to first order in delta in the weights and, for few value columns, in the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from approxkmv.attention.acceleration import compiled_loops, native_bfloat16, over_threads, scratch
from approxkmv.attention.counting import count
from approxkmv.attention.k_means import k_means

# Each tilted column of v costs d more columns in the far sums; beyond these the far value is the block's mean.
_TILTED_COLUMNS = 2
# The compiled loop keeps a query's weights in the cache for so many columns; for more, matrix products are faster.
FEW_COLUMNS = 8
# oneDNN compiles a kernel for each new shape of a bfloat16 product, so that shapes should repeat.
_ROWS_OF_BFLOAT16 = 16
_KEYS_OF_BFLOAT16 = 64
# One key in so many decides the threshold above which a block's keys are near.
_SAMPLED_KEYS = 8
# Eigenvalues to this power weigh the axes in the distance of queries. One half would be the standard deviation of the
# change of the logits; a little less keeps weight on axes along which only the keys near the top differ.
_METRIC_POWER = 0.4


@dataclass(frozen=True)
class Blocks:
    """Queries in blocks of near neighbours, each block's rows contiguous and padded to a multiple of some rows."""

    order: torch.Tensor
    """(n,) queries, block after block."""
    rows: torch.Tensor
    """(n,) where query order[i] lies in `deltas`."""
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

    def of_queries(self) -> torch.Tensor:
        """(n,) the block of query order[i]."""
        return torch.from_numpy(np.repeat(np.arange(len(self.sizes)), self.sizes)[self.rows.numpy()])


def make_blocks(
    q: torch.Tensor, scale: float, points: torch.Tensor, importance: torch.Tensor, labels: torch.Tensor, multiple: int
) -> Blocks:
    """Blocks of the queries, scale times q (n, d), and of their points (n, r), that share a label.

    importance (r,): what a square along each of the points' axes counts in `row_variances`.
    """
    label = labels.numpy().astype(np.uint16 if len(q) <= 65536 else np.int64)
    order = np.argsort(label, kind="stable")
    counts = np.bincount(label)
    counts = counts[counts > 0]
    firsts = np.concatenate([[0], counts.cumsum()[:-1]])
    padded = -(-counts // multiple) * multiple
    starts = np.concatenate([[0], padded.cumsum()[:-1]])
    rows = torch.from_numpy(np.arange(len(order)) + np.repeat(starts - firsts, counts))
    whole = int(padded.sum())
    deltas = scratch("deltas", whole, q.shape[1])
    row_variances = torch.zeros(whole)
    if whole > len(q):
        deltas.zero_()
    centres, variances = q.new_empty(len(counts), q.shape[1]), q.new_empty(len(counts), points.shape[1])
    loops = compiled_loops()
    if loops is not None:
        given = q.contiguous().numpy(), np.float32(scale), points.numpy(), importance.numpy()
        written = (t.numpy() for t in (deltas, centres, variances, row_variances))
        loops.centre_blocks(*given, order, firsts, counts, starts, *written)
    else:
        size = torch.from_numpy(counts.astype(np.float32)).unsqueeze(1)
        places = torch.from_numpy(order)
        of_row = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))

        def means(ordered: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(np.add.reduceat(ordered.numpy(), firsts, axis=0)) / size

        centres.copy_(scale * means(q[places]))
        deltas[rows] = scale * q[places] - centres[of_row]
        ordered = points[places]
        squares = (ordered - means(ordered)[of_row]).square()
        variances.copy_(means(squares))
        row_variances[rows] = squares @ importance
    return Blocks(torch.from_numpy(order), rows, starts, padded, centres, deltas, variances, row_variances)


def principal_axes(k: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (d,) of the keys k (n, d), the `count` leading axes (d, count) of their covariance, their eigenvalues."""
    mean = k.mean(0)
    if count == 0:
        return mean, k.new_empty(k.shape[1], 0), k.new_empty(0)
    some = k[:: max(1, len(k) // 2048)] - mean
    values, vectors = torch.linalg.eigh(some.mT @ some / len(some))
    return mean, vectors.flip(1)[:, :count], values.flip(0)[:count].clamp_min(0)


@dataclass(frozen=True)
class OwnKeys:
    """What each row's own key adds, and what the far key had counted for it; nothing where that key is near."""

    log: torch.Tensor
    """(rows,) q_i.(k_i - mean), -inf where the key is near."""
    share: torch.Tensor
    """(rows,) the key's part of the far key's weight, as the block's centre sees it, and"""
    share_seen: torch.Tensor
    """(rows,) to first order in the row's distance from the centre."""

    @classmethod
    def none(cls, rows: int) -> OwnKeys:
        """For queries that have no keys of their own."""
        return cls(torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows))


@dataclass(frozen=True)
class Expansion:
    """Everything that is known about the blocks before a single query is looked at again."""

    blocks: Blocks
    mean: torch.Tensor
    """(d,) of the keys, which are taken relative to it: attention does not see a common shift."""
    rounded: torch.Tensor | None
    """(n_k, d or d + 1) the keys less their mean in bfloat16, if those were asked for; zeros at the end if d is odd."""
    logs: torch.Tensor
    """(blocks, n_k) c.k + k'Vk/2."""
    weights: torch.Tensor
    """(blocks, 1 + tilts, n_k) exp(logs - highest), zero for the near keys; then these times each tilted column."""
    thresholds: torch.Tensor
    """(blocks, 1) the least of logs at which a key is near."""
    chosen: np.ndarray
    ends: np.ndarray
    """The near keys of block b are chosen[ends[b-1]:ends[b]]."""
    total: torch.Tensor
    """(blocks,) sum of the weights."""
    far_log: torch.Tensor
    """(blocks,) log of the far key's weight at the centre."""
    far_key: torch.Tensor
    far_value: torch.Tensor
    """(blocks, d), (blocks, d_v): weighted means over the far keys, the keys' relative to `mean`."""
    far_tilt: torch.Tensor | None
    """(blocks, d_v, d) weighted covariance of the far values and keys, where there are few columns."""

    def far(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log weight (rows,) and value (rows, d_v) of its block's far key, as each query sees them."""
        count(kernel_evaluations=len(self.blocks.deltas))
        axes = self.far_key.unsqueeze(1)
        if self.far_tilt is not None:
            axes = torch.cat([axes, self.far_tilt], 1)
        seen = project(self.blocks, axes)
        log_weight = seen[:, 0] + self.blocks.of_rows(self.far_log)
        value = self.blocks.of_rows(self.far_value)
        return log_weight, value if self.far_tilt is None else value + seen[:, 1:]

    def own_keys(self, k: torch.Tensor) -> OwnKeys:
        """The key of the same index as each query, of as many keys as queries: in self-attention often its nearest.

        Seen from the block's centre it is one of many, and its block does not list it as near.
        """
        blocks = self.blocks
        rows, order = blocks.rows, blocks.order
        whole = len(blocks.deltas)
        log, share, lean = torch.full((whole,), -torch.inf), torch.zeros(whole), torch.zeros(whole)
        of_query = blocks.of_queries()
        count(kernel_evaluations=len(order))
        loops = compiled_loops()
        if loops is not None:
            geometry = (order, rows, of_query, blocks.deltas, blocks.centres, k, self.mean, self.far_key)
            given = [t.contiguous().numpy() for t in geometry]
            given += [as_numbers(self.logs), self.thresholds.squeeze(1).numpy(), as_numbers(self.weights)]
            given += [t.numpy() for t in (self.total, log, share, lean)]
            over_threads(lambda first, last: loops.own_keys(first, last, *given), len(order))
        else:
            deltas, keys = blocks.deltas[rows], k[order] - self.mean
            is_near = self.logs[of_query, order] >= self.thresholds.to(self.logs.dtype)[of_query, 0]
            own = ((blocks.centres[of_query] + deltas) * keys).sum(1)
            log[rows] = own.masked_fill_(is_near, -torch.inf)
            lean[rows] = (deltas * (keys - self.far_key[of_query])).sum(1)
            share[rows] = self.weights[of_query, 0, order].float() / self.total[of_query]
        return OwnKeys(log, share, share * (1 + lean))

    def of_queries(self, per_row: torch.Tensor) -> torch.Tensor:
        """Rows of the blocks (padded n, d_v) in the order of the queries (n, d_v)."""
        out = torch.empty(len(self.blocks.order), per_row.shape[1])
        out[self.blocks.order] = per_row[self.blocks.rows]
        return out

    def of_rows(self, per_query: torch.Tensor) -> torch.Tensor:
        """Something of the queries (n, ...) in the order of the blocks' rows (padded n, ...), zero where padded."""
        out = torch.zeros(len(self.blocks.deltas), *per_query.shape[1:])
        out[self.blocks.rows] = per_query[self.blocks.order]
        return out


def as_numbers(stored: torch.Tensor) -> np.ndarray:
    """float32 numbers, or the bits of bfloat16 ones, which NumPy does not have: what the compiled loops take."""
    return (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()


def project(blocks: Blocks, axes: torch.Tensor) -> torch.Tensor:
    """deltas (rows, d) of each block times its own axes (blocks, r, d): (rows, r)."""
    out = torch.empty(len(blocks.deltas), axes.shape[1])
    loops = compiled_loops()
    if loops is not None and axes.shape[1] <= FEW_COLUMNS:
        given = blocks.deltas.numpy(), blocks.starts, blocks.sizes, axes.contiguous().numpy(), out.numpy()
        over_threads(lambda first, last: loops.project(first, last, *given), len(blocks))
        return out
    for b, (start, rows) in enumerate(zip(blocks.starts.tolist(), blocks.sizes.tolist(), strict=True)):
        torch.mm(blocks.deltas[start : start + rows], axes[b].mT, out=out[start : start + rows])
    return out


def expand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    *,
    scale: float,
    block: int,
    near: int,
    directions: int,
    iterations: int,
    sampled: int,
    low: torch.dtype,
) -> Expansion:
    """Cluster the queries q (n_q, d), choose each block's near keys and sum the others at its centre.

    Queries are clustered, and a block's second moment is taken, along the keys' leading `directions`; without any
    there is one block, and the expansion is of first order. Much of what is returned is scratch: it holds until the
    next call in this thread.
    """
    n_k, d_v = v.shape
    d = q.shape[1]
    loops = compiled_loops()
    looped = d_v <= FEW_COLUMNS and loops is not None
    multiple = _ROWS_OF_BFLOAT16 if low == torch.bfloat16 and not looped else 1
    mean, axes, spread = principal_axes(k, min(directions, d))
    r = len(spread)
    metric = spread.pow(_METRIC_POWER).clamp_min(1e-15)
    # Clustering and curvature are estimates: half the digits do for their coordinates.
    some = q if low == q.dtype else scratch("low queries", len(q), d, dtype=low).copy_(q)
    points = torch.mm(some, (scale * axes * metric).to(low), out=scratch("points", len(q), r, dtype=low))
    if low != torch.float32:
        points = scratch("points", len(q), r).copy_(points)
    clusters = -(-len(q) // block)
    labels = torch.zeros(len(q), dtype=torch.int64)
    if clusters > 1 and r > 0:
        labels = k_means(points, clusters, iterations, sampled, generator)
    blocks = make_blocks(q, scale, points, spread / metric.square(), labels, multiple)

    # Columns: the squares along the leading axes, then the keys.
    # Products of bfloat16 take numbers by twos.
    spare = d % 2 if low == torch.bfloat16 else 0
    features = scratch("features", n_k, r + d + spare, dtype=low)
    keys = torch.sub(k, mean, out=features[:, r : r + d])
    features[:, r + d :] = 0
    if r > 0:
        torch.square(torch.mm(keys, axes.to(low), out=scratch("along", n_k, r, dtype=low)), out=features[:, :r])
    variances = blocks.variances / metric.square()
    ranks = torch.cat([0.5 * variances, blocks.centres], 1).to(low)
    logs = torch.mm(ranks, features[:, : r + d].mT, out=scratch("logs", len(blocks), n_k, dtype=low))
    count(kernel_evaluations=logs.numel())
    highest = logs.amax(1, keepdim=True)
    sample = logs[:, generator.initial_seed() % _SAMPLED_KEYS :: _SAMPLED_KEYS].float()
    kept = sample.shape[1] - min(max(1, near // _SAMPLED_KEYS), sample.shape[1])
    thresholds = torch.from_numpy(np.partition(sample.numpy(), kept, axis=1)[:, kept].copy()).unsqueeze(1)
    tilts = d_v if d_v <= _TILTED_COLUMNS else 0
    weights = scratch("weights", len(blocks), 1 + tilts, n_k, dtype=low)
    if loops is not None:
        totals, values = torch.empty(len(blocks)), torch.empty(len(blocks), tilts)
        counts = np.empty(len(blocks), np.int64)
        bars = thresholds.squeeze(1).numpy()
        columns = v[:, :tilts].mT.contiguous().numpy()
        given = (as_numbers(logs), highest.float().squeeze(1).numpy(), bars, columns, as_numbers(weights), counts)
        sums = totals.numpy(), values.numpy()
        over_threads(lambda first, last: loops.fill_weights(first, last, *given, *sums), len(blocks))
        ends = counts.cumsum()
        chosen = np.empty(ends[-1], np.int64)
        listed = as_numbers(logs), bars, ends, chosen
        over_threads(lambda first, last: loops.list_near(first, last, *listed), len(blocks))
    else:
        is_near = logs >= thresholds.to(low)
        torch.sub(logs, highest, out=weights[:, 0]).exp_().masked_fill_(is_near, 0)
        torch.mul(weights[:, :1], v[:, :tilts].mT.to(low), out=weights[:, 1:])
        totals, values = weights[:, 0].float().sum(1), weights[:, 1:].float().sum(2)
        chosen = np.flatnonzero(is_near.numpy())
        ends = np.searchsorted(chosen, np.arange(1, len(blocks) + 1) * n_k)
        chosen %= n_k

    far = torch.mm(weights.view(-1, n_k), keys).float().view(len(blocks), 1 + tilts, d)
    total = totals.clamp_min(1e-30).unsqueeze(1)
    far_key = far[:, 0] / total
    far_value = (values if tilts else torch.mm(weights[:, 0], v.to(low)).float()) / total
    # The far key's own second-order term is in its weight already.
    second = 0.5 * (variances * (far_key @ axes).square()).sum(1)
    far_log = total[:, 0].log() + highest[:, 0].float() - second
    far_tilt = None
    if tilts:
        far_tilt = far[:, 1:] / total.unsqueeze(2) - far_value.unsqueeze(2) * far_key.unsqueeze(1)
    return Expansion(
        blocks,
        mean,
        features[:, r:] if low == torch.bfloat16 else None,
        logs,
        weights,
        thresholds,
        chosen,
        ends,
        total[:, 0],
        far_log,
        far_key,
        far_value,
        far_tilt,
    )


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
    sums, scales = torch.zeros(len(blocks.deltas), 1 + d_v), torch.empty(number)
    # Each key with each query, padded rows too, and with the block's centre
    count(kernel_evaluations=int(((blocks.sizes + 1) * np.diff(ends, prepend=0)).sum()))
    loops = compiled_loops() if d_v <= FEW_COLUMNS else None
    if extra is None:
        extra = torch.zeros(len(chosen))
    if loops is not None:
        given = [t.contiguous().numpy() for t in (k, mean, v, extra, blocks.centres, scales, sums)]
        fixed = blocks.deltas.numpy(), blocks.starts, blocks.sizes, chosen, ends
        if rounded is not None and native_bfloat16():
            bits = as_numbers(rounded)
            over_threads(lambda first, last: loops.sums_of_rounded_keys(first, last, *fixed, *given, bits), number)
        else:
            over_threads(lambda first, last: loops.sums_of_keys(first, last, *fixed, *given), number)
        return sums, scales
    step = _KEYS_OF_BFLOAT16 if low == torch.bfloat16 else 1
    indices = torch.from_numpy(chosen)
    most = -(-int(np.diff(ends, prepend=0).max()) // step) * step
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
        scales[b] = base.max()
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
        elif d_v < FEW_COLUMNS:
            for c in range(1 + d_v):
                sums[start : start + rows, c] = torch.mv(logits, part[:, c])
        else:
            torch.mm(logits, part, out=sums[start : start + rows])
    return sums, scales
