"""Each query's largest scores exactly, the other keys dropped: what a choice of keys can reach at best.

An oracle: it computes every score, which is what methods that choose keys want to avoid, and its time includes them.
If the dropped keys hold a share t of a row's sum, the row's error is at most 2 t times the largest norm of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from approxkmv.attention.contract import Method
from approxkmv.attention.kernels.exponentials import softmax
from approxkmv.compute.counting import count

_ROWS = 256  # queries whose scores are held at a time; in the causal form they share the search of earlier keys


@dataclass(frozen=True)
class Parameters:
    """Keys per query."""

    top: int = 256


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    _: torch.Generator,
    parameters: Parameters,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    """Float32 q (n_q, d), k (n_k, d), v (n_k, d_v) to (n_q, d_v); if is_causal, query i sees keys 0 to i."""
    parts = []
    for first in range(0, len(q), _ROWS):
        some = q[first : first + _ROWS] * scale
        n_k = first + len(some) if is_causal else len(k)
        scores = some @ k[:n_k].mT
        if is_causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(first + 1), -torch.inf)
        best, keys = scores.topk(min(parameters.top, n_k), 1, sorted=False)
        seen = sum(min(parameters.top, i + 1) for i in range(first, n_k)) if is_causal else best.numel()
        count(kernel_evaluations=seen, other_products=scores.numel() - seen)
        parts.append(torch.nn.functional.embedding_bag(keys, v[:n_k], per_sample_weights=softmax(best), mode="sum"))
    return torch.cat(parts)


method = Method.from_masked(
    "top-k",
    attend,
    Parameters,
    summary="each query's largest scores exactly, all scores computed: what a choice of keys can reach",
    seeded=False,
    grid=[{"top": 2**i} for i in range(3, 13)],
)
