"""What a run costs, counted where the work happens."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from operator import add


@dataclass(frozen=True)
class Tally:
    """Kernel and hash evaluations of one part of an algorithm.

    >>> Tally(3, 2) + Tally(hash_evaluations=5)
    Tally(kernel_evaluations=3, distinct_evaluations=2, hash_evaluations=5)

    `kernel_evaluations` counts what the algorithm asks for, including repetitions; `distinct_evaluations` counts what
    was computed; a hash evaluation is one function h_t, with all the functions it concatenates, on one point.
    """

    kernel_evaluations: int = 0
    distinct_evaluations: int = 0
    hash_evaluations: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*map(add, astuple(self), astuple(other)))
