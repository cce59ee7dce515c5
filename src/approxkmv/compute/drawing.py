"""Indices drawn at random, from any number of them."""

from __future__ import annotations

import torch

# torch.multinomial refuses more categories.
_MOST = 1 << 24


def drawn(weights: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """`number` indices (int64) into weights (n,), with replacement, each in proportion to its weight.

    >>> drawn(torch.tensor([0.0, 2.0, 0.0]), 3, torch.Generator().manual_seed(0)).tolist()
    [1, 1, 1]

    Args:
        weights: at least 0, not all of them 0, on the generator's device.
    """
    # In float64: beside a float32 running sum small weights are rounded, or lost.
    wide = weights.double()
    if len(wide) <= _MOST:
        return torch.multinomial(wide, number, replacement=True, generator=generator)
    ends = wide.cumsum(0)
    at = ends[-1] * torch.rand(number, dtype=torch.float64, device=weights.device, generator=generator)
    return torch.searchsorted(ends, at, right=True)
