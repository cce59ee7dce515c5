"""The constants printed in the paper, by name, so that a run can record which of them it changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from approxkmv.errors import InputError


@dataclass(frozen=True)
class PaperConstants:
    """Every number printed in Algorithms 1 to 3, with the printed value as its default, and one corrected line.

    >>> PaperConstants(table_factor=20).tables(4096, alpha=1 / 3)
    2662

    They are chosen for a proof about large n. With the printed values 10 n^(1/3) ln n tables exceed n below about
    n = 500, the budget of a row exceeds n at every n that fits on a computer, and a relative error of n^-0.218 asks a
    density structure for more samples than a bucket has points. The answer is still right in all those cases, only
    expensive. So the constants can be changed, and the defaults are the printed ones.

    Raises:
        InputError: a constant that is not positive and finite, or an epsilon_divisor of at most 1.
    Source: Algorithms 1, 2 and 3 and Definition 3.1 of Indyk, Kapralov, Sheth & Wagner (ICLR 2025).
    """

    table_factor: float = 10.0
    """Algorithm 1, line 3: T = table_factor * n^alpha * ln n hash tables."""
    small_exponent: float = 4.0
    """Definition 3.1: x_j^2 <= n^-small_exponent is rounded to zero."""
    repetition_factor: float = 10.0
    """Algorithm 2, line 9: repetition_factor * n * s_i / epsilon^2 repetitions make an average."""
    median_factor: float = 10.0
    """Algorithm 2, line 9: median_factor * ln n averages make a median."""
    density_error_exponent: float = 0.218
    """Algorithm 2, lines 5 and 7: the densities have relative error n^-density_error_exponent."""
    density_failure_exponent: float = 2.0
    """Algorithm 2, line 5: each density may fail with probability n^-density_failure_exponent."""
    epsilon_divisor: float = 2.0
    """Proof of Theorem 1.1: "we scale down epsilon by 2" before Algorithm 2."""
    density_exponent: float = 0.173
    """Theorem 2.2: a density above mu costs mu^-density_exponent. Used in the cost study only."""

    subtract_rounded: bool = True
    """Algorithm 2, line 7: heavy keys are subtracted from t_i with their squares rounded as in t_i. False subtracts
    x_j^2 as printed; then a heavy key leaves up to epsilon x_j^2 K_ij^2 in s_i, and rows that each have such a key add
    up to about n^2 samples: the printed line is correct, but not subquadratic."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                continue
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise InputError(f"constants.{field.name} is {value!r}: it must be a positive finite number")
        if self.epsilon_divisor <= 1:
            raise InputError(f"constants.epsilon_divisor is {self.epsilon_divisor!r}: it must exceed 1")

    def tables(self, n: int, alpha: float, n_failures: int | None = None) -> int:
        """T of Algorithm 1, line 3. Its logarithm is of `n_failures` (the larger side), by default of n."""
        return max(1, math.ceil(self.table_factor * n**alpha * math.log(n_failures or n)))

    def averages(self, n: int) -> int:
        """The number of averages whose median Algorithm 2, line 9 takes."""
        return max(1, math.ceil(self.median_factor * math.log(n)))

    def density_error(self, n: int) -> float:
        """Relative error n^-0.218 of the densities, capped at 1/2, since the printed value is 1 at n = 1."""
        return min(0.5, float(n) ** -self.density_error_exponent)

    def density_failure(self, n: int) -> float:
        """Failure probability n^-2 of one density, capped at 1/4, since the printed value is 1 at n = 1."""
        return min(0.25, float(n) ** -self.density_failure_exponent)


PRINTED = PaperConstants()
