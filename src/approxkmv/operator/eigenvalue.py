"""The noisy power method: the top eigenvalue of a Gaussian kernel matrix from matrix-vector products."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np

from approxkmv.arrays import Array
from approxkmv.errors import InputError
from approxkmv.kmv import inputs
from approxkmv.kmv.algorithm import approx_kmv
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.heavy import HeavyKeys
from approxkmv.operator.kernel_operator import KernelOperator


@dataclass(frozen=True)
class EigenvalueResult:
    """An approximate top eigenvalue and its eigenvector."""

    value: float
    """Within a relative error of epsilon of the top eigenvalue."""
    vector: Array
    """(n,): a unit vector whose Rayleigh quotient is close to `value`."""
    iterations: int
    kernel_evaluations: int
    """The cost of all products together."""
    distinct_evaluations: int
    hash_evaluations: int


def top_eigenvalue(
    points: Array,
    sigma: float,
    epsilon: float,
    *,
    method: str = "printed",
    seed: int | None = None,
    iterations: int | None = None,
    **options: object,
) -> EigenvalueResult:
    """Approximate the largest eigenvalue of K_ij = exp(-|p_i - p_j|^2 / (2 sigma^2)) to within a factor 1 +- epsilon.

    >>> result = top_eigenvalue(np.zeros((20, 3)), sigma=1.0, epsilon=0.25, seed=0)
    >>> abs(result.value - 20) <= 0.25 * 20
    True

    Runs power steps with `approx_kmv` as the product. K has ones on its diagonal, so its top eigenvalue is at least 1,
    and an error of epsilon' |x|_2 in a product is at most epsilon' times it: the noise is small relative to the signal
    for any spectrum. K is non-negative, so its top eigenvector is too (Perron), and the starting vector of ones
    overlaps it by at least 1/sqrt(n). The sets S_i are found once and reused in every step. Half of epsilon goes to
    the number of steps, a quarter to the noise.

    With method="practical" the products are those of `KernelOperator`, each to within a quarter of epsilon relative to
    Kx by its error bar, and the steps end as soon as |Kx - value x| is at most a quarter of epsilon of the value. A top
    eigenvector on a few of many points may be missed so, since ones have little of it: they then begin
    again from the points whose entries grew by more than 1 + epsilon / 2 times the value, as long as that raises the
    value. What the error of the products hides stays hidden.

    Args:
        points: (n, d). sigma: the bandwidth. epsilon: relative error, below 1. seed: for a reproducible answer.
        method: "printed" (products of approx_kmv) or "practical".
        iterations: power steps, at most so many if practical; None means ceil(ln(n / epsilon) / epsilon) + 1.
        options: passed to approx_kmv (alpha, gamma, family, density, constants, memory); none if practical.
    Returns:
        An EigenvalueResult.
    Raises:
        InputError: points that are not a finite non-empty matrix, sigma or epsilon out of range.
    Source: the kernel noisy power method of Backurs, Indyk, Musco & Wagner (2021), an application in section 1.
    """
    matrix = inputs.matrix(points, "points")
    error = inputs.error(epsilon)
    if error >= 1:
        raise InputError(f"epsilon is {epsilon!r}: a relative error must be below 1")
    inputs.positive(sigma, "sigma")
    n = len(matrix)
    steps = iterations if iterations is not None else math.ceil(math.log(n / error) / error) + 1
    inputs.count(steps, "iterations")
    seeds = inputs.seed_sequence(seed).generate_state(steps, np.uint64)

    is_practical = inputs.choice(method, "method", ("printed", "practical")) == "practical"
    if is_practical and options:
        raise InputError(f"the practical method has no option {sorted(options)[0]!r}: leave it out")
    back = inputs.back_to_kind(points)
    operator = KernelOperator(points, points, sigma, error / 4.0, seed=seed) if is_practical else None
    heavy: HeavyKeys | None = None

    def product(x: np.ndarray, step: int) -> tuple[np.ndarray, Tally]:
        nonlocal heavy
        if operator is not None:
            y = inputs.vector(operator @ back(x), "Kx", n)
            assert operator.last is not None
            evaluations = operator.last.kernel_evaluations
            return y, Tally(evaluations, evaluations)
        given = {"sigma": sigma, "epsilon": error / 4.0, "seed": int(seeds[step]), "heavy": heavy}
        made = approx_kmv(matrix, matrix, x, **given, **options)  # type: ignore[arg-type]
        heavy = made.heavy
        return np.asarray(made.y), Tally(made.kernel_evaluations, made.distinct_evaluations, made.hash_evaluations)

    x = np.full(n, 1.0 / math.sqrt(n))
    best, vector, taken, total = 0.0, x, 0, Tally()
    before = 0.0
    for step in range(steps):
        y, tally = product(x, step)
        taken, total = taken + 1, total + tally
        quotient = float(x @ y)
        if quotient > best:
            best, vector = quotient, x
        if is_practical and np.linalg.norm(y - quotient * x) <= error / 4.0 * quotient:
            # No eigenvalue is above the largest growth of an entry of a positive x (Collatz and Wielandt).
            rising = y > (1.0 + error / 2.0) * quotient * x
            if best <= (1.0 + error / 2.0) * before or not rising.any():
                break
            before, y = best, np.where(rising, y, 0.0)
        # Negative entries can only be noise: K and x are non-negative.
        y = np.maximum(y, 0.0)
        norm = float(np.linalg.norm(y))
        if norm == 0.0:
            break
        x = y / norm
    return EigenvalueResult(best, back(vector), taken, *astuple(total))
