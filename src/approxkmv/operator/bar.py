"""How far an approximate product is off, from a random sample of its rows computed exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch

# With contributions spread over fewer rows than this (their participation ratio), the sample does not tell their sum.
LEAST_SPREAD = 16.0


@dataclass(frozen=True)
class ErrorBar:
    """Estimates of Frobenius norms over all rows."""

    error: float
    """Of Kx - y."""
    bound: float | None
    """The error's upper confidence bound, None if the sample does not give one."""
    answer: float
    """Of Kx."""
    least_answer: float
    """Its lower confidence bound."""


def proposal(doubts: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Probabilities (n_q,) with which rows are drawn, with replacement.

    A mixture: a third uniform over the rows that are not known, a third in proportion to their doubts, and a third
    to the squares of these.

    Args:
        doubts: (n_q,) predicted sizes of the rows' errors. known: indices of rows that are never drawn.
    """
    uniform = torch.ones_like(doubts, dtype=torch.float64)
    uniform[known] = 0
    sizes = (doubts.double() * uniform).nan_to_num(0.0, 0.0, 0.0)
    parts = [uniform, sizes, sizes.square()]
    shares = [part / part.sum() if float(part.sum()) > 0 else uniform / uniform.sum() for part in parts]
    return torch.stack(shares).mean(0).float().cpu()


def error_bar(
    y: torch.Tensor, exact: torch.Tensor, rows: torch.Tensor, probabilities: torch.Tensor, doubt: float
) -> ErrorBar:
    """The error of y (n_q, m), from rows drawn with these probabilities and their exact values (some, m).

    The bound fails with a probability of about `doubt` if what the sample sees is what there is: the contributions
    |Kx - y|_i^2 / p_i of the drawn rows have a finite variance to which no rarely drawn rows add much. It is the mean's
    upper limit by a Cornish-Fisher expansion, which allows for skewness. Where few rows make up the sum, which is how
    errors concentrated in rows that are rarely drawn show if they show at all, or where no error is seen, there is no
    bound.
    """
    p = probabilities.double()[rows.cpu()]
    exact, seen = exact.double().cpu(), y[rows].double().cpu()
    contributions = (exact - seen).square().sum(1) / p
    mean, limit = float(contributions.mean()), _upper(contributions, doubt)
    spread = float(contributions.sum() ** 2 / contributions.square().sum().clamp_min(1e-300))
    # The norm of the answer is that of y, corrected by the sample.
    corrections = (exact.square() - seen.square()).sum(1) / p
    squared = float(y.double().square().sum()) + float(corrections.mean())
    bound = math.sqrt(limit) if spread >= LEAST_SPREAD else None
    # By the triangle inequality, or by the sample where that says more.
    size = float(y.double().norm())
    least = max(0.0, size - (bound or size), math.sqrt(max(0.0, size**2 - _upper(-corrections, doubt))))
    return ErrorBar(math.sqrt(mean), bound, math.sqrt(max(0.0, squared)), least)


def _upper(values: torch.Tensor, doubt: float) -> float:
    z, n = NormalDist().inv_cdf(1 - doubt), len(values)
    centred = values - values.mean()
    variance = float(centred.square().mean()) * n / max(1, n - 1)
    skew = float(centred.pow(3).mean()) / variance if variance > 0 else 0.0
    return float(values.mean()) + z * math.sqrt(variance / n) + max(0.0, skew) * (1 + 2 * z * z) / (6 * n)
