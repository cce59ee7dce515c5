"""Density-constrained levels (Theorem 2.2): points sampled by their importance and found again by hashing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from approxkmv.errors import InputError
from approxkmv.kmv import inputs
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.density.base import KernelDensity, log_kernel_values, row_blocks
from approxkmv.kmv.hashing import HashFamily, collisions, mark_collisions, near_family


@dataclass(frozen=True)
class Level:
    """One shell of the kernel: 2^-(index+1) < k <= 2^-index (the last one: all k <= 2^-index)."""

    index: int
    rate: float
    """Probability of each point to be in the level's sample, for one repetition."""
    tables: int
    """Hash tables in which the sample is searched; 0 means that the sample is scanned."""
    family: HashFamily | None


class DensityLevels(KernelDensity):
    """Fast Gaussian kernel density estimation by density-constrained near neighbours.

    >>> levels = DensityLevels(1.0, relative_error=0.5, floor=0.01, failure=0.1, seed=0).fit(np.zeros((4, 2)))
    >>> bool(abs(levels.query(np.zeros((3, 2))) - 1.0).max() <= 0.5)
    True

    For a guess m of the density, the points with k near 2^-j are sampled at rate min(1, 2^-j / (n m)), and the samples
    near the query are found by hashing; each found sample counts k / rate. The relative variance is at most m / mu, so
    8 / beta^2 repetitions and a median suffice. The guess is halved from 1 until the estimate reaches it. While the
    density is below about m, at most 2^j n m points have k above 2^-j: this bound on the shells keeps their buckets
    small, and determines the hash functions here.

    If scanning a level's sample costs less than hashing for it (always, at sizes that fit on a computer) the sample is
    scanned; `recover` forces either.

    Args:
        sigma: the bandwidth. relative_error: beta. floor: mu; below it the answer is 0. failure: delta, of one query.
        recover: "auto", "scan" or "hash". family: "p-stable" or "ball-carving". seed: for a reproducible answer.
        repetition_factor: an average has this / beta^2 repetitions. median_factor: there are this * ln(guesses / delta)
        averages.
    Raises:
        InputError: an argument out of range, a mismatched width, query before fit.
    Source: Theorem 2.2; Charikar, Kapralov, Nouri & Siminelakis (2020). Departures: the repetitions of a level share
    their hash tables (each finds a sample with probability 1 - beta / 100 or more), and they are drawn as counts per
    point, which has the same distribution; points beyond the last shell are kept as a scanned uniform sample, so the
    estimate has no truncation bias.
    """

    def __init__(
        self,
        sigma: float,
        *,
        relative_error: float,
        floor: float,
        failure: float,
        recover: str = "auto",
        family: str = "p-stable",
        seed: int | None = None,
        repetition_factor: float = 8.0,
        median_factor: float = 8.0,
    ) -> None:
        super().__init__(sigma, seed)
        self.relative_error = inputs.positive(relative_error, "relative_error")
        self.floor = inputs.positive(floor, "floor")
        self.failure = inputs.positive(failure, "failure")
        if self.failure >= 1 or self.relative_error >= 1:
            raise InputError(f"relative_error {relative_error!r} and failure {failure!r} must both be below 1")
        self.recover = inputs.choice(recover, "recover", ("auto", "scan", "hash"))
        self.family = family
        self.guesses = max(1, math.ceil(math.log2(1.0 / self.floor)) + 1)
        self.repetitions = math.ceil(inputs.positive(repetition_factor, "repetition_factor") / self.relative_error**2)
        factor = inputs.positive(median_factor, "median_factor")
        self.averages = max(1, math.ceil(factor * math.log(self.guesses / self.failure)))
        self._plans: dict[tuple[float, int], list[Level]] = {}

    def least_evaluations(self) -> int:
        """A lower bound on evaluations per query: a repetition samples about one point of the first level."""
        return self.averages * self.repetitions

    def plan(self, guess: float) -> list[Level]:
        """The levels for one guess of the density, each with the cheaper way to search it."""
        n = len(self.points)
        if (guess, n) not in self._plans:
            shells = max(1, math.ceil(math.log2(4.0 / (self.relative_error * guess))))
            rates = [min(1.0, 2.0**-j / (n * guess)) for j in range(shells + 1)]
            levels = [self._search(j, rates[j], guess, shells) for j in range(shells)]
            self._plans[guess, n] = [*levels, Level(shells, rates[-1], 0, None)]
        return self._plans[guess, n]

    def _search(self, j: int, rate: float, guess: float, shells: int) -> Level:
        """Choose the functions whose tables and far collisions cost least, given how many points a shell may hold."""
        n = len(self.points)
        if self.recover == "scan":
            return Level(j, rate, 0, None)
        miss = min(self.failure, 0.01 * self.relative_error)
        near = math.sqrt((j + 1) * math.log(2))
        shell = np.arange(shells + 1)
        crowd = np.minimum(n, 2.0 ** (shell + 1) * n * guess) * rate
        distance = np.sqrt(shell * math.log(2))
        best: tuple[float, int, HashFamily | None] = (math.inf, 0, None)
        for joined in range(1, 7):
            # A probability of 1/2 per function keeps the curve steep; concatenation makes it steeper.
            family = near_family(self.family, near, 0.5**joined, n=n, concatenation=joined)
            tables = max(1, math.ceil(math.log(1 / miss) / float(family.collision_probability(near))))
            cost = tables * (1.0 + float(family.collision_probability(distance) @ crowd))
            if cost < best[0]:
                best = (cost, tables, family)
        if self.recover == "auto" and n * rate <= best[0]:
            return Level(j, rate, 0, None)
        return Level(j, rate, best[1], best[2])

    def query_at(self, queries: np.ndarray, guess: float) -> np.ndarray:
        """Estimates at one fixed guess of the density: unbiased for one average, for any guess."""
        return self._at_guess(self._placed(queries), inputs.positive(guess, "guess"), 0)

    def _estimate(self, queries: np.ndarray) -> np.ndarray:
        out = np.zeros(len(queries))
        waiting = np.arange(len(queries))
        for step in range(self.guesses):
            guess = 2.0**-step
            values = self._at_guess(queries[waiting], guess, step)
            last = step == self.guesses - 1
            # A density at the floor may be estimated as (1 - beta) times the floor, and must be reported.
            enough = values >= ((1 - self.relative_error) * self.floor if last else guess)
            out[waiting[enough]] = values[enough]
            waiting = waiting[~enough]
            if not len(waiting):
                break
        return out

    def _at_guess(self, queries: np.ndarray, guess: float, step: int) -> np.ndarray:
        sums = np.zeros((len(queries), self.averages))
        plan = self.plan(guess)
        for level in plan:
            rng = self._rng(step, level.index)
            counts = rng.binomial(self.repetitions, level.rate, (self.averages, len(self.points))).astype(np.float64)
            sampled = np.flatnonzero(counts.any(0))
            if not len(sampled):
                continue
            counts = counts[:, sampled]
            times = counts.sum(0)
            top, bottom = -level.index * math.log(2), -(level.index + 1) * math.log(2)
            if level is plan[-1]:
                bottom = -math.inf
            for rows in row_blocks(len(queries), len(sampled), self.block_entries):
                logs, asked, distinct = self._find(queries[rows], sampled, times, level)
                # The first shell includes k = 1: its upper end is closed.
                shell = (logs <= top) & (logs > bottom)
                sums[rows] += np.where(shell, np.exp(logs), 0.0) @ counts.T / level.rate
                hashed = level.tables * (logs.shape[0] + (len(sampled) if rows.start == 0 else 0))
                self.tally += Tally(asked, distinct, hashed)
        return np.median(sums, axis=1) / (self.repetitions * len(self.points))

    def _find(
        self, queries: np.ndarray, sampled: np.ndarray, times: np.ndarray, level: Level
    ) -> tuple[np.ndarray, int, int]:
        """log k of the samples that the level's search finds, +inf elsewhere; and asked and distinct evaluations."""
        if level.family is None:
            logs = log_kernel_values(queries, self.points[sampled])
            return logs, int(times.sum()) * len(queries), logs.size
        # The same tables for every block of queries: the generator is recreated from the level's seed.
        seed = self._rng(level.index, 1, 1)
        seen = np.zeros((len(queries), len(sampled)), dtype=bool)
        asked = 0.0
        for _ in range(level.tables):
            drawn = level.family.draw(queries.shape[1], 1, seed)
            codes_q, codes_p = drawn.codes(queries)[0], drawn.codes(self.points[sampled])[0]
            order, _ = mark_collisions(seen, codes_q, codes_p)
            _, low, high = collisions(codes_q, codes_p)
            running = np.concatenate([[0.0], np.cumsum(times[order])])
            asked += float((running[high] - running[low]).sum())
        i, j = np.nonzero(seen)
        difference = queries[i] - self.points[sampled][j]
        logs = np.full(seen.shape, math.inf)
        logs[i, j] = -np.einsum("pd,pd->p", difference, difference)
        return logs, int(asked), len(i)
