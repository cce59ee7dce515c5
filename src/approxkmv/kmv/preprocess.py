"""Split off the large and small entries of x: Definition 3.1 and Lemma 3.2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from approxkmv.kmv.constants import PRINTED, PaperConstants


@dataclass(frozen=True)
class Split:
    """x rescaled to |x|_2^2 = n and split by size. The three sorted index sets partition the keys."""

    scaled: np.ndarray
    """(n,): x * sqrt(n) / |x|_2, or zeros where x = 0."""
    norm_factor: float
    """|x|_2 / sqrt(n): multiplying by it undoes the rescaling. May be 0."""
    large: np.ndarray
    """H_1: scaled^2 >= n^gamma. Their columns are evaluated exactly. At most n^(1 - gamma) of them."""
    small: np.ndarray
    """H_2: rounded to zero."""
    kept: np.ndarray
    """T: the others, whose squares lie in (n^-4, n^gamma)."""


def split(x: np.ndarray, *, gamma: float, epsilon: float, constants: PaperConstants = PRINTED) -> Split:
    """Rescale x to |x|_2^2 = n and split off its large and small entries.

    >>> parts = split(np.array([0.0, 1.0, 1.0, 1.0, 10.0]), gamma=0.109, epsilon=0.5)
    >>> parts.large, parts.small, parts.kept
    (array([4]), array([0]), array([1, 2, 3]))

    Dropping H_2 costs at most n * n^-2 = 1/n per row, and |x|_2 / n in total (the printed proof says n^-3: it forgets
    the square root). To stay below epsilon / 4 for every epsilon, the bound n^-4 is lowered to n^-2 (epsilon / 4)^2
    when n < 4 / epsilon.

    Args:
        x: (n,) float64. gamma: entries with x_j^2 >= n^gamma are large. epsilon: of the guarantee.
    Returns:
        A Split.
    Source: Definition 3.1, Lemma 3.2 and its proof in A.2, which assume |x|_2^2 = n; here x is rescaled.
    """
    n = len(x)
    largest = float(np.abs(x).max())
    if largest == 0.0:
        nothing = np.empty(0, dtype=np.intp)
        return Split(np.zeros(n), 0.0, nothing, np.arange(n), nothing)
    # Divide by the largest entry first, so that squares neither overflow nor underflow.
    unit = x / largest
    norm = float(np.linalg.norm(unit))
    scaled = unit * (np.sqrt(n) / norm)
    square = scaled**2
    bound = float(n) ** -constants.small_exponent * min(1.0, epsilon * n / 4.0) ** 2
    large = square >= float(n) ** gamma
    small = (square <= bound) & ~large
    # |x| / sqrt(n) in this order: |x| alone may overflow when the factor does not.
    factor = largest * (norm / math.sqrt(n))
    return Split(scaled, factor, np.flatnonzero(large), np.flatnonzero(small), np.flatnonzero(~large & ~small))
