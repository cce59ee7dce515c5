"""The functions of `rows` for float32 on a CPU, as compiled loops on as many threads as torch uses."""

from __future__ import annotations

import numpy as np
import torch

from approxkmv.compute.compiling import cached_njit
from approxkmv.compute.exponentials import FLAGS, f32, fading
from approxkmv.compute.threads import over_threads
from approxkmv.statistics.exponential import exp_and_sum
from approxkmv.statistics.logits import HIDDEN
from approxkmv.statistics.rows import RowSums
from approxkmv.statistics.streaming_cpu import count_keys as count_keys_of_row

_HIDDEN = f32(HIDDEN[torch.float32])


def add_tile(tile: torch.Tensor, sums: RowSums) -> None:
    """As rows.add_tile."""
    # torch's maximum is vectorised and numba's is not.
    tops = tile.amax(1).numpy()
    given = tile.numpy(), tops, sums.largest.numpy(), sums.others.numpy(), sums.moment.numpy()
    over_threads(lambda low, high: _add_rows(low, high, *given), len(tile))


def count_keys(tile: torch.Tensor, hidden: float, shares: tuple[float, ...]) -> torch.Tensor:
    """As rows.count_keys."""
    out = torch.empty(len(tile), len(shares), dtype=torch.long)
    given = tile.numpy(), tile.amax(1).numpy(), hidden, np.array(shares), out.numpy()
    over_threads(lambda low, high: _count_rows(low, high, *given), len(tile))
    return out


def add_gram(weights: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    """As rows.add_gram; each row is read once for both products."""
    given = weights.numpy(), x.numpy(), out.numpy()
    over_threads(lambda low, high: _add_gram(low, high, *given), len(weights))


@cached_njit(nogil=True, fastmath=FLAGS)
def _add_gram(low, high, weights, x, out):
    for head in range(low, high):
        here = x[head]
        image = out[head]
        for i in range(weights.shape[1]):
            line = weights[head, i]
            y = f32(0.0)
            for j in range(line.size):
                y += line[j] * here[j]
            for j in range(line.size):
                image[j] += y * line[j]


@cached_njit(nogil=True, fastmath=FLAGS)
def _add_rows(low, high, tile, tops, largest, others, moment):
    width = tile.shape[1]
    for i in range(low, high):
        line = tile[i]
        if tops[i] >= largest[i]:
            rise = tops[i] - largest[i]
            fade = np.exp(-rise)
            moment[i] = fade * (moment[i] + rise * (others[i] + 1.0))
            largest[i] = tops[i]
            # The largest are counted separately: beside them a float32 sum would lose the digits of small weights.
            ties = 0
            for j in range(width):
                ties += line[j] == tops[i]
                line[j] = line[j] if line[j] < tops[i] else _HIDDEN
            others[i] = fade * (others[i] + 1.0) + (ties - 1)
        top = f32(largest[i])
        weights = f32(0.0)
        moments = f32(0.0)
        for j in range(width):
            below = line[j] - top
            weight = fading(below)
            weights += weight
            moments += weight * below
        others[i] += weights
        moment[i] -= moments


@cached_njit(nogil=True)
def _count_rows(low, high, tile, tops, hidden, shares, out):
    width = tile.shape[1]
    weights = np.empty(width)
    for i in range(low, high):
        if tops[i] <= 0.5 * hidden:
            out[i] = 0
            continue
        total = exp_and_sum(tile[i], width, np.float64(tops[i]), weights)
        count_keys_of_row(weights, width, total, shares, out[i])
