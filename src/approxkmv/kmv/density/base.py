"""The interface of kernel density estimators, and the median of averages that they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from approxkmv.errors import InputError
from approxkmv.kmv import inputs
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.gaussian import CANCELLATION, restore_digits


class KernelDensity(ABC):
    """Estimates mu(q), the mean over points p of exp(-|q - p|^2 / (2 sigma^2)).

    `fit(points)` takes the data set and returns the estimator; `query(queries)` returns one estimate per query;
    `tally` counts the cost of both so far.
    """

    block_entries = 1 << 22
    """Kernel values held at once; several float64 arrays of this size are in use."""

    def __init__(self, sigma: float, seed: int | None = None) -> None:
        self.sigma = inputs.positive(sigma, "sigma")
        self._source = inputs.seed_sequence(seed)
        self._points: np.ndarray | None = None
        self.tally = Tally()

    def fit(self, points: np.ndarray) -> KernelDensity:
        """Store the points (n, d) and build what does not depend on the queries."""
        # All estimators use coordinates in units of sigma sqrt(2), where log k = -|q - p|^2.
        self._points = self._in_bandwidths(points, "points")
        self._build()
        return self

    def query(self, queries: np.ndarray) -> np.ndarray:
        """Estimates (n_q,) for queries (n_q, d)."""
        return self._estimate(self._placed(queries))

    def _placed(self, queries: np.ndarray) -> np.ndarray:
        placed = self._in_bandwidths(queries, "queries")
        if placed.shape[1] != self.points.shape[1]:
            raise InputError(f"queries have width {placed.shape[1]}, but the fitted points {self.points.shape[1]}")
        return placed

    def _in_bandwidths(self, points: np.ndarray, name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            placed = inputs.matrix(points, name) / (self.sigma * math.sqrt(2))
        return inputs.bounded(placed, f"{name} / (sigma sqrt(2))", 1e150)

    @property
    def points(self) -> np.ndarray:
        """The fitted points in units of sigma sqrt(2)."""
        if self._points is None:
            raise InputError("this density has no points: call fit before query")
        return self._points

    def _build(self) -> None:  # noqa: B027
        """Build what does not depend on the queries. Does nothing unless overridden."""

    @abstractmethod
    def _estimate(self, queries: np.ndarray) -> np.ndarray:
        """Estimates for queries in the units of the points."""

    def _rng(self, *purpose: int) -> np.random.Generator:
        return inputs.generator(self._source, *purpose)


def log_kernel_values(queries: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n_q, n_p) log k = -|q - p|^2, at most 0, however far from the origin the points lie."""
    # Smaller norms cancel less; pairs whose digits are lost all the same are made from the points as given.
    centre = points.mean(0)
    q, p = queries - centre, points - centre
    query_norms, point_norms = (q**2).sum(1), (p**2).sum(1)
    logs = -np.maximum(query_norms[:, None] + point_norms[None, :] - 2.0 * q @ p.T, 0.0)
    largest = max(query_norms.max(), point_norms.max())
    if largest > CANCELLATION:
        restore_digits(logs, queries, points, largest)
    return logs


def row_blocks(rows: int, columns: int, entries: int) -> list[slice]:
    """Slices of rows such that a block has about this many entries."""
    step = max(1, entries // max(columns, 1))
    return [slice(s, min(s + step, rows)) for s in range(0, rows, step)]
