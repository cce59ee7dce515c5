"""The hashing-based estimator: one random point of the query's bucket, weighted by its probability to be there."""

from __future__ import annotations

import math

import numpy as np

from approxkmv.kmv import inputs
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.density.base import KernelDensity
from approxkmv.kmv.hashing import HashFamily, PStableHash, collisions


class HashingBasedDensity(KernelDensity):
    """k(p, q) / Pr[h(p) = h(q)] * |bucket| / n for a random point p of the query's bucket, averaged over tables.

    >>> HashingBasedDensity(1.0, samples=20, seed=0).fit(np.zeros((4, 2))).query(np.zeros((3, 2)))
    array([1., 1., 1.])

    Unbiased for one average. With a collision probability near sqrt(k) its relative variance is about
    1 / (samples * sqrt(mu)), against 1 / (samples * mu) for a uniform sample.

    Args:
        sigma: the bandwidth. samples: tables in one average, one kernel evaluation each. averages: their number, of
        which the median is taken. scale: the expected density: the kernel value at which the default family collides
        with probability sqrt(k). family: another HashFamily, in units of sigma sqrt(2). seed: makes it reproducible.
    Raises:
        InputError: an argument out of range, a mismatched width, query before fit.
    Source: Charikar & Siminelakis (2017); the same estimator as in Backurs, Indyk & Wagner (2019) with other hashing.
    """

    def __init__(
        self,
        sigma: float,
        *,
        samples: int,
        averages: int = 1,
        scale: float = 0.01,
        family: HashFamily | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(sigma, seed)
        self.samples = inputs.count(samples, "samples")
        self.averages = inputs.count(averages, "averages")
        self.scale = inputs.fraction(scale, "scale")
        self.family = family or _square_root_family(max(self.scale, 1e-300))

    def _estimate(self, queries: np.ndarray) -> np.ndarray:
        n, d = self.points.shape
        out = np.zeros((self.averages, len(queries)))
        evaluated = 0
        for table in range(self.averages * self.samples):
            rng = self._rng(table)
            drawn = self.family.draw(d, 1, rng)
            order, low, high = collisions(drawn.codes(queries)[0], drawn.codes(self.points)[0])
            met = np.flatnonzero(high > low)
            size = (high - low)[met]
            point = order[low[met] + (rng.random(len(met)) * size).astype(np.int64)]
            difference = queries[met] - self.points[point]
            square = np.einsum("pd,pd->p", difference, difference)
            chance = self.family.collision_probability(np.sqrt(square))
            # Points that share a bucket at collision probability 0 are so far apart that their kernel is 0 too.
            weighed = np.divide(np.exp(-square), chance, out=np.zeros_like(square), where=chance > 0)
            out[table // self.samples, met] += weighed * size / n
            evaluated += len(met)
        self.tally += Tally(evaluated, evaluated, self.averages * self.samples * (n + len(queries)))
        return np.median(out / self.samples, axis=0)


def _square_root_family(scale: float) -> PStableHash:
    """Concatenated p-stable functions with p = sqrt(k) where k = scale, as close to exp(-distance^2 / 2) as can be."""
    distance = math.sqrt(max(-math.log(scale), 1e-6))
    joined = max(1, math.ceil(distance**2))
    single = math.exp(-0.5 * distance**2 / joined)
    low, high = 1e-9, 1e9
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if PStableHash(middle).collision_probability(distance) < single else (low, middle)
    return PStableHash(high, joined)
