"""Attention to a uniform sample of the keys, the same for all queries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from approxkmv.attention.causal import Sums, exact_sums
from approxkmv.attention.contract import Method


@dataclass(frozen=True)
class Parameters:
    """Keys in the sample."""

    samples: int = 64


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,), for scaled queries; sums are divided by exp(log)."""
    chosen = torch.randint(len(k), (min(parameters.samples, len(k)),), generator=generator, device=k.device)
    numerators, row_sums, logs = exact_sums(q, k[chosen], v[chosen])
    # Each key of the sample stands for as many as were left out.
    return numerators, row_sums, logs + math.log(len(k) / len(chosen))


method = Method.from_sums(
    "uniform",
    sums,
    Parameters,
    summary="softmax over uniformly sampled keys, the same for all queries",
    grid=[{"samples": 2**i} for i in range(3, 13)],
    trivial=True,
)
