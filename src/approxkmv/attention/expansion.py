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

from approxkmv.attention.acceleration import compiled_loops, over_threads, scratch

# Each tilted column of v costs d more columns in the far sums; beyond these the far value is the block's mean.
_TILTED_COLUMNS = 2
# The compiled loop keeps a query's weights in the cache for so many columns; for more, matrix products are faster.
_FEW_COLUMNS = 8
# The compiled loop takes four queries and four coordinates at a time.
_ROWS_OF_LOOP = 4
# oneDNN compiles a kernel for each new shape of a bfloat16 product, so that shapes should repeat.
_ROWS_OF_BFLOAT16 = 16
_KEYS_OF_BFLOAT16 = 64
# One key in so many decides the threshold above which a block's keys are near.
_SAMPLED_KEYS = 8
# Eigenvalues to this power weigh the axes in the distance of queries. One half would be the standard deviation of the
# change of the logits; a little less keeps weight on axes along which only the keys near the top differ.
_METRIC_POWER = 0.4


def k_means(
    points: torch.Tensor, clusters: int, iterations: int, sampled: int, generator: torch.Generator
) -> torch.Tensor:
    """Label (n,) of each of points (n, r): Lloyd's iterations on `sampled` points a cluster, then one on all."""
    loops = compiled_loops()

    def nearest(some: torch.Tensor) -> torch.Tensor:
        norms = centres.square().sum(1)
        labels = torch.empty(len(some), dtype=torch.int64)
        distances = scratch("distances", 512, len(centres))
        # In pieces, so that the distances stay in the cache
        for i in range(0, len(some), 512):
            part = some[i : i + 512]
            here = torch.addmm(norms, part, centres.mT, alpha=-2, out=distances[: len(part)])
            if loops is not None:
                loops.nearest(here.numpy(), labels[i : i + 512].numpy())
            else:
                torch.argmin(here, 1, out=labels[i : i + 512])
        return labels

    shuffled = torch.randperm(len(points), generator=generator)
    centres = points[shuffled[:clusters]]
    some = points[shuffled[: sampled * clusters]]
    for _ in range(iterations):
        labels = nearest(some)
        members = torch.zeros(clusters, len(some))
        members[labels, torch.arange(len(some))] = 1
        counts = members.sum(1, keepdim=True)
        centres = torch.where(counts > 0, (members @ some) / counts, centres)
    return nearest(points)


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
    """(blocks, d) mean square of the deltas along each axis."""

    def __len__(self) -> int:
        return len(self.sizes)

    def of_rows(self, per_block: torch.Tensor) -> torch.Tensor:
        """Repeat (blocks, ...) for each row of each block."""
        return per_block.repeat_interleave(torch.from_numpy(self.sizes), 0)


def make_blocks(q: torch.Tensor, labels: torch.Tensor, multiple: int) -> Blocks:
    """Blocks of the queries q (n, d) that share a label."""
    label = labels.numpy().astype(np.uint16 if len(q) <= 65536 else np.int64)
    order = np.argsort(label, kind="stable")
    counts = np.bincount(label)
    counts = counts[counts > 0]
    firsts = np.concatenate([[0], counts.cumsum()[:-1]])
    padded = -(-counts // multiple) * multiple
    starts = np.concatenate([[0], padded.cumsum()[:-1]])
    rows = torch.from_numpy(np.arange(len(order)) + np.repeat(starts - firsts, counts))
    deltas = scratch("deltas", int(padded.sum()), q.shape[1]).zero_()
    size = torch.from_numpy(counts.astype(np.float32)).unsqueeze(1)
    loops = compiled_loops()
    if loops is not None:
        centres, variances = q.new_empty(len(counts), q.shape[1]), q.new_empty(len(counts), q.shape[1])
        loops.centre_blocks(
            q.numpy(), order, firsts, counts, starts, deltas.numpy(), centres.numpy(), variances.numpy()
        )
    else:
        ordered = q[torch.from_numpy(order)]
        centres = torch.from_numpy(np.add.reduceat(ordered.numpy(), firsts, axis=0)) / size
        ordered -= centres.repeat_interleave(torch.from_numpy(counts), 0)
        variances = torch.from_numpy(np.add.reduceat(ordered.square().numpy(), firsts, axis=0)) / size
        deltas[rows] = ordered
    return Blocks(torch.from_numpy(order), rows, starts, padded, centres, deltas, variances)


def rotate(q: torch.Tensor, k: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale q and centred k in the axes of the keys' covariance, and its eigenvalues, largest first.

    The products q.k only lose a term that is the same for all keys, which attention does not see. The width is padded
    with zeros to a multiple of four.
    """
    mean = k.mean(0)
    some = k[:: max(1, len(k) // 2048)] - mean
    values, vectors = torch.linalg.eigh(some.mT @ some / len(some))
    axes = torch.nn.functional.pad(vectors.flip(1), (0, -k.shape[1] % _ROWS_OF_LOOP))
    width = axes.shape[1]
    queries = torch.mm(q, axes * scale, out=scratch("queries", len(q), width))
    # Centred before the product, long keys far from the origin keep their digits.
    keys = torch.mm(torch.sub(k, mean, out=scratch("centred", *k.shape)), axes, out=scratch("keys", len(k), width))
    return queries, keys, values.flip(0).clamp_min(0)


@dataclass(frozen=True)
class Expansion:
    """Everything that is known about the blocks before a single query is looked at again."""

    blocks: Blocks
    k: torch.Tensor
    """(n_k, d) keys in the axes of their covariance, which `spread` (d,) is the diagonal of."""
    v: torch.Tensor
    spread: torch.Tensor
    logs: torch.Tensor
    """(blocks, n_k) c.k + k'Vk/2."""
    weights: torch.Tensor
    """(blocks, n_k) exp(logs - highest), zero for the near keys."""
    highest: torch.Tensor
    """(blocks, 1)"""
    chosen: np.ndarray
    ends: np.ndarray
    """The near keys of block b are chosen[ends[b-1]:ends[b]]."""
    far_log: torch.Tensor
    """(blocks,) log of the far key's weight at the centre."""
    far_key: torch.Tensor
    far_value: torch.Tensor
    """(blocks, d), (blocks, d_v): weighted means over the far keys."""
    far_tilt: torch.Tensor | None
    """(blocks, d_v, d) weighted covariance of the far values and keys, where there are few columns."""

    def far(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log weight (rows,) and value (rows, d_v) of its block's far key, as each query sees them."""
        axes = self.far_key.unsqueeze(2)
        if self.far_tilt is not None:
            axes = torch.cat([axes, self.far_tilt.mT], 2)
        seen = project(self.blocks, axes)
        log_weight = seen[:, 0] + self.blocks.of_rows(self.far_log)
        value = self.blocks.of_rows(self.far_value)
        return log_weight, value if self.far_tilt is None else value + seen[:, 1:]

    def unpermute(self, answer: torch.Tensor) -> torch.Tensor:
        """Rows of the blocks (padded n, d_v) back in the order of the queries (n, d_v)."""
        out = torch.empty(len(self.blocks.order), answer.shape[1])
        out[self.blocks.order] = answer[self.blocks.rows]
        return out


def project(blocks: Blocks, axes: torch.Tensor) -> torch.Tensor:
    """deltas (rows, d) of each block times its own axes (blocks, d, r): (rows, r)."""
    out = torch.empty(len(blocks.deltas), axes.shape[2])
    for b, (start, rows) in enumerate(zip(blocks.starts.tolist(), blocks.sizes.tolist(), strict=True)):
        torch.mm(blocks.deltas[start : start + rows], axes[b], out=out[start : start + rows])
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
    all_axes: bool = False,
) -> Expansion:
    """Cluster the queries q (n_q, d), choose each block's near keys and sum the others at its centre.

    The far key has its place along the leading `directions` only, unless all_axes: a control variate needs them all.
    Much of what is returned is scratch: it holds until the next call in this thread.
    """
    n_k, d_v = v.shape
    loops = compiled_loops()
    looped = d_v <= _FEW_COLUMNS and loops is not None
    multiple = _ROWS_OF_LOOP if looped else _ROWS_OF_BFLOAT16 if low == torch.bfloat16 else 1
    q, k, spread = rotate(q, k, scale)
    d = q.shape[1]
    r = min(directions, d)
    a = d if all_axes else r
    metric = torch.nn.functional.pad(spread, (0, d - len(spread)))[:r].pow(_METRIC_POWER)
    points = torch.mul(q[:, :r], metric, out=scratch("points", len(q), r))
    labels = k_means(points, -(-len(q) // block), iterations, sampled, generator)
    blocks = make_blocks(q, labels, multiple)

    # Columns: the leading squares, the keys, one, the values, and the leading axes of keys times values.
    tilted = d_v <= _TILTED_COLUMNS
    width = r + d + 1 + d_v + (a * d_v if tilted else 0)
    features = scratch("features", n_k, width, dtype=low)
    if loops is not None and low == torch.bfloat16:
        given = k.numpy(), v.contiguous().numpy(), r, a, tilted, features.view(torch.uint16).numpy()
        over_threads(lambda first, last: loops.fill_features(first, last, *given), n_k)
    else:
        features[:, :r] = k[:, :r].square()
        features[:, r : r + d] = k
        features[:, r + d] = 1
        features[:, r + d + 1 : r + d + 1 + d_v] = v
        for c in range(d_v if tilted else 0):
            at = r + d + 1 + d_v + c * a
            features[:, at : at + a] = v[:, c : c + 1] * k[:, :a]
    ranks = torch.cat([0.5 * blocks.variances[:, :r], blocks.centres], 1).to(low)
    logs = torch.mm(ranks, features[:, : r + d].mT, out=scratch("logs", len(blocks), n_k, dtype=low))
    highest = logs.amax(1, keepdim=True)
    sample = logs[:, generator.initial_seed() % _SAMPLED_KEYS :: _SAMPLED_KEYS].float()
    kept = sample.shape[1] - min(max(1, near // _SAMPLED_KEYS), sample.shape[1])
    thresholds = torch.from_numpy(np.partition(sample.numpy(), kept, axis=1)[:, kept].copy()).unsqueeze(1)
    weights = scratch("weights", len(blocks), n_k, dtype=low)
    is_near = scratch("is near", len(blocks), n_k, dtype=torch.bool)
    if loops is not None and low == torch.bfloat16:
        bars = highest.float().squeeze(1).numpy(), thresholds.squeeze(1).numpy()
        filled = logs.view(torch.uint16).numpy(), *bars, is_near.numpy(), weights.view(torch.uint16).numpy()
        over_threads(lambda first, last: loops.fill_weights(first, last, *filled), len(blocks))
    else:
        torch.ge(logs, thresholds.to(low), out=is_near)
        torch.sub(logs, highest, out=weights).exp_().masked_fill_(is_near, 0)
    chosen = np.flatnonzero(is_near.numpy())
    ends = np.searchsorted(chosen, np.arange(1, len(blocks) + 1) * n_k)
    chosen %= n_k

    # The far keys' mean along the axes with little spread is next to nothing.
    plain = torch.mm(weights, features[:, r : r + a]).float()
    rest = torch.mm(weights, features[:, r + d :]).float()
    total = rest[:, :1].clamp_min(1e-30)
    far_key = torch.nn.functional.pad(plain / total, (0, d - a))
    far_value = rest[:, 1 : 1 + d_v] / total
    # The far key's own second-order term is in its weight already.
    second = 0.5 * (blocks.variances * far_key.square()).sum(1)
    far_log = total[:, 0].log() + highest[:, 0].float() - second
    far_tilt = None
    if tilted:
        products = rest[:, 1 + d_v :].view(len(blocks), d_v, a) / total.unsqueeze(2)
        products = torch.nn.functional.pad(products, (0, d - a))
        far_tilt = products - far_value.unsqueeze(2) * far_key.unsqueeze(1)
    return Expansion(blocks, k, v, spread, logs, weights, highest, chosen, ends, far_log, far_key, far_value, far_tilt)


def sums_of_keys(
    blocks: Blocks,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: np.ndarray,
    ends: np.ndarray,
    extra: torch.Tensor | None,
    low: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (rows, 1 + d_v) of exp(q.k + extra) times [1, v] over each block's chosen keys, and their log scales.

    Block b's keys are chosen[ends[b-1]:ends[b]], its sums are divided by exp(scale_b); extra (len(chosen),) or 0.
    """
    count, d_v = len(blocks), v.shape[1]
    sums, scales = torch.zeros(len(blocks.deltas), 1 + d_v), torch.empty(count)
    loops = compiled_loops() if d_v <= _FEW_COLUMNS else None
    if extra is None:
        extra = torch.zeros(len(chosen))
    if loops is not None:
        given = [t.contiguous().numpy() for t in (k, v, extra, blocks.centres, scales, sums)]
        fixed = blocks.deltas.numpy(), blocks.starts, blocks.sizes, chosen, ends
        over_threads(lambda first, last: loops.sums_of_keys(first, last, *fixed, *given), count)
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
        torch.index_select(k, 0, here, out=keys[:m])
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
        elif d_v < _FEW_COLUMNS:
            for c in range(1 + d_v):
                sums[start : start + rows, c] = torch.mv(logits, part[:, c])
        else:
            torch.mm(logits, part, out=sums[start : start + rows])
    return sums, scales
