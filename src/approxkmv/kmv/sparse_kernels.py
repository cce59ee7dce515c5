"""Point sets whose kernel satisfies assumption (A) at every n, for tests and for the cost study."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Points(NamedTuple):
    """Queries and keys with the bandwidth at which their kernel is sparse."""

    queries: np.ndarray
    keys: np.ndarray
    sigma: float


def background(n: int, seed: int = 0, d: int = 32) -> Points:
    """Gaussian points, each its own query: a diagonal of ones over n^2 entries of mean 1/n.

    >>> background(64).keys.shape
    (64, 32)

    For independent standard Gaussians E exp(-|p - q|^2 / 2 sigma^2) = (1 + 2 / sigma^2)^(-d/2); sigma is chosen to make
    this 1/n, so c of assumption (A) is about 1 at every n, and nearly all of the tail is light.
    """
    points = np.random.default_rng([seed, 1]).standard_normal((n, d))
    return Points(points, points, math.sqrt(2.0 / (n ** (2.0 / d) - 1.0)))


def clusters(n: int, seed: int = 0, d: int = 6) -> Points:
    """Clusters of 8 keys with queries near them: heavy keys and almost no tail.

    >>> clusters(64).queries.shape
    (64, 6)

    The centres spread as n^(1/d), so the number of nearby clusters does not grow.
    """
    rng = np.random.default_rng([seed, 2])
    count = -(-n // 8)
    centres = 3.5 * n ** (1.0 / d) * rng.standard_normal((count, d))
    keys = (centres[:, None, :] + 0.25 * rng.standard_normal((count, 8, d))).reshape(-1, d)[:n]
    queries = keys[rng.permutation(n)] + 0.3 * rng.standard_normal((n, d))
    return Points(queries, keys, 0.9)


def even_spread(n: int, seed: int = 0, d: int = 3) -> Points:
    """Points of constant density in a box that grows with n: entries of every size, row sums that do not grow.

    >>> even_spread(64).keys.shape
    (64, 3)
    """
    rng = np.random.default_rng([seed, 3])
    side = (n / 2.0) ** (1.0 / d)
    return Points(side * rng.random((n, d)), side * rng.random((n, d)), 0.55)


SPARSE_KERNELS: dict[str, Callable[[int, int], Points]] = {
    "background": background,
    "clusters": clusters,
    "even spread": even_spread,
}
