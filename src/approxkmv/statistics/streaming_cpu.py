"""A strip of rows on the CPU: the same as streaming.add_strip_by_torch, in one compiled loop per row."""

from __future__ import annotations

import math

import numpy as np
import torch

from approxkmv.compute.compiling import cached_njit
from approxkmv.errors import NonFiniteError
from approxkmv.statistics.entries import SHARES
from approxkmv.statistics.exponential import exp_and_sum
from approxkmv.statistics.largest import Largest
from approxkmv.statistics.selection import SEED, append_above, next_state, partition, sum_of, sum_up_to

_SHARES = np.array(SHARES)


def add_strip(
    kernel: Largest, softmax: Largest, keys: list[torch.Tensor], logits: torch.Tensor, first: int, spans: torch.Tensor
) -> None:
    """Like streaming.add_strip_by_torch, for float64 on the CPU; releases the GIL while it works.

    Raises NonFiniteError for a logit beyond float64.
    """
    values = logits.numpy()
    own = spans[first : first + len(values)].numpy()
    counts = np.empty((len(values), len(SHARES)), np.int64)
    row = 0
    room = np.empty(0)
    while row < len(values):
        # Few enough candidates at a time that the lists are cut back, and the bounds raised, within a strip too.
        size = max(4 * kernel.n, values.shape[1])
        if room.size < 2 * size:
            room = np.empty(2 * size)
        done, many, others, log_far, log_far_softmax = _rows(
            values, row, own, kernel.bound, softmax.bound, room[:size], room[size:], counts, _SHARES
        )
        if done < 0:
            raise NonFiniteError(f"a logit of row {first - done - 1} is beyond float64: scale the queries down")
        kernel.add(torch.from_numpy(room[:many].copy()), torch.tensor(log_far, dtype=torch.float64))
        softmax.add(
            torch.from_numpy(room[size : size + others].copy()), torch.tensor(log_far_softmax, dtype=torch.float64)
        )
        row = done
    keys.append(torch.from_numpy(counts))


@cached_njit(nogil=True)
def _log_add(one: float, other: float) -> float:
    larger = max(one, other)
    if larger == -np.inf:
        return larger
    return larger + math.log(math.exp(one - larger) + math.exp(other - larger))


@cached_njit(nogil=True, fastmath={"reassoc", "nsz"}, forceinline=True)
def _row_maximum(values: np.ndarray, size: int) -> float:
    largest = values[0]
    for j in range(1, size):
        largest = max(largest, values[j])
    return largest


@cached_njit(nogil=True)
def keys_holding(weights: np.ndarray, size: int, goal: float) -> int:
    """How many of the largest weights[:size] are needed for a sum of `goal`; those come first afterwards.

    A quickselect by mass: continues on the side of the pivot in which the goal is reached.
    """
    low, high = 0, size
    before = 0.0
    state = SEED
    while high - low > 1:
        state = next_state(state)
        left, right = partition(weights, low, high - 1, weights[low + np.int64(state % np.uint64(high - low))])
        # [low, right] >= pivot, (right, left) == pivot, [left, high) <= pivot.
        upper = before + sum_of(weights, low, right + 1)
        middle = upper + sum_of(weights, right + 1, left)
        if upper >= goal:
            high = right + 1
        elif middle >= goal:
            # At most one entry is left between the sides.
            return left
        elif left >= high:
            return high
        else:
            before = middle
            low = left
    return low + 1


# Bins per factor of 2, as a power of 2, and the number of bins: 16 times 24 octaves below the largest weight, 1.
_FINE = 4
_BINS = 16 * 24
_TOP_BIN = (1023 << _FINE) + 1


@cached_njit(nogil=True)
def _append_between(values: np.ndarray, size: int, low: float, high: float, out: np.ndarray) -> int:
    """Write the values in [low, high) to out; returns how many."""
    count = 0
    whole = size - size % 32
    for start in range(0, whole, 32):
        hits = 0
        for j in range(start, start + 32):
            hits += (values[j] >= low) & (values[j] < high)
        if hits > 0:
            for j in range(start, start + 32):
                if values[j] >= low and values[j] < high:
                    out[count] = values[j]
                    count += 1
    for j in range(whole, size):
        if values[j] >= low and values[j] < high:
            out[count] = values[j]
            count += 1
    return count


@cached_njit(nogil=True)
def count_keys(weights: np.ndarray, size: int, total: float, shares: np.ndarray, out: np.ndarray) -> None:
    """The number of largest weights[:size] <= 1 that make up each share of their total, written to out.

    Weights are counted and summed in bins (the first bits of a float64 approximate its logarithm); only the bin in
    which a share is reached is searched exactly. Weights below the range of the bins go into bin 0.
    """
    counts = np.zeros(_BINS, np.int64)
    masses = np.zeros(_BINS)
    members = np.empty(size)
    shift = np.uint64(52 - _FINE)
    lowest = _TOP_BIN - _BINS
    for j in range(size):
        place = max(np.int64(np.uint64(np.float64(weights[j]).view(np.uint64)) >> shift) - lowest, 0)
        counts[place] += 1
        masses[place] += weights[j]
    for t in range(len(shares)):
        goal = shares[t] * total
        above, mass = 0, 0.0
        place = _BINS - 1
        while place > 0 and mass + masses[place] < goal:
            mass += masses[place]
            above += counts[place]
            place -= 1
        # The bin's edges as weights, excluding the upper one, and weights of 0, as hidden keys have.
        low = np.int64((place + lowest) << shift).view(np.float64) if place > 0 else 1e-308
        high = np.int64((place + 1 + lowest) << shift).view(np.float64)
        many = _append_between(weights, size, low, high, members)
        # None where rounding alone keeps the sum of all below the goal
        out[t] = above + (keys_holding(members, many, goal - mass) if many > 0 else 0)


@cached_njit(nogil=True)
def _rows(
    values: np.ndarray,
    row: int,
    spans: np.ndarray,
    bound: float,
    bound_softmax: float,
    out: np.ndarray,
    out_softmax: np.ndarray,
    counts: np.ndarray,
    shares: np.ndarray,
):
    """Rows from `row` on, each from the start to the end of its span, while both lists have room for one more.

    Returns the next row (or -1 - row if a logit is not finite), the sizes of the two lists, and the logarithms of the
    sums of the entries that are not in them.
    """
    n = values.shape[1]
    weights = np.empty(n)
    count, others = 0, 0
    far, far_softmax = -np.inf, -np.inf
    while row < len(values):
        size = spans[row, 1] - spans[row, 0]
        if count + size > out.size or others + size > out_softmax.size:
            break
        logits = values[row, spans[row, 0] : spans[row, 1]]
        largest = _row_maximum(logits, size)
        total = exp_and_sum(logits, size, largest, weights)
        if not (np.isfinite(largest) and np.isfinite(sum_of(logits, 0, size))):
            return -1 - row, 0, 0, far, far
        shift = largest + math.log(total)
        rest = total
        if largest > bound:
            rest = sum_up_to(weights, logits, size, bound)
            count = append_above(logits, size, bound, 0.0, out, count)
        if rest > 0.0:
            far = _log_add(far, math.log(rest) + largest)
        rest = total
        if largest > bound_softmax + shift:
            rest = sum_up_to(weights, logits, size, bound_softmax + shift)
            others = append_above(logits, size, bound_softmax + shift, shift, out_softmax, others)
        if rest > 0.0:
            far_softmax = _log_add(far_softmax, math.log(rest) + largest - shift)
        count_keys(weights, size, total, shares, counts[row])
        row += 1
    return row, count, others, far, far_softmax
