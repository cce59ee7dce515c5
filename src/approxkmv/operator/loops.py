"""Compiled sums of powers of two, which are read from a product's tile once and never written back."""

from __future__ import annotations

import numpy as np
from numba import njit

from approxkmv.attention.kernels.numbers import number
from approxkmv.compute.compiling import cached_njit
from approxkmv.compute.exponentials import FLAGS, f32


@njit(inline="always")
def exp2(x):
    """2^x in float32 to about 2e-7 for x below 127; 0 below 2^-126.5."""
    x = max(x, f32(-127.0))
    i = np.floor(x + f32(0.5))
    r = x - i
    p = f32(1.540353e-4)
    p = p * r + f32(1.3333558e-3)
    p = p * r + f32(9.6181291e-3)
    p = p * r + f32(5.5504109e-2)
    p = p * r + f32(2.4022651e-1)
    p = p * r + f32(6.9314718e-1)
    p = p * r + f32(1.0)
    return p * np.int32((np.int32(i) + np.int32(127)) << np.int32(23)).view(np.float32)


@cached_njit(fastmath=FLAGS, nogil=True)
def add_weighted(low, high, logs, x, out):
    """out[:, i] += sum over j of 2^logs[i, j] x[:, j] for rows low to high - 1; x (m, n) and out (m, rows)."""
    n = x.shape[1]
    weights = np.empty(n, np.float32)
    for i in range(low, high):
        if len(x) == 1:
            total = f32(0.0)
            for j in range(n):
                total += exp2(number(logs[i, j])) * x[0, j]
            out[0, i] += total
        else:
            for j in range(n):
                weights[j] = exp2(number(logs[i, j]))
            for c in range(len(x)):
                total = f32(0.0)
                for j in range(n):
                    total += weights[j] * x[c, j]
                out[c, i] += total


@cached_njit(fastmath=FLAGS, nogil=True)
def split_keys(low, high, logs, thresholds, multiple, weights, near, counts):
    """weights[b, j] = 2^(logs[b, j] - thresholds[b]), 0 where that is at least 1: such keys are listed in near[b].

    For blocks low to high - 1. The list goes on with the number of keys until its length, counts[b], is a multiple.
    """
    n = logs.shape[1]
    for b in range(low, high):
        bar = thresholds[b]
        for j in range(n):
            log = number(logs[b, j])
            weights[b, j] = exp2(log - bar) if log < bar else f32(0.0)
        m = 0
        for j in range(n):
            if number(logs[b, j]) >= bar:
                near[b, m] = j
                m += 1
        while m % multiple:
            near[b, m] = n
            m += 1
        counts[b] = m
