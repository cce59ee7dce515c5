"""What `compute.trial` times to decide the precision of exponents."""

from __future__ import annotations

from functools import partial

import torch

from approxkmv.compute.trial import Runs
from approxkmv.operator.exact import product
from approxkmv.operator.points import in_units


def exponents() -> Runs:
    """The exact product with exponents in float32 or in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    points = in_units(torch.randn(2048, 100, generator=generator), torch.randn(4096, 100, generator=generator), 10.0)
    x = torch.ones(4096, 1)
    return {str(low)[6:]: partial(product, points, x, low) for low in (torch.float32, torch.bfloat16)}
