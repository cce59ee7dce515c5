"""DEANN's estimator (Karppa, Aumüller & Pagh 2022): exact over the found neighbours, a uniform sample of the rest.

However the neighbours were found, numerators and row sums are unbiased given them: a key counts either as a neighbour
or through the sample, never both, and the sample is uniform over the rest.
"""

from __future__ import annotations

import torch

from approxkmv.attention.kernels.exponentials import exp_
from approxkmv.compute.counting import count

_ROWS = 512  # queries per step: products with the sample then stay in the cache


def estimate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    found: torch.Tensor,
    logits: torch.Tensor,
    samples: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,): both sums are divided by exp(log).

    Args:
        q, k, v: (n_q, d), (n_k, d), (n_k, d_v) float32, the queries scaled.
        found: (n_q, h) distinct keys for each query, -1 if fewer were found.
        logits: (n_q, h) their products with the query, -inf if there is no key.
        samples: keys in the sample, which all queries share; with all keys the sums are exact.
        generator: draws the sample.
    """
    n_k = len(k)
    drawn = torch.randperm(n_k, generator=generator, device=k.device)[:samples]
    m = len(drawn)
    place = torch.full((n_k + 1,), m, device=k.device)
    place[drawn] = torch.arange(m, device=k.device)
    drawn_k, drawn_v = k[drawn], v[drawn]
    parts = []
    for i in range(0, len(q), _ROWS):
        here, heavy, some = found[i : i + _ROWS], logits[i : i + _ROWS], q[i : i + _ROWS]
        light = some @ drawn_k.mT
        count(kernel_evaluations=heavy.numel() + light.numel())
        # -1 is the last entry of `place`, which no key has; the column beyond the sample takes keys outside it.
        both = torch.zeros(len(some), m + 1, dtype=torch.bool, device=k.device).scatter_(1, place[here], True)[:, :m]
        light.masked_fill_(both, -torch.inf)
        rest = n_k - (here >= 0).sum(1)
        left = m - both.sum(1)
        shift = torch.maximum(heavy.amax(1), light.amax(1)) if m else heavy.amax(1)
        # However many they are, samples that are not neighbours are a uniform sample of the rest.
        weight = rest / left.clamp_min(1)
        light = exp_(light.sub_(shift.unsqueeze(1))).mul_(weight.unsqueeze(1))
        heavy = exp_(heavy - shift.unsqueeze(1))
        row_sums = heavy.sum(1) + light.sum(1)
        numerators = _weighted_sums(v, here, heavy) + light @ drawn_v
        lost = ((left == 0) & (rest > 0)).nonzero().squeeze(1)
        if len(lost) and m:
            _add_own_samples(lost, some, k, v, here, m, shift, numerators, row_sums, generator)
        parts.append((numerators, row_sums, shift))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _weighted_sums(v: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums (n, d_v) of each row's weights (n, h) times the values of its keys (n, h)."""
    return torch.nn.functional.embedding_bag(keys.clamp_min(0), v, per_sample_weights=weights, mode="sum")


def _add_own_samples(
    lost: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    found: torch.Tensor,
    samples: int,
    shift: torch.Tensor,
    numerators: torch.Tensor,
    row_sums: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Draw a separate sample from the rest, with replacement, for queries whose neighbours include the whole sample."""
    free = torch.ones(len(lost), len(k) + 1, device=k.device)
    free.scatter_(1, found[lost].where(found[lost] >= 0, len(k)), 0.0)
    free = free[:, :-1]
    own = torch.multinomial(free, samples, replacement=True, generator=generator)
    logits = torch.einsum("nd,nmd->nm", q[lost], k[own])
    count(kernel_evaluations=logits.numel())
    higher = torch.maximum(shift[lost], logits.amax(1))
    fade = exp_(shift[lost] - higher)
    weights = exp_(logits - higher.unsqueeze(1)) * (free.sum(1) / samples).unsqueeze(1)
    numerators[lost] = numerators[lost] * fade.unsqueeze(1) + _weighted_sums(v, own, weights)
    row_sums[lost] = row_sums[lost] * fade + weights.sum(1)
    shift[lost] = higher
