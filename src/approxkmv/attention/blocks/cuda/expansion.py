"""The expansion of `expansion` on CUDA, with blocks of equal size: no size depends on the data, so a CUDA graph can
replay it. All axes of the keys are used instead of their leading directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from approxkmv.attention.blocks.expansion import METRIC_POWER, TILTED_COLUMNS
from approxkmv.attention.blocks.reach import APART, APART_NATS
from approxkmv.attention.kernels import triton as triton_kernels
from approxkmv.compute.counting import count


def order_of_queries(
    q: torch.Tensor, spread: torch.Tensor, first: torch.Tensor, clusters: int, iterations: int, sampled: int
) -> torch.Tensor:
    """Order (batch, n) that puts queries of one k-means cluster, and nearby clusters, next to each other.

    The first centres are equally spaced queries, starting at `first` (1,); there are at most as many as queries.
    spread (batch, 1, d), the variances of the keys, weights the axes.
    """
    batch, n, d = q.shape
    clusters = min(clusters, n)
    points = q * spread.pow(METRIC_POWER)
    step = n // clusters
    # Indexed by a tensor: otherwise each seed would need a graph of its own.
    centres = points.index_select(1, torch.arange(clusters, device=q.device) * step + first % step)
    some = points[:, :: max(1, n // (sampled * clusters))]
    for _ in range(iterations):
        labels = torch.baddbmm(centres.square().sum(2).unsqueeze(1), some, centres.mT, alpha=-2).argmin(2)
        totals = torch.zeros_like(centres).scatter_add_(1, labels.unsqueeze(2).expand(-1, -1, d), some)
        counts = centres.new_zeros(batch, centres.shape[1]).scatter_add_(1, labels, torch.ones_like(some[..., 0]))
        centres = torch.where(counts.unsqueeze(2) > 0, totals / counts.clamp_min(1).unsqueeze(2), centres)
    labels = torch.baddbmm(centres.square().sum(2).unsqueeze(1), points, centres.mT, alpha=-2).argmin(2)
    # A block may span two clusters, so consecutive clusters should be close: sort them along the widest axis.
    widest = centres.var(1, correction=0).argmax(1)
    place = centres.gather(2, widest.view(-1, 1, 1).expand(-1, centres.shape[1], 1)).squeeze(2)
    rank = place.argsort(1).argsort(1)
    return rank.gather(1, labels).argsort(1)


def stand_apart(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(batch, n_k) whether a key stands apart from the others, as in `reach.stand_apart`."""
    spreads = (keys.square() * queries.var(1, correction=0, keepdim=True)).sum(2)
    usual = spreads.median(1, keepdim=True).values
    apart = spreads > (APART**2 * usual).clamp_min(APART_NATS**2)
    return apart & (apart.sum(1, keepdim=True) <= keys.shape[1] / 16)


def count_clustering(batch: int, n_q: int, blocks: int, iterations: int, sampled: int) -> None:
    """Count the distances of k-means from the sizes alone: a replayed graph runs no Python."""
    of_sample = len(range(0, n_q, max(1, n_q // (sampled * blocks))))
    count(other_products=batch * blocks * (n_q + iterations * of_sample))


@dataclass(frozen=True)
class OwnKeys:
    """The key with each row's own index, as in `expansion.Seen`, and its value (batch, rows, d_v)."""

    log: torch.Tensor
    share: torch.Tensor
    share_seen: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Expansion:
    """Blocks of queries, and the keys as seen from their centres; rows are queries in the blocks' order, padded."""

    order: torch.Tensor
    """(batch, n_q) indices of queries, block after block."""
    padded: torch.Tensor
    """(batch, rows) index of each row's query; the last block is padded with its last query to full size."""
    queries: torch.Tensor
    """(batch, rows, d), scaled."""
    deltas: torch.Tensor
    """(batch, blocks, block, d) query minus its block's centre."""
    keys: torch.Tensor
    values: torch.Tensor
    """Keys (batch, n_k, d) minus their mean, and values (batch, n_k, d_v); float32."""
    chosen: torch.Tensor
    """(batch, blocks, near) indices of the near keys."""
    weights: torch.Tensor
    """(batch, blocks, n_k) expected weight of each key, relative to its block's largest; 0 for the near keys."""
    total: torch.Tensor
    """(batch, blocks, 1) their sum, at least 1e-30."""
    log_weight: torch.Tensor
    """(batch, rows) log weight of the far key as a row sees it."""
    value: torch.Tensor
    """(batch, rows, d_v) value of the far key as a row sees it."""
    far_key: torch.Tensor
    """(batch, blocks, d)"""
    tilted: bool
    """Whether `value` is first order in the row's offset from the centre, rather than the block's mean."""
    row_variances: torch.Tensor
    """(batch, rows) variance of a row's logits around its block's; `reach.beyond_reach` says when the row is lost."""

    def own_keys(self) -> OwnKeys:
        """The key with the same index as each query; there must be as many keys as queries."""
        batch, blocks, block, d = self.deltas.shape
        keys = self.keys.gather(1, self.padded.unsqueeze(2).expand(-1, -1, d))
        own = self.padded.view(batch, blocks, block)
        weight = self.weights.gather(2, own)
        # Near keys are exact already. A weight of 0 does not identify them: light keys can have it too.
        near = torch.zeros_like(self.weights, dtype=torch.bool).scatter_(2, self.chosen, True).gather(2, own)
        log = (self.queries * keys).sum(2).masked_fill(near.flatten(1), -torch.inf)
        share = weight / self.total
        lean = (self.deltas * (keys.view(batch, blocks, block, d) - self.far_key.unsqueeze(2))).sum(3)
        value = self.values.gather(1, self.padded.unsqueeze(2).expand(-1, -1, self.values.shape[2]))
        return OwnKeys(log, share.flatten(1), (share * (1 + lean)).flatten(1), value)

    def of_queries(self, per_row: torch.Tensor) -> torch.Tensor:
        """Rows (batch, rows, width) put in the order of the queries (batch, n_q, width)."""
        n, width = self.order.shape[1], per_row.shape[2]
        out = torch.empty(len(per_row), n, width, device=per_row.device, dtype=per_row.dtype)
        return out.scatter_(1, self.order.unsqueeze(2).expand(-1, -1, width), per_row[:, :n])


def expand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    *,
    scale: float,
    block: int,
    near: int,
    iterations: int,
    sampled: int,
    products: torch.dtype,
) -> Expansion:
    """Cluster q (batch, n_q, d), choose each block's `near` keys of k (batch, n_k, d) and sum the others.

    first (1,) is the query from which k-means takes its first centres; `products` the type of matrix products.
    """
    batch, n, d = q.shape
    n_k, d_v = v.shape[1:]
    keys = k.float() - k.float().mean(1, keepdim=True)
    values = v.float()
    scaled = q.float() * scale
    blocks = -(-n // block)
    apart = stand_apart(scaled, keys)
    spread = keys.square().masked_fill(apart.unsqueeze(2), 0.0).sum(1, keepdim=True)
    spread = spread / (n_k - apart.sum(1)).view(-1, 1, 1)
    order = order_of_queries(scaled, spread, first, blocks, iterations, sampled)
    padded = torch.cat([order, order[:, -1:].expand(-1, blocks * block - n)], 1)
    queries = scaled.gather(1, padded.unsqueeze(2).expand(-1, -1, d))
    in_blocks = queries.view(batch, blocks, block, d)
    centres = in_blocks.mean(2)
    deltas = in_blocks - centres.unsqueeze(2)
    variances = deltas.square().mean(2)

    rank = torch.cat([centres, 0.5 * variances], 2).to(products)
    logs = torch.bmm(rank, torch.cat([keys, keys.square()], 2).to(products).mT).float()
    # Keys apart are near to every block, since a centre does not represent its queries on them.
    best = logs.masked_fill_(apart.unsqueeze(1), torch.inf).topk(near + 1, 2)
    # Relative to the highest far key: relative to a near one, all weights might vanish.
    chosen, highest = best.indices[..., :near], best.values[..., near:]
    weights = (logs - highest).clamp_max_(0.0).exp_().scatter_(2, chosen, 0.0)
    tilted = d_v <= TILTED_COLUMNS
    features = [torch.ones_like(values[..., :1]), values, keys]
    features += [values[..., c : c + 1] * keys for c in range(d_v)] if tilted else []
    sums = torch.bmm(weights.to(products), torch.cat(features, 2).to(products)).float()
    total = sums[..., :1].clamp_min(1e-30)
    far_value, far_key = sums[..., 1 : 1 + d_v] / total, sums[..., 1 + d_v : 1 + d_v + d] / total
    far_log = total.squeeze(2).log() + highest.squeeze(2) - 0.5 * (variances * far_key.square()).sum(2)
    log_weight = torch.einsum("bngd,bnd->bng", deltas, far_key) + far_log.unsqueeze(2)
    value = far_value.unsqueeze(2).expand(-1, -1, block, -1)
    if tilted:
        tilt = sums[..., 1 + d_v + d :].view(batch, blocks, d_v, d) / total.unsqueeze(3)
        tilt = tilt - far_value.unsqueeze(3) * far_key.unsqueeze(2)
        value = value + torch.einsum("bngd,bncd->bngc", deltas, tilt)
    return Expansion(
        *(order, padded, queries, deltas, keys, values, chosen, weights, total),
        *(log_weight.flatten(1), value.flatten(1, 2), far_key, tilted),
        (deltas.square() * spread.unsqueeze(1)).sum(3).flatten(1),
    )


def sums_of_keys(
    e: Expansion, listed: torch.Tensor, extra: torch.Tensor | None, products: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of exp(q.k + extra) times v and 1 over each block's listed keys (batch, blocks, m), and their scales.

    Shapes (batch, rows, d_v), (batch, rows) and (batch, rows); both sums are divided by exp(scale).
    """
    queries, keys, values = (t.to(products) for t in (e.queries, e.keys, e.values))
    return triton_kernels.listed(queries, keys, values, listed, extra, e.deltas.shape[2], 1.0)


def exactly_where_lost(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Recompute exactly the rows of out (batch, n_q, d_v) that are not finite."""
    lost = ~out.isfinite().all(2)
    if bool(lost.any()):
        count(recomputed_rows=int(lost.sum()))
        for entry in lost.any(1).nonzero().flatten().tolist():
            rows, these = lost[entry], slice(entry, entry + 1)
            out[entry, rows] = triton_kernels.exact(q[these, rows], k[these], v[these], scale)[0].to(out.dtype)
    return out
