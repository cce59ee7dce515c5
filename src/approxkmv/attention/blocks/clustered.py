"""Keys in k-means clusters: those near a block of queries exactly, each far cluster as its centroid.

A far cluster of m keys with mean c and mean value u counts as m keys at c with value u. By Jensen's inequality that is
less than the sum over its keys, so the estimate is biased; it is exact if clusters are single points.
With a number of clusters proportional to sqrt(n) the cost is n^1.5 d, up to constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from approxkmv.attention.blocks.grouping import block_size, make_blocks
from approxkmv.attention.blocks.k_means import k_means
from approxkmv.attention.blocks.near_keys import sums_of_keys
from approxkmv.attention.blocks.reach import REACH, beyond_reach, stand_apart, variances_of, with_keys_apart, without
from approxkmv.attention.contract import Method
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.attention.exact.fused import exactly_where_lost
from approxkmv.compute.counting import count

_ITERATIONS = 3
# Points per cluster used in Lloyd's iterations; the last assignment uses all points.
_SAMPLED = 16


def members(labels: torch.Tensor, clusters: torch.Tensor, counts: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The keys of each row's clusters, row by row, and where each row ends.

    labels (n_k,) is the cluster of each key, counts (C,) the number of keys of each, clusters (rows, p).
    """
    order = labels.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    chosen = clusters.flatten()
    sizes = counts[chosen]
    ends = sizes.cumsum(0)
    place = torch.arange(int(ends[-1])) - (ends - sizes).repeat_interleave(sizes)
    keys = order[starts[chosen].repeat_interleave(sizes) + place]
    return keys.numpy(), ends.view(clusters.shape)[:, -1].numpy()


@dataclass(frozen=True)
class Parameters:
    """Average queries per block; clusters per sqrt(n_k); clusters that a block meets exactly."""

    block: int = 64
    clusters: float = 1.0
    near: int = 4


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters, scale: float
) -> torch.Tensor:
    """The method for one batch entry: float32 q (n_q, d), k (n_k, d), v (n_k, d_v) to (n_q, d_v)."""
    number = min(len(k), math.ceil(parameters.clusters * math.sqrt(len(k))))
    block = block_size(parameters.block, len(q), len(k))
    if parameters.near >= number or block == 1:
        return exact_fused.attend(q, k, v, scale)
    whole = q, k, v
    apart = stand_apart(q, k, scale)
    k, v = without(k, apart), without(v, apart)
    number = min(number, len(k))
    # Attention is invariant to a common shift of the keys, and products lose fewer digits around their mean.
    mean = k.mean(0)
    queries, keys = q * scale, k - mean
    labels = k_means(keys, number, _ITERATIONS, _SAMPLED, generator)
    # Drop clusters that lost all their keys.
    _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), keys.shape[1] + v.shape[1]).index_add_(0, labels, torch.cat([keys, v], 1))
    centroids, values = (sums / counts.unsqueeze(1)).split([keys.shape[1], v.shape[1]], 1)

    of_queries = k_means(queries, -(-len(q) // block), _ITERATIONS, _SAMPLED, generator)
    blocks = make_blocks(queries, 1.0, queries, torch.ones(queries.shape[1]), of_queries, 1)
    log_counts = counts.float().log()
    ranks = torch.addmm(log_counts, blocks.centres, centroids.mT)
    nearest = ranks.topk(min(parameters.near, len(counts)), 1, sorted=False).indices
    chosen, ends = members(labels, nearest, counts)
    exact, scales = sums_of_keys(blocks, k, mean, v, chosen, ends)

    rows = blocks.deltas + blocks.of_rows(blocks.centres)
    far = torch.addmm(log_counts, rows, centroids.mT)
    count(kernel_evaluations=far.numel(), other_products=ranks.numel())
    far.masked_fill_(blocks.of_rows(torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, nearest, True)), -torch.inf)
    row_scale = blocks.of_rows(scales)
    # One shift for both parts, so that neither overflows.
    shift = torch.maximum(row_scale, far.amax(1))
    far.sub_(shift.unsqueeze(1)).exp_()
    exact *= (row_scale - shift).exp_().unsqueeze(1)
    far_sums = far.sum(1)
    rest = (blocks.of_queries(t) for t in (exact[:, 1:] + far @ values, exact[:, 0] + far_sums, shift))
    numerators, row_sums, _ = with_keys_apart(tuple(rest), apart, *whole, mean, scale)  # type: ignore[arg-type]
    # Out of reach: too far from the block's centre for its exponentials, or logits too spread out within a cluster
    some = slice(None, None, max(1, len(keys) // 512))
    within = (keys[some] - centroids[labels[some]]).square().mean(0)
    out_of_block = blocks.deltas.square() @ variances_of(keys) > REACH
    out_of_clusters = beyond_reach(rows.square() @ within, exact[:, 0].log(), far_sums.log(), len(counts))
    row_sums[blocks.of_queries(out_of_block | out_of_clusters)] = torch.nan
    return exactly_where_lost(numerators / row_sums.unsqueeze(1), *whole, scale)


method = Method.from_masked(
    "clustered",
    attend,
    Parameters,
    causal=False,
    cpu_only=True,
    summary="k-means clusters of keys: near ones exactly, far ones as their centroids",
    grid=[
        {"block": 128, "clusters": 0.5, "near": 1},
        {"block": 64, "clusters": 1.0, "near": 2},
        {"block": 64, "clusters": 1.0, "near": 4},
        {"block": 64, "clusters": 2.0, "near": 8},
        {"block": 64, "clusters": 2.0, "near": 16},
        {"block": 32, "clusters": 2.0, "near": 32},
        {"block": 32, "clusters": 4.0, "near": 64},
        {"block": 32, "clusters": 4.0, "near": 128},
    ],
)
