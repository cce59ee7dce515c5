"""How many balls of half the radius cover a ball: the intrinsic dimension that graph search depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from approxkmv.arrays import Array, as_float64
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError

_QUANTILES = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)


@dataclass(frozen=True)
class DoublingDimension:
    """Bounds from the balls that were examined."""

    lower: float
    """log2 of the most points of a ball that are pairwise further apart than its radius.

    No ball of half the radius holds two of them, so the doubling dimension is at least this.
    """
    upper: float
    """log2 of the most balls of half the radius that a greedy cover used; no examined ball needs more."""
    aspect_ratio: float
    """The largest distance divided by the smallest non-zero one."""


@plain_torch()
def doubling_dimension(
    points: Array, *, centres: int | None = 64, generator: torch.Generator | None = None
) -> DoublingDimension:
    """Lower and upper bounds on the doubling dimension of points (n, d), Euclidean (Definition 5 of the lecture).

    >>> import torch
    >>> line = torch.arange(64.0).unsqueeze(1)
    >>> found = doubling_dimension(line, centres=None)
    >>> found.lower <= found.upper < 2.5
    True

    Args:
        points: at least two, not all equal; needs memory for n^2 distances.
        centres: examine balls around this many random points, at six radii each; None takes every point.
        generator: draws them.
    Raises:
        InputError: fewer than two different points, a coordinate that is not finite.
    """
    x = as_float64(points, "points").cpu()
    if x.ndim != 2:
        raise InputError(f"points have shape {tuple(x.shape)}: give (n, d)")
    if len(x) < 2 or bool((x == x[0]).all()):
        raise InputError("a doubling dimension needs at least two different points")
    # Choose a unit in which no square overflows float64
    x = x / x.abs().max()
    x = x - x[0]
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    chosen = torch.arange(len(x)) if centres is None else torch.randperm(len(x), generator=generator)[:centres]
    most_apart = most_balls = 1
    for centre in chosen.tolist():
        from_centre = distances[centre]
        for radius in from_centre.quantile(torch.tensor(_QUANTILES, dtype=x.dtype)).tolist():
            ball = (from_centre <= radius).nonzero().squeeze(1)
            inside = distances[ball][:, ball]
            most_apart = max(most_apart, _separated(inside, radius))
            most_balls = max(most_balls, _separated(inside, radius / 2))
    smallest = distances[distances > 0].min()
    return DoublingDimension(math.log2(most_apart), math.log2(most_balls), float(distances.max() / smallest))


def _separated(distances: torch.Tensor, gap: float) -> int:
    """Size of a greedy set of points further than `gap` apart; balls of that radius around them cover all points."""
    is_left = torch.ones(len(distances), dtype=torch.bool)
    count = 0
    while bool(is_left.any()):
        # Any order yields a maximal set.
        is_left &= distances[int(is_left.int().argmax())] > gap
        count += 1
    return count
