"""exp in float32 for compiled loops: a polynomial that the compiler can vectorise."""

from __future__ import annotations

import numpy as np
from numba import njit

f32 = np.float32
# Allow reordering of sums, without which nothing is vectorised; NaN and infinity keep their meaning.
FLAGS = {"reassoc", "contract", "nsz", "arcp"}


@njit(inline="always")
def exp(x):
    """exp(x) in float32 to about 2e-7, clamped to the range of normal numbers: 2^i times a polynomial."""
    x = min(max(x, f32(-87.0)), f32(88.0))
    i = np.floor(x * f32(1.4426950408889634) + f32(0.5))
    # log 2 in two parts, so that the remainder is exact
    r = x - i * f32(0.693359375)
    r = r + i * f32(2.12194440e-4)
    p = f32(1.0 / 5040)
    p = p * r + f32(1.0 / 720)
    p = p * r + f32(1.0 / 120)
    p = p * r + f32(1.0 / 24)
    p = p * r + f32(1.0 / 6)
    p = p * r + f32(0.5)
    p = p * r * r + r + f32(1.0)
    return p * np.int32((np.int32(i) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def fading(x):
    """exp(x), but 0 below the normal numbers: it may be multiplied by numbers as large as float32 holds."""
    return exp(x) if x > f32(-87.0) else f32(0.0)
