"""Locality-sensitive hashing with the near property of Lemma 2.1: ball carving, and p-stable projections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cache

import numpy as np
import torch

from approxkmv.errors import InputError
from approxkmv.kmv import inputs

FAMILIES = ("p-stable", "ball-carving")

# A point not covered after this many grids would be a bug, not bad luck.
_GRID_LIMIT = 10_000_000


class HashFamily(ABC):
    """A distribution over functions h: R^d -> integers whose collision probability falls with distance.

    `collision_probability(distance)` is the family's collision curve over the choice of h; `draw(d, tables, rng)` draws
    independent functions and returns an object whose `codes(points)` is (tables, n) in uint64. Points collide if their
    codes are equal.
    """

    concatenation: int
    """The number of elementary functions concatenated in one h."""

    @abstractmethod
    def collision_probability(self, distance: np.ndarray | float) -> np.ndarray:
        """Probability over h that two points at this distance collide."""

    @abstractmethod
    def draw(self, d: int, tables: int, rng: np.random.Generator) -> HashTables:
        """Independent functions for points in d dimensions."""


class HashTables(ABC):
    """Functions h_1..h_T drawn from a family."""

    @abstractmethod
    def codes(self, points: np.ndarray) -> np.ndarray:
        """(tables, n) codes in uint64 of points (n, d)."""

    @abstractmethod
    def bytes_per_point(self) -> int:
        """Temporary bytes needed to hash one point."""


def _mix(parts: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """One 64-bit code from integers (..., k): a random linear form, which merges unequal tuples once in 2^60."""
    return (parts.astype(np.int64).view(np.uint64) * multipliers).sum(-1, dtype=np.uint64)


def _odd(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, 2**63, shape, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


class PStableHash(HashFamily):
    """floor((<a, p> + b) / width) with Gaussian a; `concatenation` such functions form one hash.

    >>> family = PStableHash(width=4.0, concatenation=2)
    >>> family.draw(3, 5, np.random.default_rng(0)).codes(np.zeros((7, 3))).shape
    (5, 7)
    >>> family.collision_probability(0.0).item()
    1.0

    Args:
        width: of the cells, in the unit of the points. concatenation: functions concatenated into one.
    Raises:
        InputError: a width or concatenation that is not positive.
    Source: Datar, Immorlica, Indyk & Mirrokni (2004), 2-stable case.
    """

    def __init__(self, width: float, concatenation: int = 1) -> None:
        self.width = inputs.positive(width, "width")
        self.concatenation = inputs.count(concatenation, "concatenation")

    def collision_probability(self, distance: np.ndarray | float) -> np.ndarray:
        """[1 - 2 Phi(-r) - 2 (1 - exp(-r^2/2)) / (r sqrt(2 pi))]^concatenation with r = width / distance."""
        distances = np.asarray(distance, dtype=np.float64)
        with np.errstate(divide="ignore", over="ignore"):
            r = self.width / distances
        near = np.isinf(r) | (r > 1e8)
        ratio = np.where(near, 1.0, r)
        inside = torch.erf(torch.from_numpy(np.atleast_1d(ratio) / math.sqrt(2))).numpy().reshape(ratio.shape)
        edge = -np.expm1(-0.5 * ratio**2) * math.sqrt(2 / math.pi) / ratio
        # Far away r^2 underflows: use r / sqrt(2 pi), the difference of the two terms to first order.
        single = np.where(near, 1.0, np.where(ratio < 1e-4, ratio / math.sqrt(2 * math.pi), inside - edge))
        return np.clip(single, 0.0, 1.0) ** self.concatenation

    def draw(self, d: int, tables: int, rng: np.random.Generator) -> HashTables:
        """See HashFamily."""
        return _PStableTables(self, d, tables, rng)


class _PStableTables(HashTables):
    def __init__(self, family: PStableHash, d: int, tables: int, rng: np.random.Generator) -> None:
        self._shape = (tables, family.concatenation)
        self._directions = rng.standard_normal((d, tables * family.concatenation)) / family.width
        self._offsets = rng.random(tables * family.concatenation)
        self._multipliers = _odd(rng, self._shape)

    def codes(self, points: np.ndarray) -> np.ndarray:
        cells = points @ self._directions
        cells += self._offsets
        np.floor(cells, out=cells)
        # Cells beyond 2^62 would not fit the integer; such points are alone in their cells anyway.
        np.clip(cells, -(2.0**62), 2.0**62, out=cells)
        return np.ascontiguousarray(_mix(cells.reshape(len(points), *self._shape), self._multipliers).T)

    def bytes_per_point(self) -> int:
        return 32 * self._shape[0] * self._shape[1]


class BallCarvingHash(HashFamily):
    """The family of Lemma 2.1: project, carve space into balls, and name the first ball that covers the point.

    >>> family = BallCarvingHash(radius=2.0, dimension=3)
    >>> family.draw(8, 5, np.random.default_rng(0)).codes(np.zeros((7, 8))).shape
    (5, 7)

    Grids of balls of this radius, with cells of 4 radii, are shifted at random one after the other; a point's code is
    the first grid that covers it and the ball there. Two points are separated at the first ball that covers only one of
    them, so at a given projected distance they collide with probability |intersection| / |union| of two balls. A grid
    covers a fraction V_t / 4^t of space: 20 % at t = 2, 6.5 % at 3, 1.9 % at 4, 0.03 % at 7, so a large t (the paper
    has ln^(2/3) n) is expensive.

    Args:
        radius: of the balls, in the unit of the points. dimension: t, of the projection. concatenation: functions
        concatenated into one.
    Raises:
        InputError: an argument that is not positive, or a dimension above 8, where a grid covers 1 point in 16,000.
    Source: Andoni & Indyk (2006, 2008), as stated in Claim 19 of Charikar, Kapralov, Nouri & Siminelakis (2020).
    """

    def __init__(self, radius: float, dimension: int, concatenation: int = 1) -> None:
        self.radius = inputs.positive(radius, "radius")
        self.dimension = inputs.count(dimension, "dimension")
        if self.dimension > 8:
            raise InputError(f"dimension is {dimension}: above 8 a grid of balls covers too little space")
        self.concatenation = inputs.count(concatenation, "concatenation")

    def collision_probability(self, distance: np.ndarray | float) -> np.ndarray:
        """E[I / (2 - I)]^concatenation, I the overlap of two balls at a chi-distributed projected distance."""
        distances = np.asarray(distance, dtype=np.float64)
        lengths, weights = _chi_quadrature(self.dimension)
        half = distances[..., None] * lengths / (2.0 * self.radius)
        share = _shared_ball(np.minimum(half, 1.0), self.dimension)
        return np.clip((share / (2.0 - share)) @ weights, 0.0, 1.0) ** self.concatenation

    def draw(self, d: int, tables: int, rng: np.random.Generator) -> HashTables:
        """See HashFamily."""
        return _BallTables(self, d, tables, rng)


class _BallTables(HashTables):
    def __init__(self, family: BallCarvingHash, d: int, tables: int, rng: np.random.Generator) -> None:
        self._tables, self._joined, self._t = tables, family.concatenation, family.dimension
        functions = tables * family.concatenation
        # Lengths are in units of the grid's cell, 4 radii; the projection preserves squared lengths in expectation.
        unit = 1.0 / (4.0 * family.radius * math.sqrt(family.dimension))
        self._directions = rng.standard_normal((d, functions * family.dimension)) * unit
        self._multipliers = _odd(rng, (functions, family.dimension + 1))
        self._joiners = _odd(rng, (tables, family.concatenation))
        self._rng = rng
        self._shifts = np.empty((0, functions, family.dimension))

    def _shift(self, grid: int) -> np.ndarray:
        # Drawn on demand and kept, so that every point meets the same grids in the same order.
        while grid >= len(self._shifts):
            more = self._rng.random((64, *self._shifts.shape[1:]))
            self._shifts = np.concatenate([self._shifts, more])
        return self._shifts[grid]

    def codes(self, points: np.ndarray) -> np.ndarray:
        functions, n = self._tables * self._joined, len(points)
        places = (points @ self._directions).reshape(n * functions, self._t)
        names = np.empty(n * functions, dtype=np.uint64)
        open_ = np.arange(n * functions)
        function = np.tile(np.arange(functions), n)
        for grid in range(_GRID_LIMIT):
            moved = places - self._shift(grid)[function]
            centre = np.rint(moved)
            moved -= centre
            covered = np.einsum("pt,pt->p", moved, moved) <= 1.0 / 16.0
            if covered.any():
                hit = function[covered]
                key = np.concatenate([centre[covered], np.full((len(hit), 1), float(grid))], 1)
                names[open_[covered]] = _mix(np.clip(key, -(2.0**62), 2.0**62), self._multipliers[hit])
                left = ~covered
                places, open_, function = places[left], open_[left], function[left]
                if not len(open_):
                    break
        joined = (names.reshape(n, self._tables, self._joined) * self._joiners).sum(-1, dtype=np.uint64)
        return np.ascontiguousarray(joined.T)

    def bytes_per_point(self) -> int:
        return self._tables * self._joined * (8 * 5 * self._t + 48)


@cache
def _chi_quadrature(t: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for E f(sqrt(chi^2_t / t))."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    top = math.sqrt(t) + 9.0
    r = 0.5 * top * (nodes + 1.0)
    log_density = (1 - t / 2) * math.log(2) - math.lgamma(t / 2) + (t - 1) * np.log(r) - 0.5 * r**2
    return r / math.sqrt(t), 0.5 * top * weights * np.exp(log_density)


@cache
def _shared_ball_table(t: int) -> tuple[np.ndarray, np.ndarray]:
    """The overlap of two unit balls in R^t whose centres are 2a apart, for angles a = sin(angle)."""
    angle = np.linspace(0.0, math.pi / 2, 20001)
    height = np.cos(angle) ** t
    area = np.concatenate([[0.0], np.cumsum(0.5 * (height[1:] + height[:-1]))])
    return angle, 1.0 - area / area[-1]


def _shared_ball(half_distance: np.ndarray, t: int) -> np.ndarray:
    angle, share = _shared_ball_table(t)
    return np.interp(np.arcsin(half_distance), angle, share)


@cache
def _unit_scale(name: str, t: int, probability: float) -> float:
    """The smallest width (or radius) at which points at distance 1 collide with at least this probability.

    The curves depend only on width / distance, so this works for every distance.
    """

    def collide(scale: float) -> float:
        family = PStableHash(scale) if name == "p-stable" else BallCarvingHash(scale, t)
        return float(family.collision_probability(1.0))

    low, high = 1e-12, 1.0
    while collide(high) < probability:
        high *= 2.0
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if collide(middle) < probability else (low, middle)
    # The small slack keeps "at least" true after rounding.
    return high * (1 + 1e-6)


def near_family(name: str, near: float, probability: float, *, n: int, concatenation: int | None = None) -> HashFamily:
    """The family in which points at distance `near` collide with at least this probability, and distant ones rarely.

    >>> near_family("p-stable", near=2.0, probability=0.1, n=1000).collision_probability(2.0).item() >= 0.1
    True

    For each number of concatenated functions the width is set to meet the probability. Of these the smallest number is
    chosen whose collisions at 2 near are within 10 % of the best, because each further function costs time and gains
    little.

    Args:
        name: "p-stable" or "ball-carving". near: r_near of Lemma 2.1. probability: n^-alpha there.
        n: number of keys, which sets t = ln^(2/3) n of ball carving, clamped to [2, 4] (above 4 a grid covers 0.5 % of
            space, and hashing costs more than all pairs).
        concatenation: overrides the choice above.
    Returns:
        A HashFamily with concatenation, and width or radius, set.
    Raises:
        InputError: an unknown name.
    Source: Lemma 2.1.
    """
    inputs.choice(name, "family", FAMILIES)
    t = min(4, max(2, round(math.log(max(n, 2)) ** (2 / 3))))

    def build(scale: float, joined: int) -> HashFamily:
        return PStableHash(scale, joined) if name == "p-stable" else BallCarvingHash(scale, t, joined)

    if near <= 0 or probability >= 1:
        # Only equal points must collide.
        return build(1.0, concatenation or 1)
    candidates: list[tuple[float, HashFamily]] = []
    for joined in [concatenation] if concatenation else range(1, 9):
        single = min(probability ** (1 / joined), 1 - 1e-9)
        family = build(near * _unit_scale(name, t, single), joined)
        candidates.append((float(family.collision_probability(2 * near)), family))
    best = min(far for far, _ in candidates)
    return next(family for far, family in candidates if far <= 1.1 * best)


def collisions(codes_q: np.ndarray, codes_k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For one table: the keys sorted by code, and the range of them that is each query's bucket.

    >>> order, low, high = collisions(np.array([5, 7], np.uint64), np.array([7, 5, 7], np.uint64))
    >>> (high - low).tolist()
    [1, 2]
    """
    order = np.argsort(codes_k, kind="stable")
    ordered = codes_k[order]
    return order, np.searchsorted(ordered, codes_q, "left"), np.searchsorted(ordered, codes_q, "right")


def mark_collisions(
    seen: np.ndarray, codes_q: np.ndarray, codes_k: np.ndarray, chunk: int = 1 << 20
) -> tuple[np.ndarray, np.ndarray]:
    """Set seen[i, j] where query i and key j share a bucket of one table; return (order, bucket sizes).

    Rows that are already full are skipped. If the buckets hold a large part of all pairs, all codes are compared, which
    is cheaper than listing the pairs.
    """
    order, low, high = collisions(codes_q, codes_k)
    sizes = high - low
    rows = np.flatnonzero((sizes > 0) & ~seen.all(1)) if sizes.sum() > seen.size // 16 else np.flatnonzero(sizes)
    total = np.cumsum(sizes[rows])
    if len(rows) and total[-1] > len(rows) * seen.shape[1] // 16:
        step = max(1, chunk // seen.shape[1])
        for part in range(0, len(rows), step):
            r = rows[part : part + step]
            seen[r] |= codes_q[r, None] == codes_k[None, :]
        return order, sizes
    start = 0
    while start < len(rows):
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + chunk, "right")))
        r = rows[start:stop]
        count = sizes[r]
        ends = np.cumsum(count)
        position = np.arange(ends[-1]) + np.repeat(low[r] - (ends - count), count)
        seen[np.repeat(r, count), order[position]] = True
        start = stop
    return order, sizes
