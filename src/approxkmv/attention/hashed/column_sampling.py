"""The probabilities with which columns of the attention matrix are sampled, by the norms of their values."""

from __future__ import annotations

import torch

from approxkmv.attention.causal import with_ones


def column_probabilities(v: torch.Tensor) -> torch.Tensor:
    """Sampling probabilities (n_k,), proportional to |[v, 1]_j| / |[v, 1]|_op + 1/n_k."""
    extended = with_ones(v)
    # In float64: in float32 LAPACK fails on some matrices whose columns differ greatly in length. On the CPU, since a
    # GPU takes milliseconds for so small a matrix.
    largest = torch.linalg.eigvalsh((extended.mT @ extended).double().cpu())[-1].clamp_min(1e-60).sqrt()
    share = extended.square().sum(1).sqrt() / float(largest) + 1.0 / len(v)
    return share / share.sum()
