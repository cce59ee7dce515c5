"""q -> t q, k -> k / t: what changes in K but not in attention, and the error in K that attention tolerates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from approxkmv.arrays import Array, as_float64, is_number, queries_and_keys, resolve_scale
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# The error |out - exact|_2 / |v|_2 that the paper's A.1.4 allows attention.
TOLERANCE = 0.1
# The power iteration ends when the norm gains less than this in a step, or after this many steps.
SETTLED = 1e-6
STEPS = 100
# Between which factors lie: their squares times those of queries and keys do not overflow.
_LEAST, _MOST = 1e-10, 1e10


@dataclass(frozen=True)
class Gauge:
    """K of `heads` heads at several factors t; float64 arrays (heads, factors), logarithms natural."""

    ratio: np.ndarray
    """c at full length."""
    participation: np.ndarray
    """(sum r)^2 / sum r^2 of the row sums r: how many rows carry K."""
    log_largest_row: np.ndarray
    log_norm: np.ndarray
    """Of |K|_2: with an error of that size for each |x| = 1, y = 0 passes for Kx."""
    log_zero_for_ones: np.ndarray
    """Of |K1|_2 / sqrt(n): with that error y = 0 passes for K1."""
    log_sufficient: np.ndarray
    """Of an error of Kx, for each |x| = 1, that keeps attention within TOLERANCE."""
    log_bound: np.ndarray
    """Of one that does not: the largest that does is between half of this and this."""
    limit_ratio: np.ndarray
    """(heads,): c of the matrix A itself, which K becomes for t -> 0 but for a constant factor."""
    limit_participation: np.ndarray
    """(heads,)"""
    mean_error: np.ndarray
    """(heads,): |mean(v) - out|_2 / |v|_2, the mean being over the keys that a query sees: the error of the answer that
    does not look at queries and keys."""


@plain_torch()
def gauge(
    q: Array,
    k: Array,
    v: Array,
    scale: float | None = None,
    factors: Sequence[float] = FACTORS,
    *,
    mask: torch.Tensor | None = None,
) -> Gauge:
    """How c, the row sums, |K|_2 and the error that attention tolerates change with t, at which attention is the same.

    >>> g = gauge(torch.randn(12, 80, 64), torch.randn(12, 80, 64), torch.randn(12, 80))
    >>> g.ratio.shape, bool((g.log_sufficient <= g.log_bound).all())
    ((12, 7), True)

    Args:
        q, k: (heads, n, d) queries and keys. v: (heads, n) a column of values.
        scale: the factor of the logits; None means 1/sqrt(d). factors: the values of t.
        mask: (n, n) bool, True for the entries of K that exist, some in each row; None takes all.
    Raises:
        InputError: shapes that do not fit, non-finite values, a bad scale or factor or none, a column whose norm is 0
            or beyond float64, a mask that is no bool tensor, a row without entries.
    Source: docs/math.md, "The gauge".
    """
    factors = tuple(factors) if isinstance(factors, Iterable) else (factors,)
    queries, keys, _ = queries_and_keys(q, k)
    column = as_float64(v, "v")
    s = resolve_scale(scale, queries.shape[-1])
    if queries.ndim != 3 or keys.shape != queries.shape:
        raise InputError(f"q {tuple(queries.shape)} and k {tuple(keys.shape)} must both be (heads, n, d)")
    if not (factors and all(is_number(t) and _LEAST < t < _MOST for t in factors)):
        raise InputError(f"factors are {factors!r}: give at least one number, between {_LEAST:g} and {_MOST:g}")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool):
        raise InputError("mask must be a torch tensor of bool")
    size = column.norm(dim=-1)
    if column.shape != keys.shape[:-1] or not bool((size.isfinite() & (size > 0)).all()):
        raise InputError(
            f"v is {tuple(column.shape)}: it must be one column per head, {tuple(keys.shape[:-1])}, not 0, "
            "nor with squares beyond float64"
        )
    n = keys.shape[-2]
    seen = torch.ones(n, n, dtype=torch.bool) if mask is None else mask
    if seen.shape != (n, n) or not bool(seen.any(-1).all()):
        raise InputError(f"mask is {tuple(seen.shape)}: it must be ({n}, {n}), at least one key in each row")
    seen = seen.to(queries.device)
    logits = (s * (queries @ keys.mT)).masked_fill(~seen, -torch.inf)
    out = (logits.softmax(-1) @ column[..., None])[..., 0]
    # |out_i| / |v|, and what one row may cost (docs/math.md).
    share = out.abs() / size[:, None]
    root = math.sqrt(n)
    row_cost = (1.0 + root * share + TOLERANCE * root).log()
    largest_cost = (1.0 + root * share.amax(-1) + TOLERANCE * root).log()
    parts = []
    for t in factors:
        rows = 0.5 * s * t**2 * queries.square().sum(-1, keepdim=True)
        log_k = logits - rows - 0.5 * s / t**2 * keys.square().sum(-1).amax(-1)[:, None, None]
        sums = log_k.logsumexp(-1)
        allowed = math.log(TOLERANCE) + sums
        parts.append(
            [
                head_to_tail(log_k),
                participation(sums),
                sums.amax(-1),
                log_spectral_norm(log_k),
                0.5 * (2.0 * sums).logsumexp(-1) - math.log(root),
                allowed.amin(-1) - largest_cost,
                (allowed - row_cost).amin(-1),
            ]
        )
    mean = (seen.to(column.dtype) @ column[..., None])[..., 0] / seen.sum(-1)
    mean_error = (mean - out).norm(dim=-1) / size
    limit = head_to_tail(logits), participation(logits.logsumexp(-1)), mean_error
    columns = (torch.stack(column, -1) for column in zip(*parts, strict=True))
    return Gauge(*(np.asarray(part.cpu()) for part in (*columns, *limit)))


def head_to_tail(log_values: torch.Tensor) -> torch.Tensor:
    """c at full length from log K (heads, n, n): nothing is subtracted, so that a small tail keeps its digits."""
    flat = log_values.flatten(-2)
    head = flat.topk(log_values.shape[-2], -1)
    tail = flat.scatter(-1, head.indices, -torch.inf)
    return (tail.logsumexp(-1) - head.values.logsumexp(-1)).exp()


def participation(log_sums: torch.Tensor) -> torch.Tensor:
    """(sum r)^2 / sum r^2 from log r (heads, n): n for equal rows, 1 where one row carries all."""
    return (2.0 * log_sums.logsumexp(-1) - (2.0 * log_sums).logsumexp(-1)).exp()


def log_spectral_norm(log_values: torch.Tensor) -> torch.Tensor:
    """log |K|_2 from log K (heads, n, n) by power iteration on K^T K from ones: K has no negative entry."""
    largest = log_values.amax((-2, -1), keepdim=True)
    matrix = (log_values - largest).exp()
    x = matrix.new_ones(*matrix.shape[:-2], matrix.shape[-1], 1)
    norm = matrix.new_zeros(matrix.shape[:-2])
    for _ in range(STEPS):
        x = x / x.norm(dim=(-2, -1), keepdim=True)
        y = matrix @ x
        before, norm = norm, y.norm(dim=(-2, -1))
        if bool((norm - before <= SETTLED * norm).all()):
            break
        x = matrix.mT @ y
    return norm.log() + largest[..., 0, 0]
