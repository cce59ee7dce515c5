"""What `compute.trial` times to decide how single products are computed."""

from __future__ import annotations

from functools import partial

import torch

from approxkmv.attention.searched.lazy_gumbel import products_of_pairs
from approxkmv.compute.trial import Runs, by_form


def pairs() -> Runs:
    """As many products of single queries and keys as a few thousand queries sample, by loops or library calls."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4096, 64, generator=generator)
    rows, keys = torch.randint(4096, (2, 1 << 16), generator=generator)
    run = partial(products_of_pairs, points, points, rows, keys)
    return by_form("attention.searched.trials.pairs", run, "compiled", "library")
