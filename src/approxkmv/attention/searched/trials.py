"""What `compute.trial` times to decide how single products are computed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from approxkmv.attention.searched.lazy_gumbel import products_of_pairs
from approxkmv.compute.trial import Runs, forced


def pairs() -> Runs:
    """As many products of single queries and keys as a few thousand queries sample, by loops or library calls."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4096, 64, generator=generator)
    rows, keys = torch.randint(4096, (2, 1 << 16), generator=generator)

    def by(form: str) -> Callable[[], object]:
        def run() -> None:
            with forced({"attention.searched.trials.pairs": form}):
                products_of_pairs(points, points, rows, keys)

        return run

    return {form: by(form) for form in ("compiled", "library")}
