"""ApproxLight (Algorithm 2): the contribution of the light keys of T, estimated by sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from approxkmv.kmv import inputs, sampling
from approxkmv.kmv.constants import PaperConstants
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.density import DensityLevels
from approxkmv.kmv.gaussian import GaussianKernel
from approxkmv.kmv.heavy import HeavyKeys

DENSITIES = ("auto", "exact", "levels")

# Bounds on a bucket's epsilon: (1 + epsilon)^m stays in range, and 1 + epsilon has digits of epsilon left.
_NARROWEST_BUCKET, _WIDEST_BUCKET = 1e-12, 1.0


@dataclass(frozen=True)
class Buckets:
    """The keys of T by size of their entry of x: the non-empty B_m of Algorithm 2, line 3."""

    order: np.ndarray
    """Keys of T, bucket by bucket."""
    starts: np.ndarray
    """Position in `order` at which each bucket starts."""
    sizes: np.ndarray
    """|B_m|."""
    rounded: np.ndarray
    """(1 + epsilon)^m: the rounded-up squares of the bucket's entries."""

    def __len__(self) -> int:
        return len(self.sizes)


def bucket(scaled: np.ndarray, kept: np.ndarray, epsilon: float) -> Buckets:
    """Partition T into B_m = {j : x_j^2 in ((1+epsilon)^(m-1), (1+epsilon)^m]}.

    >>> b = bucket(np.array([1.0, 2.0, 1.1, 2.0]), np.arange(4), epsilon=0.5)
    >>> b.order, b.sizes
    (array([0, 2, 1, 3]), array([1, 1, 2]))

    The intervals are half open, so each key is in one bucket; the paper closes both ends.

    Source: Algorithm 2, lines 3 and 4.
    """
    ratio = 1.0 + min(max(epsilon, _NARROWEST_BUCKET), _WIDEST_BUCKET)
    square = scaled[kept] ** 2
    m = np.ceil(np.log(square) / math.log(ratio) - 1e-12).astype(np.int64)
    order = np.argsort(m, kind="stable")
    values, starts, sizes = np.unique(m[order], return_index=True, return_counts=True)
    return Buckets(kept[order], starts, sizes, ratio ** values.astype(np.float64))


@dataclass(frozen=True)
class LightSum:
    """What Algorithm 2 returns, with the budgets it chose."""

    z: np.ndarray
    """(n_q,): the estimated contribution of the light keys, for x rescaled to |x|_2^2 = n."""
    squared_sum: np.ndarray
    """(n_q,): s_i of line 7."""
    repetitions: np.ndarray
    """(n_q,) float64: ceil(10 n s_i / epsilon^2), the repetitions in one average."""
    averages: int
    """The number of averages whose median is taken."""
    density_tally: Tally
    sampling_tally: Tally
    level_buckets: int
    """The number of buckets whose density came from `DensityLevels`; the other densities are exact."""


# Bytes per key: for one row (kernel values, their squares, at most one bucket per key), and for one average's counts.
_ROW_BYTES, _COUNT_BYTES = 64, 24


def least_light_memory(n_q: int, n_k: int, averages: int) -> int:
    """The least memory, in bytes, that ApproxLight accepts: one row with its samples, and vectors."""
    return 2 * n_k * (_ROW_BYTES + averages * _COUNT_BYTES) + 64 * (n_q + n_k) + (1 << 18)


@dataclass(frozen=True)
class Errors:
    """How the error of the light keys' sum is shared out."""

    row: float
    """Of the samples of one row."""
    bucket: float
    """Buckets hold entries whose squares differ by a factor of 1 + this at most."""
    hidden: float
    """What all buckets below the density floor may add up to, per row."""


def approx_light(
    kernel: GaussianKernel,
    scaled: np.ndarray,
    kept: np.ndarray,
    heavy: HeavyKeys,
    errors: Errors,
    *,
    density: str,
    constants: PaperConstants,
    source: np.random.SeedSequence,
    memory: int,
    counts_only: bool = False,
) -> LightSum:
    """Estimate the sum over j in T \\ S_i of K_ij x_j, each row to within `errors.row` (Algorithm 2, ApproxLight).

    A row whose budget exceeds the number of keys is evaluated once, and the counts of its samples are drawn, which has
    the same distribution; at sizes that fit on a computer this happens in every row with a light key of any weight.
    A density estimated below its floor is 0 and, as in the proof, the bucket is left out of that row, both of s_i and
    of the samples: in the samples its keys would add a variance that the budget does not account for. Leaving out all
    hidden buckets costs at most `errors.hidden` per row.

    Args:
        kernel: of the queries and keys. scaled: (n_k,) x with |x|_2^2 = n_k. kept: the set T. heavy: the sets S_i.
        errors: how the error is shared out.
        density: "exact", "levels", or "auto": levels for buckets where they could cost less than exact.
        constants: the printed constants. source: of the random numbers. memory: bytes of temporary storage.
        counts_only: count the samples without drawing them; z stays 0. For cost studies.
    Returns:
        A LightSum.
    Source: Algorithm 2, Lemma 3.5 and its proof.
    """
    inputs.choice(density, "density", DENSITIES)
    n_q, n = kernel.n_queries, kernel.n_keys
    n_union = max(n_q, n)
    averages = constants.averages(n_union)
    beta = constants.density_error(n)
    delta = constants.density_failure(n_union)
    z, squared_sum, repetitions = np.zeros(n_q), np.zeros(n_q), np.zeros(n_q)
    if not len(kept):
        return LightSum(z, squared_sum, repetitions, averages, Tally(), Tally(), 0)

    buckets = bucket(scaled, kept, errors.bucket)
    # The proof bounds the O(log n) buckets by log n; at constant epsilon there are 4 log n / log(1 + epsilon).
    count = max(math.log(n), len(buckets))
    weight = buckets.rounded * buckets.sizes
    floors = errors.hidden**2 / (n * count**2 * weight)
    seeds = source.spawn(len(buckets) + 1)
    by_levels = _by_levels(kernel, buckets, floors, beta, delta, density, seeds, memory)
    density_tally = Tally()
    given = np.zeros((n_q, len(by_levels)))
    for column, levels in enumerate(by_levels.values()):
        given[:, column] = levels.query(kernel.queries)
        density_tally += levels.tally
    from_levels = np.fromiter(by_levels, dtype=np.int64)
    exact = np.setdiff1d(np.arange(len(buckets)), from_levels)

    x_t = scaled[buckets.order]
    bucket_of = np.repeat(np.arange(len(buckets)), buckets.sizes)
    position = np.full(n, -1)
    position[buckets.order] = np.arange(len(buckets.order))
    rng = np.random.default_rng(seeds[-1])
    asked = computed = 0
    n_t = len(x_t)
    spare = memory // 2 - averages * n_t * _COUNT_BYTES
    block = int(max(1, min(n_q, spare // (n_t * _ROW_BYTES + 8 * averages))))
    for start in range(0, n_q, block):
        stop = min(start + block, n_q)
        estimates = np.zeros((stop - start, len(buckets)))
        estimates[:, from_levels] = given[start:stop]
        values = np.exp(kernel.log_rows(slice(start, stop), buckets.order)) if len(exact) else None
        if values is not None:
            if len(exact) == len(buckets):
                estimates = np.add.reduceat(values**2, buckets.starts, axis=1) / buckets.sizes
            else:
                for b in exact:
                    s = slice(buckets.starts[b], buckets.starts[b] + buckets.sizes[b])
                    estimates[:, b] = (values[:, s] ** 2).mean(1)
            density_tally += Tally((stop - start) * int(buckets.sizes[exact].sum()), values.size)
        visible = estimates >= (1 - beta) * floors
        total = np.where(visible, estimates * weight, 0.0).sum(1)

        s, e = heavy.starts[start], heavy.starts[stop]
        row = np.repeat(np.arange(stop - start), np.diff(heavy.starts[start : stop + 1]))
        place = position[heavy.indices[s:e]]
        row, place, log_value = row[place >= 0], place[place >= 0], heavy.log_values[s:e][place >= 0]
        shown = visible[row, bucket_of[place]]
        # S_i also holds keys outside T; only those inside are in the total.
        squares = buckets.rounded[bucket_of[place]] if constants.subtract_rounded else x_t[place] ** 2
        known = np.bincount(row[shown], (squares * np.exp(2 * log_value))[shown], stop - start)
        light = visible[:, bucket_of]
        light[row, place] = False
        lights = light.sum(1)
        # Line 7 prints t + n^-0.218 t, which exceeds the sum only if t does, but t may be too small by the same factor.
        over = total / (1.0 - beta)
        s_i = np.where(lights > 0, np.maximum(over - known, 0.0), 0.0)
        budget = np.ceil(constants.repetition_factor * n * s_i / errors.row**2)
        rounds = np.where(lights > 0, np.maximum(1.0, budget), 0)
        squared_sum[start:stop], repetitions[start:stop] = s_i, rounds
        if counts_only:
            asked += sum(
                sampling.survivors(int(r) * averages * int(k), n, rng) for r, k in zip(rounds, lights, strict=True)
            )
            continue
        if values is not None:
            values *= x_t
        means = np.zeros((stop - start, averages))
        for i in np.flatnonzero(lights):
            row_rounds = int(rounds[i])
            if values is not None or row_rounds * averages * int(lights[i]) > n * n_t:
                keys = np.flatnonzero(light[i])
                if values is not None:
                    weights = values[i, keys]
                else:
                    logs = kernel.log_rows(slice(start + i, start + i + 1), buckets.order[keys])[0]
                    weights = np.exp(logs) * x_t[keys]
                    computed += len(keys)
                means[i], survivors = sampling.averages_of_counts(weights, row_rounds, averages, n, rng)
                asked += survivors
            else:
                keys = np.flatnonzero(light[i])
                group, key = sampling.draw_survivors(len(keys), row_rounds, averages, n, rng)
                met, back = np.unique(key, return_inverse=True)
                logs = kernel.log_pairs(np.full(len(met), start + i), buckets.order[keys[met]])
                terms = (np.exp(logs) * x_t[keys[met]])[back]
                means[i] = np.bincount(group, terms, averages) * (n / row_rounds)
                asked += len(key)
                computed += len(met)
        z[start:stop] = np.median(means, axis=1)
    return LightSum(z, squared_sum, repetitions, averages, density_tally, Tally(asked, computed), len(by_levels))


def _by_levels(
    kernel: GaussianKernel,
    buckets: Buckets,
    floors: np.ndarray,
    beta: float,
    delta: float,
    density: str,
    seeds: list[np.random.SeedSequence],
    memory: int,
) -> dict[int, DensityLevels]:
    """Fitted structures of Theorem 2.2 for the buckets whose density of k^2 they estimate."""
    chosen: dict[int, DensityLevels] = {}
    if density == "exact":
        return chosen
    for b in range(len(buckets)):
        if floors[b] >= 1.0:
            # Even a bucket of keys that all equal the query would be below the floor; exact is no more expensive.
            continue
        # k^2 is a Gaussian kernel of bandwidth sigma / sqrt(2); the kernel's points are in units of sigma sqrt(2).
        levels = DensityLevels(
            0.5, relative_error=beta, floor=float(floors[b]), failure=delta, seed=int(seeds[b].generate_state(1)[0])
        )
        if density == "levels" or levels.least_evaluations() < buckets.sizes[b]:
            members = buckets.order[buckets.starts[b] : buckets.starts[b] + buckets.sizes[b]]
            levels.block_entries = max(1, memory // 128)
            levels.fit(kernel.keys[members])
            chosen[b] = levels
    return chosen
