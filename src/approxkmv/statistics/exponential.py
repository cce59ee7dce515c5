"""exp over a run of float64 numbers, in a form that the compiler can vectorise."""

from __future__ import annotations

import numpy as np

from approxkmv.compute.compiling import cached_njit

LOG2_E = 1.4426950408889634
# ln 2 in two parts: the first has trailing zero bits, so its product with an integer is exact.
LN2_HIGH = 6.93147180369123816490e-01
LN2_LOW = 1.90821492927058770002e-10
# exp of less is below 1e-307 and is taken as 0, which avoids denormal exponents.
SMALLEST = -707.0
# Arguments are capped here, so that the sum of a million of them is finite.
LARGEST = 690.0


# forceinline, here and wherever sums may be reordered: compiled as a separate symbol, the function would differ from
# its inlined copies, and which copy a process links would depend on what it found in the cache.
@cached_njit(
    nogil=True,
    fastmath={"reassoc", "contract", "nsz", "nnan", "ninf"},
    error_model="numpy",
    forceinline=True,
)
def exp_and_sum(values: np.ndarray, size: int, shift: float, out: np.ndarray) -> float:
    """out[:size] = exp(values[:size] - shift); returns their sum.

    In a loop like this numba calls the C library once per number; written out, it has no call and no branch. The
    argument is reduced to |r| <= ln(2)/2, where the Taylor series to degree 9 has a relative error of 1e-11. Arguments
    above LARGEST are capped: the caller sees it in the sum and chooses another shift. (A maximum would show the same,
    but the compiler does not vectorise one.)
    """
    total = 0.0
    for j in range(size):
        x = values[j] - shift
        clipped = min(max(x, SMALLEST), LARGEST)
        power = np.floor(clipped * LOG2_E + 0.5)
        r = (clipped - power * LN2_HIGH) - power * LN2_LOW
        series = 1.0 / 362880.0
        series = series * r + 1.0 / 40320.0
        series = series * r + 1.0 / 5040.0
        series = series * r + 1.0 / 720.0
        series = series * r + 1.0 / 120.0
        series = series * r + 1.0 / 24.0
        series = series * r + 1.0 / 6.0
        series = series * r + 0.5
        series = series * r + 1.0
        series = series * r + 1.0
        bits = (np.int64(power) + 1023) << 52
        value = series * np.int64(bits).view(np.float64) * (x >= SMALLEST)
        out[j] = value
        total += value
    return total
