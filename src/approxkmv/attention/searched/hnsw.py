"""Heavy keys by search in a hierarchical navigable small-world graph, light keys by uniform sampling.

The index is that of Malkov & Yashunin (2018), the estimator DEANN's.
"""

from __future__ import annotations

import torch

from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.attention.searched.deann import estimate


def sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    *,
    near: int,
    samples: int,
    links: int,
    construction: int,
    breadth: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numerators (n_q, d_v), row sums (n_q,) and the logs (n_q,) that both are divided by, for scaled queries."""
    from approxkmv.search.indexes import HNSWIndex

    index = HNSWIndex(k, links, construction, breadth)
    index.add(0, len(k))
    found, logits = index.search(q, min(near, len(k)))
    return estimate(q, k, v, found, logits, samples, generator)


def _hnsw(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, near: int, **parameters: int
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"hnsw runs on a CPU only, not on {q.device.type}")

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if near >= len(k):
            return exact_fused.attend(q, k, v, scale, 512)
        # Attention does not change when all keys move together, and the graph is of their distances.
        numerators, row_sums, _ = sums(q * scale, k - k.mean(0), v, generator, near=near, **parameters)
        return numerators / row_sums.unsqueeze(1)

    return per_batch(single, q, k, v, seed)


method = Method(
    name="hnsw",
    compute=_hnsw,
    summary="neighbours from a small-world graph exactly, the rest by uniform sampling (DEANN's estimator)",
    defaults={"near": 64, "samples": 128, "links": 12, "construction": 32, "breadth": 64},
    grid=[
        {"near": 8, "samples": 32, "links": 6, "construction": 16, "breadth": 8},
        {"near": 16, "samples": 64, "links": 6, "construction": 16, "breadth": 16},
        {"near": 32, "samples": 64, "links": 8, "construction": 24, "breadth": 32},
        {"near": 32, "samples": 256, "links": 8, "construction": 24, "breadth": 32},
        {"near": 64, "samples": 256},
        {"near": 128, "samples": 512, "breadth": 128},
        {"near": 256, "samples": 512, "links": 16, "construction": 40, "breadth": 256},
        {"near": 512, "samples": 1024, "links": 16, "construction": 40, "breadth": 512},
    ],
)
