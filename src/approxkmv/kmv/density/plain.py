"""Densities from all points, the reference, or from a uniform sample of them."""

from __future__ import annotations

import numpy as np

from approxkmv.kmv import inputs
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.density.base import KernelDensity, log_kernel_values, row_blocks


class ExactDensity(KernelDensity):
    """The mean kernel value itself.

    >>> ExactDensity(1.0).fit(np.zeros((4, 2))).query(np.zeros((3, 2)))
    array([1., 1., 1.])

    Args:
        sigma: the bandwidth. seed: ignored; the result is deterministic.
    Raises:
        InputError: sigma not positive, a mismatched width, query before fit.
    """

    def _estimate(self, queries: np.ndarray) -> np.ndarray:
        blocks = row_blocks(len(queries), len(self.points), self.block_entries)
        means = [np.exp(log_kernel_values(queries[rows], self.points)).mean(1) for rows in blocks]
        pairs = len(queries) * len(self.points)
        self.tally += Tally(pairs, pairs)
        return np.concatenate(means)


class UniformDensity(KernelDensity):
    """The mean over points drawn uniformly with replacement; the median of several such means.

    >>> UniformDensity(1.0, samples=10, seed=0).fit(np.zeros((4, 2))).query(np.zeros((3, 2)))
    array([1., 1., 1.])

    Unbiased for one average; the relative variance is at most 1 / (samples * mu), hence the cost 1 / (beta^2 mu).

    Args:
        sigma: the bandwidth. samples: in one average. averages: their number, of which the median is taken.
        seed: for a reproducible answer.
    Raises:
        InputError: an argument that is not positive, a mismatched width, query before fit.
    Source: the baseline of section 1.2.
    """

    def __init__(self, sigma: float, *, samples: int, averages: int = 1, seed: int | None = None) -> None:
        super().__init__(sigma, seed)
        self.samples = inputs.count(samples, "samples")
        self.averages = inputs.count(averages, "averages")

    def _build(self) -> None:
        self._chosen = self._rng(0).integers(0, len(self.points), (self.averages, self.samples))

    def _estimate(self, queries: np.ndarray) -> np.ndarray:
        distinct, place = np.unique(self._chosen, return_inverse=True)
        place = place.reshape(self._chosen.shape)
        out = np.empty(len(queries))
        for rows in row_blocks(len(queries), max(self._chosen.size, len(distinct)), self.block_entries):
            values = np.exp(log_kernel_values(queries[rows], self.points[distinct]))
            out[rows] = np.median(values[:, place].mean(2), axis=1)
        self.tally += Tally(len(queries) * self._chosen.size, len(queries) * len(distinct))
        return out
