"""Numbers of the compiled loops: exponentials in float32, and bfloat16 as bits, which NumPy does not have."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

f32 = np.float32
# Sums may be reordered, or nothing is vectorised; NaN and infinity keep their meaning.
FLAGS = {"reassoc", "contract", "nsz", "arcp"}


@njit(inline="always")
def exp(x):
    """exp(x) in float32 to about 2e-7, clamped to where it is a normal number: 2^i times a polynomial."""
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
    """exp(x), and 0 where that is below the normal numbers: what it is multiplied by may be as large as they get."""
    return exp(x) if x > f32(-87.0) else f32(0.0)


@njit(inline="always")
def bits(x):
    """The upper half of a float32's bits, rounded to nearest even: a bfloat16."""
    whole = np.float32(x).view(np.uint32)
    return np.uint16((whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def number(stored):
    """The float32 that an array holds, as it is or as the bits of a bfloat16: one loop serves both."""
    raise NotImplementedError


@overload(number, inline="always")
def _number_by_type(stored):
    if stored == types.uint16:
        return lambda stored: widened(stored)
    return lambda stored: stored


def stored(number, like):
    """A float32 as an array of the type of `like` holds it."""
    raise NotImplementedError


@overload(stored, inline="always")
def _stored_by_type(number, like):
    if like == types.uint16:
        return lambda number, like: bits(number)
    return lambda number, like: number
