"""What the printed constants cost: evaluations against n, fitted exponents, and the n from which they beat n^2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from approxkmv.errors import InputError
from approxkmv.kmv import inputs
from approxkmv.kmv.algorithm import run_parts
from approxkmv.kmv.constants import PRINTED, PaperConstants
from approxkmv.kmv.gaussian import GaussianKernel
from approxkmv.kmv.heavy import DEFAULT_MEMORY, scan_buckets
from approxkmv.kmv.light import bucket
from approxkmv.kmv.sparse_kernels import SPARSE_KERNELS
from approxkmv.slopes import log_log_line

PAPER_EXPONENT = 1.89
# Those of approx_kmv
_ALPHA, _GAMMA = 1 / 3, 0.109
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
FITTED = ("total", "total_printed", "heavy", "hash", "density_printed")
COLUMNS = {
    "kernel": "which point set of `sparse_kernels`",
    "n": "queries and keys",
    "seed": "of points, x and algorithm",
    "rows": "rows evaluated; row costs are scaled to n",
    "tail_to_head": "c of assumption (A), from the rows evaluated",
    "tables": "T of Algorithm 1",
    "hash": "hash functions evaluated, T times 2n",
    "large": "kernel evaluations for H_1",
    "heavy": "kernel evaluations of Algorithm 1: collisions scanned, with repetition",
    "density": "kernel evaluations for exact bucket densities",
    "density_printed": "Theorem 2.2's n beta^-2 mu^-0.173 ln(1/delta) over all buckets, hidden constant 1",
    "light": "kernel evaluations of Algorithm 2, line 9: surviving keys of all repetitions",
    "light_printed": "the same with line 7 as printed (`PaperConstants.subtract_rounded` False)",
    "total": "large + heavy + light + the cheaper of density and density_printed",
    "total_printed": "the same with light_printed",
    "distinct": "kernel evaluations actually computed",
    "n_squared": "kernel evaluations of the exact product",
}


def bound_exponents(growth: np.ndarray, *, rebalanced: bool) -> np.ndarray:
    """The exponent of n in the bound on ApproxKMV's running time when c grows like n^g: float64 of growth's shape.

    >>> bound_exponents(np.array([0.0, 0.2]), rebalanced=False).round(3).tolist()
    [1.891, 1.991]

    The proofs use the assumption only as |K|_1 <= (1 + c) n. With c = n^g their terms have the exponents 2 - gamma
    (heavy coordinates), 1 + 2 alpha + g (heavy keys), 2 + gamma - alpha + g and 2 + gamma - beta + g (samples for light
    keys) and 1.346 + 2 beta (density estimation). Minimising the largest of these over alpha and gamma, with beta =
    0.218 as printed, gives max(1.891 + g/2, 1.8 + 0.6 g); minimising over beta too (`rebalanced`) gives
    max(1.8692 + 0.4 g, 1.8 + 0.6 g). Above 2 the exact product is cheaper, and 2 is returned.

    Args:
        growth: g of each head; negative values count as 0, since c is then bounded.
    Source: proofs of Lemmas 3.2, 3.4 and 3.5 (appendix A.2) and of Theorem 1.1, for c that is not constant.
    """
    g = np.maximum(np.asarray(growth, np.float64), 0.0)
    density = 1.8692 + 0.4 * g if rebalanced else 1.891 + 0.5 * g
    return np.minimum(np.maximum(density, 1.8 + 0.6 * g), 2.0)


def measure_costs(
    sizes: Sequence[int] = SIZES,
    *,
    kernels: Sequence[str] = tuple(SPARSE_KERNELS),
    seeds: int = 2,
    epsilon: float = 0.5,
    rows: int = 256,
) -> pd.DataFrame:
    """Count the evaluations of Algorithms 1 to 3 at growing n, on kernels that satisfy assumption (A), for Gaussian x.

    >>> measure_costs([64, 128], kernels=["clusters"], seeds=1)[["n", "tables", "hash"]].to_numpy().tolist()
    [[64, 167, 21376], [128, 245, 62720]]

    The cost of a row does not depend on the other rows, so a random sample of rows is run against all n keys and
    scaled up; each row is allowed the error it has among n rows. Samples are counted, not drawn (`counts_only`).

    Args:
        sizes: the values of n. kernels: names in `SPARSE_KERNELS`. seeds: repetitions per size. epsilon: as in
        approx_kmv, whose other options have their defaults. rows: the most rows to run.
    Returns:
        One row per kernel, size and seed, with the columns of `COLUMNS`.
    Raises:
        InputError: an unknown kernel, no sizes, or a number out of range.
    Source: Theorem 1.1 and Lemmas 3.2, 3.4 and 3.5, whose sums are counted here instead of bounded.
    """
    if not len(sizes):
        raise InputError("sizes is empty: give at least one n")
    for n in sizes:
        if inputs.count(n, "an entry of sizes") < 2:
            raise InputError(f"an entry of sizes is {n}: it must be at least 2, since costs have a factor ln n")
    for name in kernels:
        inputs.choice(name, "an entry of kernels", tuple(SPARSE_KERNELS))
    error = inputs.error(epsilon)
    inputs.count(seeds, "seeds")
    inputs.count(rows, "rows")
    lines = [_measure(name, int(n), seed, error, rows) for name, n, seed in product(kernels, sizes, range(seeds))]
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _measure(name: str, n: int, seed: int, epsilon: float, rows: int) -> dict[str, object]:
    points = SPARSE_KERNELS[name](n, seed)
    rng = np.random.default_rng([seed, n])
    chosen = np.sort(rng.permutation(n)[:rows])
    x = rng.standard_normal(n)
    kernel = GaussianKernel(points.queries[chosen], points.keys, points.sigma)
    found_source, light_source = np.random.SeedSequence([seed, n]).spawn(2)
    found = scan_buckets(
        kernel, alpha=_ALPHA, source=found_source, family="p-stable", constants=PRINTED, memory=DEFAULT_MEMORY
    )
    (parts, light), (_, printed) = (
        run_parts(
            kernel,
            x,
            found,
            epsilon=epsilon,
            gamma=_GAMMA,
            density="exact",
            constants=PaperConstants(subtract_rounded=rounded),
            source=source,
            memory=DEFAULT_MEMORY,
            all_rows=n,
        )
        for rounded, source in zip((True, False), light_source.spawn(2), strict=True)
    )
    share = n / len(chosen)
    counted = {
        "large": n * len(parts.large),
        "heavy": found.tally.kernel_evaluations * share,
        "density": n * len(parts.kept),
        "density_printed": n * _printed_density(parts.scaled, parts.kept, n, epsilon),
        "light": light.sampling_tally.kernel_evaluations * share,
        "light_printed": printed.sampling_tally.kernel_evaluations * share,
    }
    rest = counted["large"] + counted["heavy"] + min(counted["density"], counted["density_printed"])
    return {
        "kernel": name,
        "n": n,
        "seed": seed,
        "rows": len(chosen),
        "tail_to_head": _tail_to_head(kernel, n),
        "tables": found.tables,
        "hash": found.tables * 2 * n,
        **counted,
        "total": rest + counted["light"],
        "total_printed": rest + counted["light_printed"],
        "distinct": (found.tally.distinct_evaluations + light.density_tally.distinct_evaluations) * share
        + counted["large"],
        "n_squared": n * n,
    }


def _printed_density(scaled: np.ndarray, kept: np.ndarray, n: int, epsilon: float) -> float:
    """Evaluations per query by the bound of Theorem 2.2, over all buckets of Algorithm 2, line 5."""
    if not len(kept):
        return 0.0
    b = bucket(scaled, kept, epsilon / PRINTED.epsilon_divisor)
    floors = epsilon**2 / (n * math.log(n) ** 2 * b.rounded * b.sizes)
    per_bucket = PRINTED.density_error(n) ** -2 * np.maximum(floors, 1e-300) ** -PRINTED.density_exponent
    return float(per_bucket.sum() * math.log(1 / PRINTED.density_failure(n)))


def _tail_to_head(kernel: GaussianKernel, n: int) -> float:
    """c of assumption (A) on the sampled rows, with as many largest entries as rows: n if there are n rows."""
    entries = np.exp(kernel.log_rows(slice(0, kernel.n_queries))).ravel()
    head = np.partition(entries, len(entries) - kernel.n_queries)[len(entries) - kernel.n_queries :].sum()
    return float((entries.sum() - head) / head)


def fit_exponents(table: pd.DataFrame, *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Exponents of n with 95 % intervals, and the n at which the cost would fall below n^2.

    >>> n = np.array([256, 1024, 4096, 16384])
    >>> table = pd.DataFrame({"kernel": "k", "n": n, "seed": 0, **{c: 50.0 * n**1.5 * np.log(n) for c in FITTED}})
    >>> fits = fit_exponents(table, draws=50)
    >>> fits.loc[0, ["exponent", "log10_crossing"]].astype(float).round(1).tolist()
    [1.5, 5.6]

    Two models are fitted: cost = C n^a, whose exponent is `plain_exponent`, and cost = C n^a ln n, whose a is
    `exponent`. The second is used to extrapolate, since the printed T and number of averages each contain one
    logarithm. `log10_crossing` is log10 of the n beyond which the second model stays below n^2, infinite if a >= 2.
    Intervals are percentiles over bootstrap samples of (size, seed) pairs: they say how well the line is known, not
    whether the law stays a line that far out. `log10_crossing_paper` assumes the paper's exponent and takes C from
    the largest n.

    Args:
        table: from `measure_costs`. draws: bootstrap samples. seed: of the bootstrap.
    Returns:
        One row per kernel and quantity of `FITTED`.
    Raises:
        InputError: fewer than three sizes of one kernel.
    """
    rng = np.random.default_rng(seed)
    lines = []
    for name, group in table.groupby("kernel", sort=False):
        n = group["n"].to_numpy(np.float64)
        if len(np.unique(n)) < 3:
            raise InputError(f"kernel {name!r} was measured at fewer than three sizes: an exponent needs three")
        samples = rng.integers(0, len(n), (draws, len(n)))
        # A bootstrap sample of only one or two sizes has no meaningful slope.
        samples = samples[np.array([len(np.unique(n[s])) > 2 for s in samples])]
        log_n, log_log = np.log(n), np.log(np.log(n))
        for quantity in FITTED:
            cost = np.log(group[quantity].to_numpy(np.float64))
            plain, *_ = log_log_line(n, group[quantity])
            slope, level = np.polyfit(log_n, cost - log_log, 1)
            spread = np.array([np.polyfit(log_n[s], (cost - log_log)[s], 1) for s in samples])
            plains = np.array([np.polyfit(log_n[s], cost[s], 1)[0] for s in samples])
            crossings = np.array([log10_crossing(a, c) for a, c in spread])
            last = log_n == log_n.max()
            paper_level = float((cost - log_log - PAPER_EXPONENT * log_n)[last].mean())
            lines.append(
                {
                    "kernel": name,
                    "quantity": quantity,
                    "exponent": slope,
                    "exponent_low": np.quantile(spread[:, 0], 0.025),
                    "exponent_high": np.quantile(spread[:, 0], 0.975),
                    "plain_exponent": plain,
                    "plain_low": np.quantile(plains, 0.025),
                    "plain_high": np.quantile(plains, 0.975),
                    "paper_exponent": PAPER_EXPONENT,
                    "over_n_squared": float(np.exp(cost - 2 * log_n)[last].mean()),
                    "log10_crossing": log10_crossing(slope, level),
                    "log10_crossing_low": _quantile(crossings, 0.025),
                    "log10_crossing_high": _quantile(crossings, 0.975),
                    "log10_crossing_paper": log10_crossing(PAPER_EXPONENT, paper_level),
                }
            )
    return pd.DataFrame(lines)


def log10_crossing(exponent: float, log_factor: float) -> float:
    """log10 of the largest n > e with factor * n^exponent * ln n >= n^2: 0 where there is none, infinite when the
    exponent is 2 or more.

    >>> round(log10_crossing(1.5, np.log(50.0)), 1)
    5.6
    """
    gap = 2.0 - exponent
    if gap <= 0:
        return math.inf

    def beyond(u: float) -> float:
        return gap * u - math.log(u) - log_factor

    # With u = ln n this grows beyond u = 1/gap; it is above 0 at the upper end, since ln u <= gap u/2 + ln(2/gap) - 1.
    low = max(1.0 / gap, 1.0)
    if beyond(low) >= 0:
        return 0.0
    return math.log10(math.e) * brentq(beyond, low, 2.0 * (log_factor + math.log(2.0 / gap)) / gap)


def _quantile(values: np.ndarray, at: float) -> float:
    """A quantile of values that may be infinite, without interpolating between finite and infinite ones."""
    return float(np.quantile(values, at, method="nearest"))
