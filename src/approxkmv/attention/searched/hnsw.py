"""Heavy keys from a hierarchical navigable small-world graph, light keys by uniform sampling.

The index is that of Malkov & Yashunin (2018), the estimator is DEANN's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from approxkmv.attention.causal import Sums
from approxkmv.attention.contract import Method
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.attention.searched.deann import estimate


@dataclass(frozen=True)
class Parameters:
    """Keys found per query, keys of the shared sample, and the graph's parameters: see `search.indexes.HNSWIndex`."""

    near: int = 64
    samples: int = 128
    links: int = 12
    construction: int = 32
    breadth: int = 64


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,), for scaled queries; sums are divided by exp(log)."""
    from approxkmv.search.indexes import HNSWIndex

    if parameters.near >= len(k):
        return exact_fused.sums(q, k, v)
    # Attention is invariant to a common shift of the keys, and the graph uses their distances.
    mean = k.mean(0)
    keys = k - mean
    index = HNSWIndex(keys, parameters.links, parameters.construction, parameters.breadth)
    index.add(0, len(k))
    found, logits = index.search(q, parameters.near)
    numerators, row_sums, logs = estimate(q, keys, v, found, logits, parameters.samples, generator)
    return numerators, row_sums, logs + q @ mean


method = Method.from_sums(
    "hnsw",
    sums,
    Parameters,
    cpu_only=True,
    summary="neighbours from a small-world graph exactly, the rest by uniform sampling (DEANN's estimator)",
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
