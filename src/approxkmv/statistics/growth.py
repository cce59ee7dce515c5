"""How large c is at the longest length that texts reach, and how it grows there, head by head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# c below this counts as this: such a head has no tail to speak of, and the logarithm of 0 has no slope.
FLOOR = 1e-6
# What the intervals over texts are to hold.
COVERAGE = 0.95
# An exponent below FLAT is no growth; one above FAST is growth that the cost bound does not survive.
FLAT = 0.1
FAST = 0.5
# The largest c that the paper's main text reports; a model of the catalogue may have its own.
PAPER_BOUND = 4.6
# With fewer texts an interval over them means little.
ENOUGH_TEXTS = 5

UNDECIDED = "undecided"
SIZES = ("small", "large", UNDECIDED)
TRENDS = ("flat", "grows", UNDECIDED)


@dataclass(frozen=True)
class Growth:
    """c of each of `heads` heads at the longest length n, its exponent over the last octave, and its prediction at n/4.

    Arrays are (heads,), nan where lengths or texts are lacking. c of several texts is their geometric mean.
    """

    texts: int
    """How many texts reach n."""
    length: int
    """n: the longest length that ENOUGH_TEXTS texts reach."""
    start: int
    """The longest length up to n/2, where the last octave begins; 0 where there is none."""
    ratio: np.ndarray
    """c(n), with the interval of the mean over texts."""
    ratio_low: np.ndarray
    ratio_high: np.ndarray
    exponent: np.ndarray
    """Mean over texts of the slope of log c against log n from `start` to n, with its interval."""
    exponent_low: np.ndarray
    exponent_high: np.ndarray
    predicted_ratio: np.ndarray
    """c(n) as the lengths up to n/4 predict it."""
    predicted_low: np.ndarray
    """The interval of the exponent over the last octave as the lengths up to n/4 predict it."""
    predicted_high: np.ndarray


def fit_growth(texts: np.ndarray, lengths: np.ndarray, ratios: np.ndarray) -> Growth:
    """Size, local exponent and prediction of c, from c of several texts at several lengths.

    >>> lengths = np.tile([50, 100, 200, 400, 800], 6)
    >>> ratios = 0.1 * lengths[:, None] ** np.array([0.0, 1.0])
    >>> fit_growth(np.repeat(np.arange(6), 5), lengths, ratios).exponent.round(6).tolist()
    [0.0, 1.0]

    Only the texts that reach n count: those that end before are others. Intervals are Student's, of the mean over
    texts of log c or of its slope within the text, so that they say nothing about lengths that were not seen.

    The prediction knows the lengths up to n/4 alone. Between the slope of the last octave there and that slope going
    on to change as it did (a damped trend) it takes the middle for c(n), and for the later exponent everything
    between the two, with the interval over texts around it, and around that the root mean square over heads of what
    lies between the two: a bend may end or go on, and others begin.

    Args:
        texts: (rows,) which text a row is of. lengths: (rows,) its n. ratios: (rows, heads) its c.
    """
    names, counts = np.unique(lengths, return_counts=True)
    enough = names[counts >= ENOUGH_TEXTS]
    heads = ratios.shape[1]
    if not len(enough):
        longest = int(names[-1]) if len(names) else 0
        return Growth(int(counts[-1]) if len(names) else 0, longest, 0, *(np.full(heads, np.nan) for _ in range(9)))
    n = int(enough[-1])
    # n/2 for the last octave, and n/4, n/8, n/16 for what is known before it.
    rungs = [names[names <= n / 2**k] for k in (1, 2, 3, 4)]
    ladder = [n, *(int(rung[-1]) if len(rung) else 0 for rung in rungs)]
    known = next((place for place, step in enumerate(ladder) if step == 0 or step in ladder[:place]), len(ladder))
    y = _logs(texts, lengths, ratios, ladder[:known])
    x = np.log(np.maximum(ladder, 1).astype(np.float64))
    ratio, ratio_low, ratio_high = (np.exp(part) for part in _interval(y[0]))
    nothing = np.full(heads, np.nan)
    exponent = predicted = (nothing,) * 3
    if known > 1:
        exponent = _interval((y[0] - y[1]) / (x[0] - x[1]))
    if known == len(ladder):
        last, before = (y[2] - y[3]) / (x[2] - x[3]), (y[3] - y[4]) / (x[3] - x[4])
        bend = (last - before) / (0.5 * (x[2] - x[4]))
        centre = 0.5 * (x[2] + x[3])
        far = y[2] + (x[0] - x[2]) * (last + 0.5 * bend * (0.5 * (x[0] + x[2]) - centre))
        later = last, last + bend * (0.5 * (x[0] + x[1]) - centre)
        # How much slopes change from octave to octave, over the heads: a bend may be another's tomorrow.
        change = float(np.sqrt(np.square(later[1].mean(0) - later[0].mean(0)).mean()))
        ends = [_interval(one, last, change) for one in later]
        predicted = (
            np.exp(far.mean(0)),
            np.minimum(ends[0][1], ends[1][1]),
            np.maximum(ends[0][2], ends[1][2]),
        )
    return Growth(y.shape[1], n, ladder[1], ratio, ratio_low, ratio_high, *exponent, *predicted)


def size(growth: Growth, bound: float) -> list[str]:
    """Per head `small` where c's interval at n is at most the bound, `large` where it is above it, else `undecided`."""
    return _words(growth.ratio_low, growth.ratio_high, bound, SIZES)


def trend(growth: Growth) -> list[str]:
    """Per head `flat` where the exponent's interval is at most FLAT, `grows` where it is above, else `undecided`."""
    return _words(growth.exponent_low, growth.exponent_high, FLAT, TRENDS)


def in_words(found: Iterable[str], words: Sequence[str]) -> str:
    """How many heads there are of each word: `small 40, undecided 2`."""
    counts = Counter(found)
    return ", ".join(f"{word} {counts[word]}" for word in words if word in counts)


def _words(low: np.ndarray, high: np.ndarray, edge: float, words: Sequence[str]) -> list[str]:
    below, above, neither = words
    pairs = zip(low.tolist(), high.tolist(), strict=True)
    return [below if b <= edge else above if a > edge else neither for a, b in pairs]


def _logs(texts: np.ndarray, lengths: np.ndarray, ratios: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """(wanted, texts, heads): log c of the texts that have all the wanted lengths."""
    rows = {
        length: dict(zip(texts[lengths == length].tolist(), np.flatnonzero(lengths == length).tolist(), strict=True))
        for length in wanted
    }
    shared = sorted(set.intersection(*(set(of_text) for of_text in rows.values())))
    places = np.array([[of_text[text] for text in shared] for of_text in rows.values()])
    return np.log(np.maximum(ratios[places], FLOOR))


def _interval(
    values: np.ndarray, also: np.ndarray | None = None, change: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over texts (texts, heads) and Student's interval; `also`: of the mean of as many values more.

    `change`: the standard deviation of what else moves the mean.
    """
    from scipy.special import ndtri, stdtrit

    texts = len(values)
    mean = values.mean(0)
    variance = values.var(0, ddof=1) + (0.0 if also is None else also.var(0, ddof=1))
    end = (1 + COVERAGE) / 2
    width = np.hypot(stdtrit(texts - 1, end) * np.sqrt(variance / texts), ndtri(end) * change)
    return mean, mean - width, mean + width
