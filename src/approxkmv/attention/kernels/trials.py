"""What `compute.trial` times to decide the precision of the library's flash attention."""

from __future__ import annotations

from functools import partial

import torch

from approxkmv.attention.kernels.flash import flash
from approxkmv.compute.trial import Runs


def flash_attention() -> Runs:
    """Flash attention with products of float32 or of bfloat16 numbers."""
    q = torch.randn(1, 1, 1024, 64, generator=torch.Generator().manual_seed(0))
    return {str(low)[6:]: partial(flash, 3 * (q.to(low),), 0.125) for low in (torch.float32, torch.bfloat16)}
