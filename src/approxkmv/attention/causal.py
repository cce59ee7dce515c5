"""Causal attention by recursion, for any method that can return its sums before they are divided.

The lower triangle of n queries and keys consists of two triangles of half the size and one full square below the
diagonal. Triangles are split until they are small enough to be exact; the squares are what a method approximates.
(Zandieh et al. 2023 and Han et al. 2024 split the mask in the same way.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from approxkmv.attention.kernels.exponentials import exp_
from approxkmv.compute.counting import count

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,): both sums are divided by exp(log)."""

EXACT_BELOW = 256
"""Triangles of at most this many queries are exact."""

SumsOfKeys = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator], Sums]
"""f(q, k, v, generator) for scaled float32 q (n_q, d), k (n_k, d), v (n_k, d_v), every query attending to every key."""


def exact_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool = False) -> Sums:
    """The sums of exp(q k^T) for scaled queries; if is_causal, over keys j <= i only for query i."""
    logits = q @ k.mT
    count(kernel_evaluations=logits.numel())
    if is_causal:
        future = torch.ones(logits.shape, dtype=torch.bool, device=q.device).triu_(1)
        logits.masked_fill_(future, -torch.inf)
    logs = logits.amax(1)
    weights = exp_(logits.sub_(logs.unsqueeze(1)))
    return weights @ v, weights.sum(1), logs


def merged(one: Sums, other: Sums) -> Sums:
    """The sums over the keys of both, for the same queries, relative to the larger of their logs."""
    logs = torch.maximum(one[2], other[2])
    fades = [exp_(part[2] - logs) for part in (one, other)]
    numerators = sum(part[0] * fade.unsqueeze(1) for part, fade in zip((one, other), fades, strict=True))
    row_sums = sum(part[1] * fade for part, fade in zip((one, other), fades, strict=True))
    return numerators, row_sums, logs  # type: ignore[return-value]


def causal_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, sums: SumsOfKeys, exact_below: int
) -> Sums:
    """Sums over the keys up to each query's own, with the squares below the diagonal computed by `sums`.

    Args:
        q, k, v: (n, d), (n, d), (n, d_v) float32, the queries scaled.
        sums: if it is unbiased, so are these sums; its logs must refer to the given keys, not to shifted ones.
        exact_below: triangles of at most this many queries are exact.
    """
    n = len(q)
    if n <= max(1, exact_below):
        return exact_sums(q, k, v, is_causal=True)
    half = n // 2
    first = causal_sums(q[:half], k[:half], v[:half], generator, sums, exact_below)
    square = sums(q[half:], k[:half], v[:half], generator)
    second = merged(causal_sums(q[half:], k[half:], v[half:], generator, sums, exact_below), square)
    return tuple(torch.cat(parts) for parts in zip(first, second, strict=True))  # type: ignore[return-value]


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    sums: SumsOfKeys,
    exact_below: int = EXACT_BELOW,
) -> torch.Tensor:
    """Causal attention (n, d_v): `causal_sums`, divided by `causal_answers`."""
    numerators, row_sums, _ = causal_sums(q, k, v, generator, sums, exact_below)
    return causal_answers(numerators, row_sums, q, k, v)


def causal_answers(
    numerators: torch.Tensor, row_sums: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """The quotients (n, d_v); a row whose estimated sum is not positive is computed exactly."""
    out = numerators / row_sums.unsqueeze(1)
    lost = (~((row_sums > 0) & out.isfinite().all(1))).nonzero().squeeze(1)
    count(recomputed_rows=len(lost))
    for i in lost.tolist():
        out[i] = (k[: i + 1] @ q[i]).softmax(0) @ v[: i + 1]
    return out
