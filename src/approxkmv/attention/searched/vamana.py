"""Heavy keys from DiskANN's Vamana graph, light keys by uniform sampling (DEANN's estimator).

Inner products are searched as distances between the points of Lemma 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from approxkmv.attention.causal import Sums
from approxkmv.attention.contract import Method
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.attention.searched.deann import estimate
from approxkmv.attention.searched.lazy_gumbel import products_of_pairs
from approxkmv.kernels import reduce_attention


@dataclass(frozen=True)
class Parameters:
    """Keys found per query, keys of the shared sample, and the graph's parameters: see `search.vamana.build`."""

    near: int = 64
    samples: int = 128
    degree: int = 24
    alpha: float = 1.05
    construction: int = 32
    breadth: int = 64


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,), for scaled queries; sums are divided by exp(log)."""
    from approxkmv.search.vamana import build

    near = parameters.near
    if near >= len(k):
        return exact_fused.sums(q, k, v)
    # Attention is invariant to a common shift of the keys, and the graph uses their distances.
    mean = k.mean(0)
    k = k - mean
    reduced = reduce_attention(q, k, 1.0)
    queries, keys = torch.as_tensor(reduced.queries), torch.as_tensor(reduced.keys)
    graph = build(
        keys, alpha=parameters.alpha, degree=parameters.degree, beam=parameters.construction, generator=generator
    )
    found = graph.search(queries, near, parameters.breadth).keys
    rows = torch.arange(len(q)).repeat_interleave(near)
    logits = products_of_pairs(q, k, rows, found.flatten().clamp_min(0)).view(-1, near)
    logits.masked_fill_(found < 0, -torch.inf)
    numerators, row_sums, logs = estimate(q, k, v, found, logits, parameters.samples, generator)
    return numerators, row_sums, logs + q @ mean


method = Method.from_sums(
    "vamana",
    sums,
    Parameters,
    cpu_only=True,
    summary="neighbours from DiskANN's graph exactly, the rest by uniform sampling (DEANN's estimator)",
    grid=[
        {"near": 8, "samples": 32, "degree": 12, "construction": 16, "breadth": 8},
        {"near": 16, "samples": 64, "degree": 12, "construction": 16, "breadth": 16},
        {"near": 32, "samples": 64, "degree": 16, "construction": 24, "breadth": 32},
        {"near": 32, "samples": 256, "degree": 16, "construction": 24, "breadth": 32},
        {"near": 64, "samples": 256},
        {"near": 128, "samples": 512, "breadth": 128},
        {"near": 256, "samples": 512, "degree": 32, "construction": 48, "breadth": 256},
        {"near": 512, "samples": 1024, "degree": 32, "construction": 48, "breadth": 512},
    ],
)
