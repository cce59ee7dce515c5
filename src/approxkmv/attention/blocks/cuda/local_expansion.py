"""Local expansion on CUDA: near keys by a Triton kernel, far keys by `cuda.expansion`, all of it in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from approxkmv.attention.blocks.cuda import fused
from approxkmv.attention.blocks.cuda.expansion import (
    TILE,
    clustering_for,
    count_clustering,
    exactly_where_lost,
    expand,
    most_tiles,
    sums_of_keys,
)
from approxkmv.attention.blocks.expansion import Clustering
from approxkmv.attention.blocks.reach import beyond_reach
from approxkmv.attention.kernels import cuda_graphs
from approxkmv.attention.kernels import triton as triton_kernels
from approxkmv.compute.counting import count

# Log weights that exceed a row's near keys by more than this are not trusted, as on a CPU.
_LARGEST = 80.0


def steps(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    clustering: Clustering,
    *,
    scale: float,
    products: torch.dtype,
) -> torch.Tensor:
    """The method, without sizes or branches that depend on the data: float32 (batch, n_q, d_v), NaN where lost.

    first (1,) is the query from which k-means takes its first centres.
    """
    # Centred values keep a common offset out of the rounded products.
    mean = v.float().mean(1, keepdim=True)
    e = expand(q, k, v - mean, first, clustering, scale=scale, products=products)
    numerators, row_sums, scales = sums_of_keys(e, e.chosen, None, products)
    shift = torch.maximum(scales, e.log_weight)
    own = e.own_keys() if q.shape[1] == k.shape[1] else None
    if own is not None:
        shift = torch.maximum(shift, own.log)
    exact, weight = (scales - shift).exp(), (e.log_weight - shift).exp()
    numerators = numerators * exact.unsqueeze(2) + weight.unsqueeze(2) * e.value
    known = row_sums.log() + scales
    row_sums = row_sums * exact + weight
    if own is not None:
        # The exact own key replaces its share of the far key.
        added = (own.log - shift).exp()
        light = own.log > -torch.inf
        counted = added - weight * (own.share_seen if e.tilted else own.share)
        numerators = numerators + torch.where(light, counted, 0.0).unsqueeze(2) * e.values
        if not e.tilted:
            # The difference of the own key's two shares goes to the far value: a row's weights add up to one.
            numerators = numerators + (weight * (own.share - own.share_seen)).unsqueeze(2) * e.value
        row_sums = row_sums + torch.where(light, added - weight * own.share_seen, 0.0)
    # Far from its block's centre a row's far weight is unreliable: the row is recomputed exactly at the end.
    known = known if own is None else torch.logaddexp(known, own.log)
    lost = beyond_reach(e.variances, known, e.log_weight, k.shape[1] - e.chosen.shape[2])
    row_sums = torch.where((shift - scales < _LARGEST) & ~lost, row_sums, torch.nan)
    return numerators / row_sums.unsqueeze(2) + mean


@torch.no_grad()
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    products: str,
    **given: int,
) -> torch.Tensor:
    """Local expansion of q (batch, n_q, d), k (batch, n_k, d), v (batch, n_k, d_v) on their device, without gradients.

    The seed shifts the queries that k-means starts from. given: a `Clustering`, whose directions are ignored, since all
    axes are used.
    """
    batch, n_q, _ = q.shape
    n_k = k.shape[1]
    clustering = clustering_for(given, n_q, n_k)
    if clustering is None:
        count(kernel_evaluations=batch * n_q * n_k)
        return triton_kernels.exact(q, k, v, scale)
    near, blocks = clustering.near, -(-n_q // clustering.block)
    settings: dict[str, Any] = {"clustering": clustering, "scale": scale}
    first = torch.full((1,), seed % clustering.block, device=q.device)
    count_clustering(batch, n_q, blocks, clustering.iterations, clustering.sampled)
    if products != "float32" and fused.fits(n_k, q.shape[2], v.shape[2], near):
        count(kernel_evaluations=fused.evaluations(batch, n_q, n_k, blocks, near))
        with triton_kernels.on_device(q.device):
            out, lost = cuda_graphs.replayed(fused.steps, [q, k, v, first], settings)
            return exactly_where_lost(out, q, k, v, scale) if int(lost) else out
    settings["products"] = torch.float32 if products == "float32" else torch.bfloat16
    # All keys at the centres; near keys, the far key and the own key for each query, in as many tiles as there may be
    own = n_q if n_q == n_k else 0
    count(kernel_evaluations=batch * (blocks * n_k + TILE * most_tiles(n_q, blocks) * near + n_q + own))
    with triton_kernels.on_device(q.device):
        out = cuda_graphs.replayed(steps, [q, k, v, first], settings)
        return exactly_where_lost(out, q, k, v, scale).to(v.dtype)
