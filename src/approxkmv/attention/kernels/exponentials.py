"""Exponentials as small as float32 multiplies fast: with subnormal numbers a product takes up to 150 times as long."""

from __future__ import annotations

import torch

# exp of it is 1.8e-35: its product with a value of 0.001 or more is still a normal number, of which the smallest is
# 1e-38. torch's own exp, too, is many times slower where its result is subnormal or 0.
LOWEST = -80.0
_SMALLEST = 2e-35


def flushed_(weights: torch.Tensor) -> torch.Tensor:
    """weights, in place, with 0 for those below 2e-35; a NaN stays."""
    return torch.threshold_(weights, _SMALLEST, 0.0)


def exp_(logits: torch.Tensor) -> torch.Tensor:
    """exp(logits) in place, and 0 for those below -80 or so; a NaN stays.

    Beside a row's largest term, if that is 1, n terms that were dropped are less than n 2e-35.
    """
    return flushed_(logits.clamp_min_(LOWEST).exp_())


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """softmax over the last axis, with 0 for weights below 2e-35."""
    return flushed_(logits.softmax(-1))
