"""The repeated subsampling of Algorithm 2, lines 8 and 9, drawn as counts or as single samples."""

from __future__ import annotations

import math

import numpy as np

# Above this many repetitions (2^62) counts no longer fit an integer. The budget then makes the average equal its
# expectation to within epsilon / sqrt(10), and the expectation is used instead.
REPETITION_LIMIT = 1 << 62
_TABLE_BITS = 12


class BinomialTable:
    """Fast draws from Binomial(repetitions, probability): how often each key survives.

    >>> BinomialTable(1000, 0.002).draw((2, 3), np.random.default_rng(0)).shape
    (2, 3)

    Tabulates the inverse distribution function over 4,096 equal steps of the uniform; in a step where it jumps, the
    function itself decides. So the distribution is binomial to float64, at a few nanoseconds per draw.

    Args:
        repetitions: at least 1. probability: in (0, 1].
    """

    def __init__(self, repetitions: int, probability: float) -> None:
        self._repetitions, self._probability = repetitions, probability
        mean = repetitions * probability
        self._direct = mean > 1e4 or probability >= 1.0
        if self._direct:
            return
        spread = math.sqrt(mean)
        self._low = max(0, math.floor(mean - 10 * spread - 10))
        high = min(repetitions, math.ceil(mean + 12 * spread + 40))
        k = np.arange(self._low, high, dtype=np.float64)
        # Ratios of neighbouring probabilities avoid gamma functions of large arguments and their cancellation.
        odds = math.log(probability) - math.log1p(-probability)
        steps = np.log((repetitions - k) / (k + 1.0)) + odds
        log_mass = np.concatenate([[0.0], np.cumsum(steps)])
        mass = np.exp(log_mass - log_mass.max())
        self._cumulative = np.cumsum(mass)
        self._cumulative /= self._cumulative[-1]
        size = 1 << _TABLE_BITS
        jumps = np.ceil(self._cumulative * size).astype(np.int64)
        below = np.cumsum(np.bincount(jumps, minlength=size + 1))
        # below[b] counts the jumps at or before step b: the value at the left end of step b.
        self._values = (below[:-1] + self._low).astype(np.float64)
        self._values[below[1:] != below[:-1]] = -1.0

    def draw(self, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Independent counts of this shape, as float64."""
        if self._direct:
            return rng.binomial(self._repetitions, self._probability, shape).astype(np.float64)
        size = 1 << _TABLE_BITS
        step = rng.integers(0, size, shape, dtype=np.uint16)
        counts = self._values[step]
        open_ = np.nonzero(counts < 0)
        uniform = (step[open_] + rng.random(len(open_[0]))) / size
        counts[open_] = np.searchsorted(self._cumulative, uniform, "right") + self._low
        return counts


def averages_of_counts(
    values: np.ndarray, repetitions: int, averages: int, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Averages of n * (sum of the surviving values), computed from how many times each key survives.

    >>> averages_of_counts(np.ones(50), 10**6, 3, 50, np.random.default_rng(0))[0].round()
    array([50., 50., 50.])

    The average of R repetitions of "each key survives with probability 1/n" is n / R * sum_j values_j C_j with
    independent C_j from Binomial(R, 1/n): the same distribution, with one evaluation per key. Keys of value 0 do not
    affect the average, so only their total count is drawn.

    Args:
        values: (L,) contributions x_j K_ij of the light keys. repetitions: R. averages: their number.
        n: of the survival probability 1/n and of the factor n. rng: the random numbers.
    Returns:
        (averages,), and the number of survivors: the kernel evaluations that the algorithm asks for.
    Source: Algorithm 2, lines 8 and 9.
    """
    if repetitions >= REPETITION_LIMIT:
        return np.full(averages, values.sum()), averages * repetitions * len(values) // n
    weight = values[values != 0.0]
    silent = (len(values) - len(weight)) * averages * repetitions
    asked = survivors(silent, n, rng)
    if not len(weight):
        return np.zeros(averages), asked
    counts = BinomialTable(repetitions, 1.0 / n).draw((averages, len(weight)), rng)
    return counts @ weight * (n / repetitions), asked + int(counts.sum())


def survivors(trials: int, n: int, rng: np.random.Generator) -> int:
    """How many of the trials succeed at probability 1/n; the expectation if the number does not fit an integer."""
    return int(rng.binomial(trials, 1.0 / n)) if trials < REPETITION_LIMIT else trials // n


def draw_survivors(
    keys: int, repetitions: int, averages: int, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The surviving (average, key) of all repetitions of one row, for budgets below one evaluation per key.

    >>> average, key = draw_survivors(40, 5, 3, 40, np.random.default_rng(0))
    >>> bool((average < 3).all() and (key < 40).all())
    True

    Each of keys * repetitions * averages trials succeeds with probability 1/n: a binomial number of them succeed, and
    they form a uniform subset of that size.
    """
    trials = keys * repetitions * averages
    wanted = survivors(trials, n, rng)
    if 2 * wanted >= trials:
        cells = np.flatnonzero(rng.permutation(trials) < wanted)
    else:
        cells = np.unique(rng.integers(0, trials, wanted))
        while len(cells) < wanted:
            # Draw more until the set is full: every subset of this size stays equally likely.
            fresh = np.setdiff1d(rng.integers(0, trials, wanted - len(cells)), cells)
            cells = np.concatenate([cells, fresh])
    return cells // (keys * repetitions), cells % keys
