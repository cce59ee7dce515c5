"""From attention to a Gaussian kernel: Lemma 4.1 of Indyk, Kapralov, Sheth & Wagner (ICLR 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from approxkmv.arrays import Array, queries_and_keys, resolve_scale
from approxkmv.compute.torch_state import plain_torch


@dataclass(frozen=True)
class AttentionReduction:
    """Points whose Gaussian kernel is the attention matrix up to one factor per row.

    exp(scale ⟨q_i, k_j⟩) = exp(log_row_scale_i) * exp(-|queries_i - keys_j|^2 / (2 sigma^2))
    """

    queries: Array
    """(..., n_q, d+1): q with a zero appended."""
    keys: Array
    """(..., n_k, d+1): k with sqrt(max_j |k_j|^2 - |k_j|^2) appended, so that all have the same norm."""
    log_row_scale: Array
    """(..., n_q): scale (|q_i|^2 + max_j |k_j|^2) / 2, the logarithm of the row's factor."""
    sigma: float
    """The bandwidth 1/sqrt(scale)."""


@plain_torch()
def reduce_attention(q: Array, k: Array, scale: float | None = None) -> AttentionReduction:
    """Turn attention into a Gaussian kernel (Lemma 4.1).

    >>> import torch
    >>> r = reduce_attention(torch.randn(12, 7, 64), torch.randn(12, 9, 64))
    >>> tuple(r.queries.shape), tuple(r.keys.shape), tuple(r.log_row_scale.shape), round(r.sigma, 3)
    ((12, 7, 65), (12, 9, 65), (12, 7), 2.828)

    The printed lemma lacks the factor 1/(2 sqrt(d)) in the two exponents in front of the sum; its proof and this
    code have it.

    Args:
        q: (..., n_q, d) queries. k: (..., n_k, d) keys. Torch tensors or NumPy arrays, any floating type.
        scale: the factor of the logits; None means 1/sqrt(d).
    Returns:
        An AttentionReduction in float64, of the same kind of array as q.
    Raises:
        InputError: shapes that do not fit, a non-finite value, a scale that is not positive.
    """
    queries, keys, back = queries_and_keys(q, k)
    s = resolve_scale(scale, queries.shape[-1])
    key_norms = keys.square().sum(-1)
    largest = key_norms.amax(-1, keepdim=True)
    lift = (largest - key_norms).sqrt()
    lifted_keys = torch.cat([keys, lift.unsqueeze(-1)], -1)
    lifted_queries = torch.cat([queries, queries.new_zeros((*queries.shape[:-1], 1))], -1)
    log_row_scale = 0.5 * s * (queries.square().sum(-1) + largest)
    return AttentionReduction(back(lifted_queries), back(lifted_keys), back(log_row_scale), 1.0 / math.sqrt(s))


@plain_torch()
def log_kernel(q: Array, k: Array, scale: float | None = None) -> Array:
    """Logarithm of the Gaussian kernel of Lemma 4.1.

    >>> import torch
    >>> tuple(log_kernel(torch.randn(12, 7, 64), torch.randn(12, 9, 64)).shape)
    (12, 7, 9)

    log K_ij = scale ⟨q_i, k_j⟩ - scale |q_i|^2 / 2 - scale max_j |k_j|^2 / 2. Kept as a logarithm because K itself
    underflows on real heads; the blank cells of the paper's Figure 2 are such underflows.

    Args:
        q: (..., n_q, d) queries. k: (..., n_k, d) keys. Torch tensors or NumPy arrays, any floating type.
        scale: the factor of the logits; None means 1/sqrt(d).
    Returns:
        (..., n_q, n_k) in float64, at most 0 and never -inf, of the same kind of array as q.
    Raises:
        InputError: shapes that do not fit, a non-finite value, a scale that is not positive.
    """
    queries, keys, back = queries_and_keys(q, k)
    s = resolve_scale(scale, queries.shape[-1])
    row = 0.5 * s * (queries.square().sum(-1, keepdim=True) + keys.square().sum(-1).amax(-1)[..., None, None])
    # Rounding can lift the entry of a query that equals the longest key slightly above 0.
    return back((s * (queries @ keys.mT) - row).clamp_max(0.0))
