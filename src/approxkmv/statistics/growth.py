"""How fast c grows with the length, head by head: the exponent g of c(n) ~ n^g, and a verdict on Assumption (A)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# c below this counts as this: such a head has no tail to speak of, and the logarithm of 0 has no slope.
FLOOR = 1e-6
DRAWS = 1000
# The interval holds this share of the bootstrap.
COVERAGE = 0.95
# Where c is extrapolated to, and what it must stay below there.
FAR_LENGTH = 131_072
FAR_BOUND = 5.0
FLAT = 0.1
FAST = 0.5
# With fewer texts the bootstrap has next to nothing to draw from.
ENOUGH_TEXTS = 5

HOLDS = "holds"
FAILS = "fails"
SLOWLY = "grows slowly"
UNDECIDED = "undecided"
VERDICTS = (HOLDS, SLOWLY, UNDECIDED, FAILS)


@dataclass(frozen=True)
class Growth:
    """The fit c(n) = coefficient n^exponent of each of `heads` heads."""

    texts: int
    """How many texts reach two lengths or more; the others say nothing about growth."""
    exponent: np.ndarray
    exponent_low: np.ndarray
    exponent_high: np.ndarray
    log_coefficient: np.ndarray
    """Mean over texts of their levels: the line of the average text."""
    far_ratio: np.ndarray
    """c of the line at FAR_LENGTH."""
    far_ratio_high: np.ndarray
    """The upper end of its interval."""


def fit_growth(
    texts: np.ndarray, lengths: np.ndarray, ratios: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> Growth:
    """Fit log c = level of the text + g log n, one g per head and one level per text and head.

    >>> lengths = np.tile([50, 100, 200], 6)
    >>> ratios = 0.1 * lengths[:, None] ** np.array([0.0, 1.0])
    >>> fit_growth(np.repeat(np.arange(6), 3), lengths, ratios).exponent.round(6).tolist()
    [0.0, 1.0]

    A level per text, because the texts that reach great lengths are not those that make up the short ones: g says how
    c grows within a text. The interval is the bootstrap's over texts, all draws and heads in two matrix products.

    Args:
        texts: (rows,) which text a row is of. lengths: (rows,) its n. ratios: (rows, heads) its c.
        draws: bootstrap draws. seed: of those draws.
    Returns:
        A Growth; all nan when no text reaches two lengths.
    """
    names, place = np.unique(texts, return_inverse=True)
    x = np.log(np.asarray(lengths, dtype=np.float64))
    y = np.log(np.maximum(ratios, FLOOR))
    count = np.bincount(place, minlength=len(names)).astype(np.float64)
    x_mean = np.bincount(place, x, minlength=len(names)) / count
    y_mean = _sums(place, y, len(names)) / count[:, None]
    x_centred = x - x_mean[place]
    xx = np.bincount(place, x_centred**2, minlength=len(names))
    xy = _sums(place, x_centred[:, None] * (y - y_mean[place]), len(names))
    used = xx > 0
    total = int(used.sum())
    if total == 0:
        return Growth(0, *(np.full(y.shape[1], np.nan) for _ in range(6)))
    xx, xy, x_mean, y_mean = xx[used], xy[used], x_mean[used], y_mean[used]
    exponent = xy.sum(0) / xx.sum()
    level = (y_mean - exponent * x_mean[:, None]).mean(0)
    weights = np.random.default_rng(seed).multinomial(total, np.full(total, 1 / total), size=draws).astype(np.float64)
    drawn = (weights @ xy) / (weights @ xx)[:, None]
    drawn_far = (weights @ y_mean) / total + drawn * (np.log(FAR_LENGTH) - (weights @ x_mean) / total)[:, None]
    ends = (1 - COVERAGE) / 2, (1 + COVERAGE) / 2
    low, high = np.quantile(drawn, ends, axis=0)
    return Growth(
        total,
        exponent,
        low,
        high,
        level,
        # c is never above n - 1, which it is when all entries are equal.
        np.minimum(np.exp(level + exponent * np.log(FAR_LENGTH)), FAR_LENGTH - 1),
        np.minimum(np.exp(np.quantile(drawn_far, ends[1], axis=0)), FAR_LENGTH - 1),
    )


def verdict(growth: Growth, head: int, largest: float) -> tuple[str, str]:
    """`holds`, `grows slowly`, `undecided` or `fails`, and why.

    holds: g's interval is below FLAT, or c extrapolated to FAR_LENGTH is still below FAR_BOUND at the upper end of its
    interval. fails: g's interval is above FAST and c exceeds FAR_BOUND at a length that was seen. grows slowly: g's
    interval lies between FLAT and FAST. undecided: anything else.

    Args:
        growth: of the model. head: its index there. largest: the largest c seen over texts and prefixes.
    """
    if growth.texts < ENOUGH_TEXTS:
        return UNDECIDED, f"only {growth.texts} texts reach two of the lengths, {ENOUGH_TEXTS} are needed"
    low, high, far = (float(part[head]) for part in (growth.exponent_low, growth.exponent_high, growth.far_ratio_high))
    interval = f"g is between {low:.2f} and {high:.2f}"
    if high < FLAT:
        return HOLDS, f"{interval}, below {FLAT:g}"
    if far < FAR_BOUND:
        return HOLDS, f"c at n = {FAR_LENGTH:,} is at most {far:.2g}, below {FAR_BOUND:g}"
    if low > FAST and largest > FAR_BOUND:
        return FAILS, f"{interval}, above {FAST:g}, and c reaches {largest:.1f}"
    if low > FAST:
        return UNDECIDED, f"{interval}, above {FAST:g}, but c is at most {largest:.1f} at the lengths seen"
    if low >= FLAT and high <= FAST:
        return SLOWLY, f"{interval}, within {FLAT:g} and {FAST:g}"
    crossed = " and ".join(f"{edge:g}" for edge in (FLAT, FAST) if low < edge < high)
    return UNDECIDED, f"{interval}, on both sides of {crossed}"


def _sums(place: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """(count, heads): the rows of `values` added up by `place`."""
    out = np.zeros((count, values.shape[1]))
    np.add.at(out, place, values)
    return out
