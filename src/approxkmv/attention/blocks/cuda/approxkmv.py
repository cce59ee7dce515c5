"""ApproxKMV on CUDA: the estimator of `approxkmv`, all of it in a CUDA graph.

A block takes at most twice the average number of samples, since memory is allocated for no more; products are in
float32, since rounding them would introduce a bias.
"""

from __future__ import annotations

from typing import Any

import torch

from approxkmv.attention.blocks.cuda.expansion import (
    TILE,
    Expansion,
    clustering_for,
    count_clustering,
    exactly_where_lost,
    expand,
    most_tiles,
    product,
    sums_of_keys,
)
from approxkmv.attention.blocks.expansion import Clustering
from approxkmv.attention.blocks.light_keys import CONTROLLED, LEAST_SAMPLES, trusted
from approxkmv.attention.blocks.reach import beyond_reach
from approxkmv.attention.kernels import cuda_graphs
from approxkmv.attention.kernels import triton as triton_kernels
from approxkmv.compute.counting import count


def random_inputs(
    q: torch.Tensor, block: int, samples: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The query (1,) that k-means starts from, and uniform numbers (batch, blocks, most samples of a block)."""
    batch, n_q = q.shape[:2]
    blocks = -(-n_q // block)
    room = 2 * samples if blocks > 1 else samples
    points = torch.rand(batch, blocks, room, generator=generator, device=q.device, dtype=torch.float64)
    return torch.randint(block, (1,), generator=generator, device=q.device), points


def budgets(e: Expansion, row_sums: torch.Tensor, scales: torch.Tensor, samples: int) -> torch.Tensor:
    """Samples (batch, clusters, 1) per cluster, about `samples` on average, as in `light_keys.budgets`."""
    # A row whose sum is not a number counts as all light; it is recomputed exactly at the end.
    share = torch.sigmoid(e.log_weight - scales - row_sums.log()).nan_to_num(1.0)
    s = e.variances.clamp_max(10.0)
    deviation = e.tiles.means((share.square() * (s.exp() - 1 - s)).unsqueeze(2)).sqrt()
    average = (deviation * e.tiles.counts.unsqueeze(2)).sum(1, keepdim=True) / share.shape[1]
    counts = torch.where(average > 1e-30, samples * deviation / average, float(samples))
    return counts.clamp(min(LEAST_SAMPLES, samples), 2 * samples).round()


def sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    points: torch.Tensor,
    *,
    clustering: Clustering,
    scale: float,
    samples: int,
    with_own_keys: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numerators (batch, n_q, d_v + 1), row sums (batch, n_q) and logs (batch, n_q), as on a CPU.

    Numerators and row sums are divided by exp(log). first and points: see `random_inputs`. with_own_keys: key i is
    query i's own and is summed exactly.
    """
    e = expand(q, k, v, first, clustering, scale=scale, products=torch.float32)
    batch, clusters = e.chosen.shape[:2]
    n_k, d_v = v.shape[1:]
    room = points.shape[2]
    heavy, heavy_sums, scales = sums_of_keys(e, e.chosen, None, torch.float32)
    counts = budgets(e, heavy_sums, scales, samples)

    # Half of a light key's probability is proportional to its weight, the other half uniform.
    even = 0.5 / (n_k - e.chosen.shape[2])
    probability = (0.5 * e.weights / e.total + even).scatter_(2, e.chosen, 0.0)
    heights = probability.double().cumsum(2)
    whole = heights[..., -1:]
    # right: a near key, whose interval is empty, is never drawn.
    drawn = torch.searchsorted(heights, points * whole, right=True).clamp_max(n_k - 1)
    taken = torch.arange(room, device=q.device) < counts
    rate = counts * (probability.gather(2, drawn) / whole.float())
    logs = torch.where(taken, -rate.log(), -torch.inf)
    control = torch.where(taken, e.weights.gather(2, drawn) / e.total / rate, 0.0)
    estimate, estimate_sums, estimate_scales = sums_of_keys(e, drawn, logs, torch.float32)

    def of_drawn(per_key: torch.Tensor) -> torch.Tensor:
        at = drawn.view(batch, -1, 1).expand(-1, -1, per_key.shape[2])
        return per_key.gather(1, at).view(batch, clusters, room, -1)

    # The control variate, where it reduces the noise: the far key's sums minus the same sums over the sample.
    weighed = control.unsqueeze(3) * of_drawn(torch.cat([torch.ones_like(e.values[..., :1]), e.values], 2))
    means = e.tiles.of_queries(weighed.sum(2))
    tilts = 1 + d_v if e.tilted else 1
    centred = of_drawn(e.keys) - e.far_key.unsqueeze(2)
    leans = product(weighed[..., :tilts].mT.flatten(0, 1), centred.flatten(0, 1)).unflatten(0, (batch, clusters))
    leaning = (e.deltas.unsqueeze(2) * e.tiles.of_queries(leans)).sum(3)

    own = e.own_keys() if with_own_keys else None
    shift = torch.maximum(scales, e.log_weight)
    shift = shift if own is None else torch.maximum(shift, own.log)
    exact, light = (scales - shift).exp(), (estimate_scales - shift).exp()
    weight = torch.where(e.variances < CONTROLLED, (e.log_weight - shift).exp(), 0.0)
    row_sums = heavy_sums * exact + estimate_sums * light
    parts = row_sums + weight * (1 + means[..., 0] + leaning[..., 0].abs())
    row_sums = row_sums + weight * (1 - means[..., 0] - leaning[..., 0])
    value = e.value - leaning[..., 1:] if e.tilted else e.value * (1 - leaning)
    numerators = heavy * exact.unsqueeze(2) + estimate * light.unsqueeze(2)
    numerators = numerators + weight.unsqueeze(2) * (value - means[..., 1:])
    if own is not None:
        # The sum of 1 / (counts p) over the block's draws of the row's own key
        met = torch.zeros_like(e.weights).scatter_add_(2, drawn, logs.exp())
        left = torch.where(own.log > -torch.inf, 1 - e.own(met), 0.0)
        added = (own.log - shift).exp()
        row_sums = row_sums + left * (added - weight * own.share_seen)
        parts = parts + left.abs() * (added + weight * own.share_seen.abs())
        counted = weight * (own.share_seen if e.tilted else own.share)
        numerators = numerators + (left * (added - counted)).unsqueeze(2) * e.values
        if not e.tilted:
            numerators = numerators + (left * weight * (own.share - own.share_seen)).unsqueeze(2) * e.value
    known = heavy_sums.log() + scales
    known = known if own is None else torch.logaddexp(known, own.log)
    lost = beyond_reach(e.variances, known, e.log_weight, n_k - e.chosen.shape[2])
    row_sums = torch.where(lost, torch.nan, row_sums)
    return torch.cat([numerators, parts.unsqueeze(2)], 2), row_sums, shift


def steps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *random: torch.Tensor, **parameters: Any) -> torch.Tensor:
    """The method, without sizes or branches that depend on the data; NaN in rows to be recomputed exactly."""
    mean = v.float().mean(1, keepdim=True)
    numerators, row_sums, _ = sums(q, k, v - mean, *random, **parameters)
    numerators, row_sums = trusted(numerators, row_sums)
    return numerators / row_sums.unsqueeze(2) + mean


@torch.no_grad()
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    samples: int,
    **given: int,
) -> torch.Tensor:
    """ApproxKMV of q (batch, n_q, d), k (batch, n_k, d), v (batch, n_k, d_v) on their device, without gradients.

    given: a `Clustering`, whose directions are ignored, since all axes fit.
    """
    batch, n_q, _ = q.shape
    n_k = k.shape[1]
    clustering = clustering_for(given, n_q, n_k)
    if clustering is None:
        count(kernel_evaluations=batch * n_q * n_k)
        return triton_kernels.exact(q, k, v, scale)
    generator = torch.Generator(q.device).manual_seed(seed)
    first, points = random_inputs(q, clustering.block, samples, generator)
    near, (_, blocks, room) = clustering.near, points.shape
    own = n_q if n_q == n_k else 0
    count(kernel_evaluations=batch * (blocks * n_k + TILE * most_tiles(n_q, blocks) * (near + room) + n_q + own))
    count_clustering(batch, n_q, blocks, clustering.iterations, clustering.sampled)
    own_keys = n_q == n_k
    settings = {"clustering": clustering, "scale": scale, "samples": samples, "with_own_keys": own_keys}
    with triton_kernels.on_device(q.device):
        out = cuda_graphs.replayed(steps, [q, k, v, first, points], settings)
        return exactly_where_lost(out, q, k, v, scale).to(v.dtype)
