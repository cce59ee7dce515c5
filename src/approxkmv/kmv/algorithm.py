"""ApproxKMV (Algorithm 3): the product of a Gaussian kernel matrix and a vector, to within epsilon |x|_2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from approxkmv.arrays import Array
from approxkmv.errors import InputError
from approxkmv.kmv import hashing, inputs
from approxkmv.kmv.constants import PRINTED, PaperConstants
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.gaussian import GaussianKernel
from approxkmv.kmv.heavy import DEFAULT_MEMORY, HeavyKeys, least_heavy_memory, scan_buckets
from approxkmv.kmv.light import DENSITIES, Errors, LightSum, approx_light, least_light_memory
from approxkmv.kmv.preprocess import Split, split


@dataclass(frozen=True)
class KMVResult:
    """The approximate product and its cost."""

    y: Array
    """(n_q,): |Kx - y|_2 <= epsilon |x|_2 with probability 0.99. Float64, of the caller's kind of array."""
    heavy: HeavyKeys
    """The sets S_i: heavy[i] holds the keys j with K_ij >= n^-alpha."""
    kernel_evaluations: int
    """The evaluations that Algorithms 1 to 3 ask for, counting every repetition."""
    distinct_evaluations: int
    """The evaluations actually computed: a row whose budget exceeds its keys is evaluated once."""
    hash_evaluations: int
    """Functions h_t evaluated, one per table and point."""
    phases: dict[str, Tally]
    """The cost of each part: "large" (H_1), "heavy" (Algorithm 1), "density" and "light" (Algorithm 2)."""
    n_large: int
    """|H_1|."""
    n_small: int
    """|H_2|."""
    repetitions: np.ndarray
    """(n_q,): repetitions in one average, 10 n s_i / epsilon^2."""
    averages: int
    """The number of averages whose median each row takes."""
    row_error: float
    """Additive error of every row (with probability 0.99), in the unit of y."""


def approx_kmv(  # noqa: PLR0913 - each is an input of the algorithm as the paper prints it, or how to run it
    queries: Array,
    keys: Array,
    x: Array,
    *,
    sigma: float,
    epsilon: float,
    alpha: float = 1 / 3,
    gamma: float = 0.109,
    seed: int | None = None,
    family: str = "p-stable",
    density: str = "auto",
    constants: PaperConstants = PRINTED,
    memory: int = DEFAULT_MEMORY,
    heavy: HeavyKeys | None = None,
) -> KMVResult:
    """Approximate Kx for K_ij = exp(-|q_i - k_j|^2 / (2 sigma^2)) and any x (Algorithm 3, ApproxKMV).

    >>> import torch
    >>> q, k, x = torch.randn(40, 8), torch.randn(50, 8), torch.randn(50)
    >>> result = approx_kmv(q, k, x, sigma=1.0, epsilon=0.5, seed=0)
    >>> tuple(result.y.shape), len(result.heavy)
    ((40,), 40)

    |Kx - y|_2 <= epsilon |x|_2 with probability 0.99, for any K and x; assumption (A) on K only makes it cheap. The
    paper has one n. Here n is the number of keys n_k wherever it counts or scales keys (the rescaling |x|_2^2 = n,
    n^-alpha, n^gamma, the sampling rate 1/n), and the larger side in the logarithms of union bounds; each row is
    allowed the error epsilon |x|_2 / sqrt(n_q), so that n_q rows together stay within epsilon |x|_2.

    At sizes that fit on a computer the printed budgets exceed the number of pairs: `kernel_evaluations` is far above
    n_q n_k, each row is evaluated once, and the counts of its samples are drawn. See `PaperConstants`. For use
    there is `approxkmv.KernelOperator`: products that are faster than exact ones, with an error that is measured.

    Args:
        queries: (n_q, d). keys: (n_k, d). x: (n_k,), any signs. Torch tensors or NumPy arrays, of one kind.
        sigma: the bandwidth. epsilon: the error.
        alpha: heavy means K_ij >= n^-alpha. gamma: large means x_j^2 >= n^gamma.
        seed: None, or an integer for a reproducible answer. family: "p-stable" or "ball-carving" hashing.
        density: "exact", "levels" (Theorem 2.2), or "auto", which uses levels where they could cost less.
        constants: the printed constants. memory: bound in bytes on temporary storage beyond the inputs and the S_i.
        heavy: the sets S_i from an earlier call with the same queries, keys, sigma and alpha; their cost is then
            counted with that call.
    Returns:
        A KMVResult.
    Raises:
        InputError: mismatched shapes, a value or a product that is not finite, sigma or epsilon not positive, alpha
        or gamma outside [0, 1], an empty set, an unknown option, too little memory (the message gives the minimum).
    Source: Algorithm 3 and Theorem 1.1 of Indyk, Kapralov, Sheth & Wagner (ICLR 2025); docs/algorithm.md lists every
    departure.
    """
    q, k = inputs.points(queries, keys)
    inputs.same_kind(queries, "queries", x, "x")
    values = inputs.vector(x, "x", len(k))
    width, error = inputs.positive(sigma, "sigma"), inputs.error(epsilon)
    power, cut = inputs.fraction(alpha, "alpha"), inputs.fraction(gamma, "gamma")
    source = inputs.seed_sequence(seed)
    inputs.choice(family, "family", hashing.FAMILIES)
    inputs.choice(density, "density", DENSITIES)
    averages = constants.averages(max(len(q), len(k)))
    least = max(least_heavy_memory(len(q), len(k), q.shape[1]), least_light_memory(len(q), len(k), averages))
    bound = inputs.enough_memory(memory, least, f"ApproxKMV of {len(q)} queries and {len(k)} keys")
    if heavy is not None and (len(heavy) != len(q) or (len(heavy.indices) and heavy.indices.max() >= len(k))):
        raise InputError(f"heavy has {len(heavy)} sets that do not fit {len(q)} queries and {len(k)} keys")
    kernel = GaussianKernel(q, k, width)

    heavy_source, light_source = source.spawn(2)
    found = heavy
    if found is None:
        found = scan_buckets(kernel, alpha=power, source=heavy_source, family=family, constants=constants, memory=bound)
    parts, light = run_parts(
        kernel,
        values,
        found,
        epsilon=error,
        gamma=cut,
        density=density,
        constants=constants,
        source=light_source,
        memory=bound,
    )
    y_large, large_tally = exact_columns(kernel, parts.scaled, parts.large, bound)
    # Report an overflow by name, not by NumPy's warning.
    with np.errstate(over="ignore"):
        y = (light.z + y_large + heavy_sum(found, parts.scaled, parts.large)) * parts.norm_factor
    if not np.isfinite(y).all():
        raise InputError(f"the product with x of norm {parts.norm_factor:.3g} sqrt(n) overflows float64: scale x down")
    phases = {
        "large": large_tally,
        "heavy": found.tally if heavy is None else Tally(),
        "density": light.density_tally,
        "light": light.sampling_tally,
    }
    total = sum(phases.values(), Tally())
    return KMVResult(
        y=inputs.back_to_kind(queries)(y),
        heavy=found,
        kernel_evaluations=total.kernel_evaluations,
        distinct_evaluations=total.distinct_evaluations,
        hash_evaluations=total.hash_evaluations,
        phases=phases,
        n_large=len(parts.large),
        n_small=len(parts.small),
        repetitions=light.repetitions,
        averages=light.averages,
        row_error=error * math.sqrt(len(k) / len(q)) * parts.norm_factor,
    )


def run_parts(
    kernel: GaussianKernel,
    x: np.ndarray,
    heavy: HeavyKeys,
    *,
    epsilon: float,
    gamma: float,
    density: str,
    constants: PaperConstants,
    source: np.random.SeedSequence,
    memory: int,
    all_rows: int | None = None,
) -> tuple[Split, LightSum]:
    """Lines 3 and 5 of Algorithm 3: split x and sum the light keys, dividing epsilon among the errors.

    "Scale down epsilon by 2": half of it goes to the samples. The other half, which the proof reserves for y_H, covers
    what the proof neglects or absorbs: a quarter for H_2, a quarter for the buckets below the density floor.
    `all_rows` is the number of rows that share the error, if the kernel holds only a sample of them: light keys are
    then counted, not drawn.
    """
    rest = (1.0 - 1.0 / constants.epsilon_divisor) / 2.0
    # |x|_2^2 = n_k here, so n_q rows with this error add up to epsilon |x|_2.
    row = epsilon * math.sqrt(kernel.n_keys / (all_rows or kernel.n_queries))
    parts = split(x, gamma=gamma, epsilon=4.0 * rest * row, constants=constants)
    light = approx_light(
        kernel,
        parts.scaled,
        parts.kept,
        heavy,
        Errors(row / constants.epsilon_divisor, epsilon / constants.epsilon_divisor, rest * row),
        density=density,
        constants=constants,
        source=source,
        memory=memory,
        counts_only=all_rows is not None,
    )
    return parts, light


def exact_columns(
    kernel: GaussianKernel, scaled: np.ndarray, large: np.ndarray, memory: int
) -> tuple[np.ndarray, Tally]:
    """y_H of Lemma 3.2: the columns of H_1, evaluated exactly.

    Source: Definition 3.1 and Lemma 3.2; y_H sums over H_1 only.
    """
    out = np.zeros(kernel.n_queries)
    if len(large):
        step = int(max(1, (memory // 4) // (8 * 3 * len(large))))
        for start in range(0, kernel.n_queries, step):
            rows = slice(start, min(start + step, kernel.n_queries))
            out[rows] = np.exp(kernel.log_rows(rows, large)) @ scaled[large]
    pairs = kernel.n_queries * len(large)
    return out, Tally(pairs, pairs)


def heavy_sum(heavy: HeavyKeys, scaled: np.ndarray, large: np.ndarray) -> np.ndarray:
    """Sum over j in S_i of K_ij x_j, without the keys of H_1.

    Line 6 of Algorithm 3 prints the sum over all of S_i, but heavy keys of H_1 are already in y_H and would be
    counted twice.
    """
    weights = scaled.copy()
    weights[large] = 0.0
    return np.bincount(heavy.rows(), np.exp(heavy.log_values) * weights[heavy.indices], minlength=len(heavy))
