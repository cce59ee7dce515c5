"""Heavy keys by search in DiskANN's Vamana graph, light keys by uniform sampling (DEANN's estimator).

Inner products are searched as distances between the points of Lemma 4.1.
"""

from __future__ import annotations

import torch

from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.attention.searched.deann import estimate
from approxkmv.attention.searched.lazy_gumbel import products_of_pairs
from approxkmv.kernels import reduce_attention


def sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    *,
    near: int,
    samples: int,
    degree: int,
    alpha: float,
    construction: int,
    breadth: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numerators (n_q, d_v), row sums (n_q,) and the logs (n_q,) that both are divided by, for scaled queries."""
    from approxkmv.search.vamana import build

    near = min(near, len(k))
    reduced = reduce_attention(q, k, 1.0)
    queries, keys = torch.as_tensor(reduced.queries), torch.as_tensor(reduced.keys)
    graph = build(keys, alpha=alpha, degree=degree, beam=construction, generator=generator)
    found = graph.search(queries, near, breadth).keys
    rows = torch.arange(len(q)).repeat_interleave(near)
    logits = products_of_pairs(q, k, rows, found.flatten().clamp_min(0)).view(-1, near)
    return estimate(q, k, v, found, logits.masked_fill_(found < 0, -torch.inf), samples, generator)


def _vamana(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    near: int,
    **parameters: float,
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"vamana runs on a CPU only, not on {q.device.type}")

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if near >= len(k):
            return exact_fused.attend(q, k, v, scale, 512)
        # Attention does not change when all keys move together, and the graph is of their distances.
        numerators, row_sums, _ = sums(
            q * scale, k - k.mean(0), v, generator, near=near, **parameters  # type: ignore[arg-type]
        )  # fmt: skip
        return numerators / row_sums.unsqueeze(1)

    return per_batch(single, q, k, v, seed)


method = Method(
    name="vamana",
    compute=_vamana,
    summary="neighbours from DiskANN's graph exactly, the rest by uniform sampling (DEANN's estimator)",
    defaults={"near": 64, "samples": 128, "degree": 24, "alpha": 1.05, "construction": 32, "breadth": 64},
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
