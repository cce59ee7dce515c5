"""k-means on a sample of the points, with distances computed in pieces that fit the cache."""

from __future__ import annotations

import torch

from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.compute.counting import count
from approxkmv.compute.scratch import scratch


def k_means(
    points: torch.Tensor, clusters: int, iterations: int, sampled: int, generator: torch.Generator
) -> torch.Tensor:
    """Label (n,) of each of points (n, r): Lloyd's iterations on `sampled` points per cluster, then one on all."""
    loops = block_loops()

    def nearest(some: torch.Tensor) -> torch.Tensor:
        norms = centres.square().sum(1)
        count(other_products=len(some) * len(centres))
        labels = torch.empty(len(some), dtype=torch.int64)
        distances = scratch("distances", 512, len(centres))
        # In pieces, so that the distances stay in the cache.
        for i in range(0, len(some), 512):
            part = some[i : i + 512]
            here = torch.addmm(norms, part, centres.mT, alpha=-2, out=distances[: len(part)])
            if loops is not None:
                loops.clustering.nearest(here.numpy(), part.numpy(), labels[i : i + 512].numpy())
            else:
                torch.argmin(here, 1, out=labels[i : i + 512])
        return labels

    shuffled = torch.randperm(len(points), generator=generator)
    centres = points[shuffled[:clusters]]
    some = points[shuffled[: sampled * clusters]]
    for _ in range(iterations):
        labels = nearest(some)
        totals = torch.zeros_like(centres).index_add_(0, labels, some)
        counts = torch.bincount(labels, minlength=len(centres)).unsqueeze(1)
        centres = torch.where(counts > 0, totals / counts, centres)
    return nearest(points)
