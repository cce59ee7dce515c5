"""Number formats of the compiled loops: float32, and bfloat16 stored as bits, since NumPy lacks it."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from approxkmv.compute.exponentials import FLAGS as FLAGS
from approxkmv.compute.exponentials import exp as exp
from approxkmv.compute.exponentials import f32 as f32
from approxkmv.compute.exponentials import fading as fading


@njit(inline="always")
def bits(x):
    """The upper half of a float32's bits, rounded to nearest even: a bfloat16."""
    whole = np.float32(x).view(np.uint32)
    return np.uint16((whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def number(stored):
    """The float32 in an array that stores float32 or the bits of bfloat16: one loop serves both."""
    raise NotImplementedError


@overload(number, inline="always")
def _number_by_type(stored):
    if stored == types.uint16:
        return lambda stored: widened(stored)
    return lambda stored: stored


def stored(number, like):
    """A float32 in the storage format of the array `like`."""
    raise NotImplementedError


@overload(stored, inline="always")
def _stored_by_type(number, like):
    if like == types.uint16:
        return lambda number, like: bits(number)
    return lambda number, like: number
