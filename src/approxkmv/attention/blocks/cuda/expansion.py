"""The expansion of `expansion` on CUDA: no size depends on the data, so a CUDA graph can replay it.

Queries keep their order. Those of a cluster are dealt to tiles of TILE rows, of which clusters of any sizes fill at
most n / TILE + clusters. All axes of the keys are used instead of their leading directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from approxkmv.attention.blocks.expansion import METRIC_POWER, TILTED_COLUMNS, Clustering
from approxkmv.attention.blocks.grouping import block_size
from approxkmv.attention.blocks.reach import APART, APART_NATS
from approxkmv.attention.kernels import triton as triton_kernels
from approxkmv.attention.kernels.triton import TILE
from approxkmv.compute.counting import count

# Keys whose median spread is the usual one
_SAMPLED_KEYS = 2048
# Logits of rows that are made exactly, at a time
_EXACT_LOGITS = 2**27


def most_tiles(n: int, clusters: int) -> int:
    """The tiles that n queries in so many clusters fill at most."""
    return (n + (TILE - 1) * clusters) // TILE


def labels_of_queries(
    q: torch.Tensor, spread: torch.Tensor, first: torch.Tensor, clusters: int, iterations: int, sampled: int
) -> torch.Tensor:
    """The k-means cluster (batch, n) of each query.

    The first centres are equally spaced queries, starting at `first` (1,); there are at most as many as queries.
    spread (batch, 1, d), the variances of the keys, weights the axes.
    """
    batch, n, d = q.shape
    if clusters == 1:
        return torch.zeros(batch, n, dtype=torch.int64, device=q.device)
    points = q * spread.pow(METRIC_POWER)
    step = n // clusters
    # Indexed by a tensor: otherwise each seed would need a graph of its own.
    centres = points.index_select(1, torch.arange(clusters, device=q.device) * step + first % step)
    some = points[:, :: max(1, n // (sampled * clusters))]
    for _ in range(iterations):
        labels = torch.baddbmm(centres.square().sum(2).unsqueeze(1), some, centres.mT, alpha=-2).argmin(2)
        totals = torch.zeros_like(centres).scatter_add_(1, labels.unsqueeze(2).expand(-1, -1, d), some)
        counts = centres.new_zeros(batch, clusters).scatter_add_(1, labels, torch.ones_like(some[..., 0]))
        centres = torch.where(counts.unsqueeze(2) > 0, totals / counts.clamp_min(1).unsqueeze(2), centres)
    return torch.baddbmm(centres.square().sum(2).unsqueeze(1), points, centres.mT, alpha=-2).argmin(2)


@dataclass(frozen=True)
class Tiles:
    """Which queries are processed together."""

    labels: torch.Tensor
    """(batch, n) the cluster of each query."""
    counts: torch.Tensor
    """(batch, clusters) float32, queries of each cluster."""
    queries: torch.Tensor
    """(batch, tiles, TILE) int32 the queries of each tile, all of one cluster; -1 where there is none."""
    clusters: torch.Tensor
    """(batch, tiles) int32 the cluster of each tile."""
    ends: torch.Tensor
    """(batch, clusters) int64 the tile after the last of each cluster."""

    @classmethod
    def of(cls, labels: torch.Tensor, clusters: int) -> Tiles:
        """Tiles for labels (batch, n) below `clusters`."""
        batch, n = labels.shape
        number = most_tiles(n, clusters)
        if clusters == 1:
            rows = torch.arange(number * TILE, device=labels.device, dtype=torch.int32)
            queries = rows.masked_fill_(rows >= n, -1).expand(batch, -1).contiguous()
            none = queries.new_zeros(batch, number)
            ends = labels.new_full((batch, 1), number)
            return cls(labels, labels.new_full((batch, 1), n).float(), queries.view(batch, number, TILE), none, ends)
        place = torch.arange(n, device=labels.device)
        # Two bytes sort in a quarter of the passes of eight.
        short = labels.to(torch.int16 if clusters < 2**15 else torch.int32)
        ordered, order = short.sort(dim=1, stable=True)
        edges = torch.arange(clusters, device=labels.device, dtype=short.dtype).expand(batch, -1).contiguous()
        starts = torch.searchsorted(ordered, edges)
        counts = torch.searchsorted(ordered, edges, right=True) - starts
        tiles = (counts + TILE - 1) // TILE
        ends = tiles.cumsum(1)
        row = (TILE * (ends - tiles) - starts).gather(1, ordered.long()) + place
        queries = torch.full((batch, number * TILE), -1, dtype=torch.int32, device=labels.device)
        queries.scatter_(1, row, order.int())
        each = torch.arange(number, device=labels.device).expand(batch, -1).contiguous()
        of_tile = torch.searchsorted(ends, each, right=True).clamp_max_(clusters - 1)
        return cls(labels, counts.float(), queries.view(batch, number, TILE), of_tile.int(), ends)

    def of_queries(self, per_cluster: torch.Tensor) -> torch.Tensor:
        """(batch, clusters, ...) to (batch, n, ...)."""
        flat = per_cluster.flatten(2) if per_cluster.ndim > 2 else per_cluster.unsqueeze(2)
        if flat.shape[1] == 1:
            found = flat.expand(-1, self.labels.shape[1], -1)
        else:
            found = flat.gather(1, self.labels.unsqueeze(2).expand(-1, -1, flat.shape[2]))
        return found.reshape(*self.labels.shape, *per_cluster.shape[2:])

    def means(self, per_query: torch.Tensor) -> torch.Tensor:
        """Means (batch, clusters, w) over the queries of each cluster of (batch, n, w); 0 without queries."""
        batch, _, width = per_query.shape
        if self.counts.shape[1] == 1:
            return per_query.mean(1, keepdim=True)
        totals = per_query.new_zeros(batch, self.counts.shape[1], width)
        totals.scatter_add_(1, self.labels.unsqueeze(2).expand(-1, -1, width), per_query)
        return totals / self.counts.clamp_min(1).unsqueeze(2)


def stand_apart(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(batch, n_k) whether a key stands apart from the others, as in `reach.stand_apart`."""
    spreads = (keys.square() * queries.var(1, correction=0, keepdim=True)).sum(2)
    # Of a sample: a GPU finds the median of one long row with a single block of threads.
    usual = spreads[:, :: max(1, keys.shape[1] // _SAMPLED_KEYS)].median(1, keepdim=True).values
    apart = spreads > (APART**2 * usual).clamp_min(APART_NATS**2)
    return apart & (apart.sum(1, keepdim=True) <= keys.shape[1] / 16)


def clustering_for(given: Mapping[str, int], n_q: int, n_k: int) -> Clustering | None:
    """The Clustering given, for so many queries and keys; None where the exact answer takes no longer."""
    clustering = Clustering(**given)
    # No block is larger than all queries together; directions, which are not used, must not tell graphs apart.
    block = min(block_size(clustering.block, n_q, n_k), n_q)
    if clustering.near >= n_k or block == 1:
        return None
    return replace(clustering, block=block, directions=0)


def count_clustering(batch: int, n_q: int, blocks: int, iterations: int, sampled: int) -> None:
    """Count the distances of k-means from the sizes alone: a replayed graph runs no Python."""
    if blocks == 1:
        return
    of_sample = len(range(0, n_q, max(1, n_q // (sampled * blocks))))
    count(other_products=batch * blocks * (n_q + iterations * of_sample))


@dataclass(frozen=True)
class OwnKeys:
    """The key with each query's own index, as in `expansion.Seen`."""

    log: torch.Tensor
    share: torch.Tensor
    share_seen: torch.Tensor


@dataclass(frozen=True)
class Expansion:
    """Clusters of queries, and the keys as seen from their centres; all of a query stands in its place (batch, n)."""

    tiles: Tiles
    queries: torch.Tensor
    """(batch, n, d), scaled."""
    centres: torch.Tensor
    """(batch, clusters, d)"""
    deltas: torch.Tensor
    """(batch, n, d) query minus its cluster's centre."""
    keys: torch.Tensor
    values: torch.Tensor
    """Keys (batch, n_k, d) minus their mean, and values (batch, n_k, d_v); float32."""
    chosen: torch.Tensor
    """(batch, clusters, near) indices of the near keys."""
    weights: torch.Tensor
    """(batch, clusters, n_k) expected weight of each key, relative to its cluster's largest; -0.0 for the near keys."""
    total: torch.Tensor
    """(batch, clusters, 1) their sum, at least 1e-30."""
    log_weight: torch.Tensor
    """(batch, n) log weight of the far key as a query sees it."""
    value: torch.Tensor
    """(batch, n, d_v) value of the far key as a query sees it."""
    far_key: torch.Tensor
    """(batch, clusters, d)"""
    tilted: bool
    """Whether `value` is first order in the query's offset from the centre, rather than the cluster's mean."""
    variances: torch.Tensor
    """(batch, n) variance of a query's logits around its cluster's; `reach.beyond_reach` says when it is lost."""

    def own(self, per_key: torch.Tensor) -> torch.Tensor:
        """(batch, n) what each query's cluster has for the key of its index, from (batch, clusters, n_k)."""
        n = self.tiles.labels.shape[1]
        place = self.tiles.labels * n + torch.arange(n, device=per_key.device)
        return per_key.flatten(1).gather(1, place)

    def own_keys(self) -> OwnKeys:
        """The key with the same index as each query; there must be as many keys as queries."""
        weight = self.own(self.weights)
        # Near keys are exact already.
        log = (self.queries * self.keys).sum(2).masked_fill(weight.signbit(), -torch.inf)
        share = weight / self.tiles.of_queries(self.total)[..., 0]
        lean = (self.deltas * (self.keys - self.tiles.of_queries(self.far_key))).sum(2)
        return OwnKeys(log, share, share * (1 + lean))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32 for three-dimensional a and b, whose numbers may be bfloat16."""
    if a.dtype == torch.bfloat16 and a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def expand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    clustering: Clustering,
    *,
    scale: float,
    products: torch.dtype,
) -> Expansion:
    """Cluster q (batch, n_q, d), choose each cluster's near keys of k (batch, n_k, d) and sum the others.

    first (1,) is the query from which k-means takes its first centres; `products` the type of matrix products.
    """
    n = q.shape[1]
    n_k, d_v = v.shape[1:]
    keys = triton_kernels.widened(k.float() - k.float().mean(1, keepdim=True), 16)
    queries = triton_kernels.widened(q.float() * scale, 16)
    values = v.float()
    d = keys.shape[2]
    clusters = -(-n // clustering.block)
    apart = stand_apart(queries, keys)
    spread = keys.square().masked_fill(apart.unsqueeze(2), 0.0).sum(1, keepdim=True)
    spread = spread / (n_k - apart.sum(1)).view(-1, 1, 1)
    labels = labels_of_queries(queries, spread, first, clusters, clustering.iterations, clustering.sampled)
    tiles = Tiles.of(labels, clusters)
    centres = tiles.means(queries)
    deltas = queries - tiles.of_queries(centres)
    variances = tiles.means(deltas.square())

    rank = torch.cat([centres, 0.5 * variances], 2).to(products)
    logs = product(rank, torch.cat([keys, keys.square()], 2).to(products).mT)
    # Keys apart are near to every cluster, since a centre does not represent its queries on them.
    near = clustering.near
    best = logs.masked_fill_(apart.unsqueeze(1), torch.inf).topk(near + 1, 2)
    # Relative to the highest far key: relative to a near one, all weights might vanish.
    chosen, highest = best.indices[..., :near], best.values[..., near:]
    # An exponential is never -0.0, which adds nothing and tells a near key from one without weight.
    weights = logs.sub_(highest).clamp_max_(0.0).exp_().scatter_(2, chosen, -0.0)
    tilted = d_v <= TILTED_COLUMNS
    features = [torch.ones_like(values[..., :1]), values, keys]
    features += [values[..., c : c + 1] * keys for c in range(d_v)] if tilted else []
    sums = product(weights.to(products), triton_kernels.widened(torch.cat(features, 2), 8).to(products))
    total = sums[..., :1].clamp_min(1e-30)
    far_value, far_key = sums[..., 1 : 1 + d_v] / total, sums[..., 1 + d_v : 1 + d_v + d] / total
    far_log = total.squeeze(2).log() + highest.squeeze(2) - 0.5 * (variances * far_key.square()).sum(2)
    log_weight = (deltas * tiles.of_queries(far_key)).sum(2) + tiles.of_queries(far_log)
    value = tiles.of_queries(far_value)
    if tilted:
        tilt = sums[..., 1 + d_v + d : 1 + d_v + d + d_v * d].unflatten(2, (d_v, d)) / total.unsqueeze(3)
        tilt = tilt - far_value.unsqueeze(3) * far_key.unsqueeze(2)
        value = value + (deltas.unsqueeze(2) * tiles.of_queries(tilt)).sum(3)
    return Expansion(
        *(tiles, queries, centres, deltas, keys, values, chosen, weights, total),
        *(log_weight, value, far_key, tilted),
        (deltas.square() * spread).sum(2),
    )


def sums_of_keys(
    e: Expansion, listed: torch.Tensor, extra: torch.Tensor | None, products: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of exp(q.k + extra) times v and 1 over the listed keys (batch, clusters, m) of each query's cluster.

    Shapes (batch, n, d_v) and (batch, n), both divided by exp of the third, (batch, n).
    """
    of_tiles = e.tiles.queries, e.tiles.clusters, e.centres
    return triton_kernels.listed(e.queries, *of_tiles, e.keys, e.values.to(products), listed, extra)


def exactly_where_lost(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Recompute exactly the rows of out (batch, n_q, d_v) that are not finite.

    By a matrix product: in the kernel each few rows would walk all keys alone.
    """
    lost = ~out.isfinite().all(2)
    if bool(lost.any()):
        again = int(lost.sum())
        count(kernel_evaluations=again * k.shape[1], recomputed_rows=again)
        for entry in lost.any(1).nonzero().flatten().tolist():
            keys, values = k[entry].float(), v[entry].float()
            for rows in lost[entry].nonzero().flatten().split(max(1, _EXACT_LOGITS // len(keys))):
                weights = (scale * q[entry, rows].float() @ keys.mT).softmax(1)
                out[entry, rows] = (weights @ values).to(out.dtype)
    return out
