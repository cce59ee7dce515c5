"""Attention to a uniform sample of the keys, the same for all queries."""

from __future__ import annotations

import math

import torch

from approxkmv.attention.causal import Sums, causal_attention, exact_sums
from approxkmv.attention.contract import Method, per_batch
from approxkmv.attention.kernels.exponentials import softmax
from approxkmv.compute.counting import count


def _uniform(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, samples: int
) -> torch.Tensor:
    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(k), (min(samples, len(k)),), generator=generator, device=k.device)
        count(kernel_evaluations=len(q) * len(chosen))
        return softmax((q * scale) @ k[chosen].mT) @ v[chosen]

    return per_batch(single, q, k, v, seed)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, samples: int
) -> torch.Tensor:
    def square(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> Sums:
        chosen = torch.randint(len(k), (min(samples, len(k)),), generator=generator, device=k.device)
        numerators, row_sums, logs = exact_sums(q, k[chosen], v[chosen])
        # Each key of the sample stands for as many as were left out.
        return numerators, row_sums, logs + math.log(len(k) / len(chosen))

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return causal_attention(q * scale, k, v, generator, square)

    return per_batch(single, q, k, v, seed)


method = Method(
    name="uniform",
    compute=_uniform,
    causal=_causal,
    summary="softmax over uniformly sampled keys, the same for all queries",
    defaults={"samples": 64},
    grid=[{"samples": 2**i} for i in range(3, 13)],
    trivial=True,
)
