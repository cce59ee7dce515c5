"""KDEformer as a theorem: row sums and column norms from kernel densities, and a product with sampled columns.

P = D^-1 exp(scale q k^T), where D holds the row sums. None of the three steps forms P:
1. row sums by a weighted exponential kernel density, sum_j exp(scale <q_i, k_j>);
2. squared column norms by another, |P_j|^2 = sum_i exp(2 scale <q_i, k_j>) / D_i^2;
3. draw m columns of P with probability p_j >= |P_j| |v_j| / (|P|_F |V|_F), each weighted by 1 / (m p_j).

With exact densities the product is unbiased with E|out - P V|_F^2 <= |P|_F^2 |V|_F^2 / m, since the variance of one
term is at most sum_j |P_j|^2 |v_j|^2 / p_j. So the spectral error is at most epsilon |P|_op |V|_op, in expectation,
with m = srank(P) srank(V) / epsilon^2 columns, srank(X) = |X|_F^2 / |X|_op^2.

Source: Zandieh, Han, Daliri & Karbasi (2023), Definition 3.1, Lemma 3.1, Theorems 3.2 to 3.4. Departures: the bound
above is the elementary one, by the Frobenius norm; weights of points become one more coordinate, as the norms of keys
do in Lemma 4.1 of Indyk, Kapralov, Sheth & Wagner, so that any density estimator of this package can be used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from approxkmv.arrays import LARGEST_PRODUCT, Array, resolve_scale
from approxkmv.errors import InputError
from approxkmv.kmv import inputs
from approxkmv.kmv.attention_product import best_origin
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.density import DensityLevels, KernelDensity
from approxkmv.kmv.density.base import row_blocks

MakeDensity: TypeAlias = Callable[[int], KernelDensity]
"""Makes an estimator of bandwidth 1 from a seed."""


def density_levels(seed: int) -> KernelDensity:
    """The estimator of their Theorem 2.1, to within a factor of a half: constants that run at a few thousand points."""
    return DensityLevels(1.0, relative_error=0.5, floor=1e-3, failure=0.1, seed=seed, median_factor=1.0)


@dataclass(frozen=True)
class ExponentialDensity:
    """Weighted sums of exponentials and their cost."""

    log_sums: np.ndarray
    """(n_q,) log sum_j w_j exp(<q_i, p_j>)."""
    exact_rows: int
    """Queries that were summed exactly, because their density was below the estimator's floor."""
    tally: Tally


def weighted_exponential_density(
    queries: np.ndarray, points: np.ndarray, log_weights: np.ndarray, density: KernelDensity
) -> ExponentialDensity:
    """Estimate log sum_j w_j exp(<q_i, p_j>) for every query by a Gaussian kernel density of bandwidth 1.

    >>> from approxkmv.kmv.density import ExactDensity
    >>> q, p, log_w = np.zeros((2, 3)), np.ones((4, 3)), np.log(np.full(4, 2.0))
    >>> found = weighted_exponential_density(q, p, log_w, ExactDensity(1.0))
    >>> np.exp(found.log_sums).round(6).tolist()
    [8.0, 8.0]

    exp(<q, p>) = exp(|q|^2 / 2) exp(|p|^2 / 2) exp(-|q - p|^2 / 2), and w exp(|p|^2 / 2) becomes a coordinate h of p
    with exp(-h^2 / 2) proportional to it. So each sum is a constant of its query times the density: it is unbiased, or
    has a small relative error, if the density does.

    Args:
        queries: (n_q, d). points: (n_p, d). log_weights: (n_p,), natural logarithms. density: of bandwidth 1, not
        fitted yet.
    Returns:
        An ExponentialDensity.
    Raises:
        InputError: mismatched shapes, a non-finite value, a density whose bandwidth is not 1.
    """
    q, p = (inputs.bounded(part, "queries or points", 1e150) for part in inputs.points(queries, points))
    log_w = inputs.vector(log_weights, "log_weights", len(p))
    if density.sigma != 1.0:
        raise InputError(f"the density has bandwidth {density.sigma!r}: give one of bandwidth 1")
    # Centring the points and rescaling the two sides against each other changes no product and makes the sums large.
    centre, balance = (np.asarray(part) for part in best_origin(torch.from_numpy(q), torch.from_numpy(p)))
    moved_q, moved_p = q * balance, (p - centre) / balance
    logs = log_w + 0.5 * (moved_p**2).sum(1)
    largest = float(logs.max())
    heights = np.sqrt(2.0 * (largest - logs))
    density.fit(np.column_stack([moved_p, heights]))
    values = density.query(np.column_stack([moved_q, np.zeros(len(q))]))
    with np.errstate(divide="ignore"):
        log_sums = np.log(values) + np.log(len(p)) + largest + 0.5 * (moved_q**2).sum(1) + q @ centre
    missed = np.flatnonzero(~(values > 0))
    for rows in row_blocks(len(missed), len(p), density.block_entries):
        logits = q[missed[rows]] @ p.T + log_w
        shift = logits.max(1)
        log_sums[missed[rows]] = shift + np.log(np.exp(logits - shift[:, None]).sum(1))
    pairs = len(missed) * len(p)
    return ExponentialDensity(log_sums, len(missed), density.tally + Tally(pairs, pairs))


@dataclass(frozen=True)
class SampledAttention:
    """The product with a few columns of the attention matrix."""

    output: Array
    """(n_q, d_v)."""
    log_row_sums: np.ndarray
    """(n_q,) estimated log D_i."""
    probabilities: np.ndarray
    """(n_k,) the probabilities with which columns were drawn."""
    exact_rows: int
    """Row sums and column norms that were summed exactly, because their density was below the estimator's floor."""
    kernel_evaluations: int


def spectral_attention(
    q: Array,
    k: Array,
    v: Array,
    samples: int,
    *,
    scale: float | None = None,
    seed: int | None = None,
    density: MakeDensity = density_levels,
) -> SampledAttention:
    """Approximate P v, P = softmax(scale q k^T), with a small error in spectral norm.

    >>> r = spectral_attention(np.zeros((5, 4)), np.zeros((6, 4)), np.ones((6, 2)), 3, seed=0)
    >>> r.output.shape, r.probabilities.sum().round(6).item()
    ((5, 2), 1.0)

    A relative error of delta in the row sums scales the rows of the output by as much. In the column norms it costs a
    factor of at most 1 / (1 - delta)^2 in the number of samples, and no bias.

    Args:
        q: (n_q, d). k: (n_k, d). v: (n_k, d_v). Torch tensors or NumPy arrays. samples: m, columns drawn.
        scale: of the logits; None means 1/sqrt(d). seed: for a reproducible answer. density: makes an estimator of
        bandwidth 1 from a seed; by default `DensityLevels`.
    Returns:
        A SampledAttention; output in float64, of the same kind of array as q.
    Raises:
        InputError: mismatched shapes, a non-finite value, samples or scale not positive, logits beyond 1e15, of which
        float64 holds nothing after the point.
    """
    queries, keys = (inputs.bounded(part, "q or k", 1e50) for part in inputs.points(q, k))
    inputs.same_kind(q, "q", v, "v")
    values = inputs.bounded(inputs.matrix(v, "v"), "v", LARGEST_PRODUCT)
    if len(values) != len(keys):
        raise InputError(f"v {values.shape} must have a row for each of the {len(keys)} keys")
    s = resolve_scale(scale, queries.shape[1])
    m = inputs.count(samples, "samples")
    largest = s * float(np.linalg.norm(queries, axis=1).max() * np.linalg.norm(keys, axis=1).max())
    if largest > 1e15:
        raise InputError(f"logits may be {largest:.0e}, but float64 holds weights up to 1e15: scale q or k down")
    seeds = [int(part) for part in inputs.seed_sequence(seed).generate_state(3)]

    rows = weighted_exponential_density(s * queries, keys, np.zeros(len(keys)), density(seeds[0]))
    columns = weighted_exponential_density(2 * s * keys, queries, -2 * rows.log_sums, density(seeds[1]))
    norms = np.exp(columns.log_sums - columns.log_sums.max())
    of_values = (values**2).sum(1)
    # The mean of the two shares is at least their geometric mean, |P_j| |v_j| / (|P|_F |V|_F).
    shares = [norms / norms.sum(), of_values / of_values.sum()] if of_values.any() else [norms / norms.sum()]
    p = np.mean(shares, axis=0)
    p /= p.sum()
    drawn = np.random.default_rng(seeds[2]).choice(len(keys), m, p=p)
    weighted = values[drawn] / (m * p[drawn])[:, None]
    out = np.empty((len(queries), values.shape[1]))
    for part in row_blocks(len(queries), m, 1 << 22):
        logits = s * queries[part] @ keys[drawn].T - rows.log_sums[part, None]
        out[part] = np.exp(logits) @ weighted
    return SampledAttention(
        output=inputs.back_to_kind(q)(out),
        log_row_sums=rows.log_sums,
        probabilities=p,
        exact_rows=rows.exact_rows + columns.exact_rows,
        kernel_evaluations=(rows.tally + columns.tally).kernel_evaluations + len(queries) * m,
    )
