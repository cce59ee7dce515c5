"""The constant answer mean(v), which an approximation must beat before its speed means anything."""

from __future__ import annotations

import torch

from approxkmv.attention.contract import Method


def _mean(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int) -> torch.Tensor:
    # Not a view: the sweep should time writing the answer, as for the other methods.
    return v.mean(1, keepdim=True).expand(-1, q.shape[1], -1).contiguous()


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int) -> torch.Tensor:
    counts = torch.arange(1, v.shape[1] + 1, dtype=torch.float32, device=v.device).unsqueeze(1)
    return (v.float().cumsum(1) / counts).to(v.dtype)


method = Method(name="mean", compute=_mean, causal=_causal, summary="every row is mean(v)", trivial=True, seeded=False)
