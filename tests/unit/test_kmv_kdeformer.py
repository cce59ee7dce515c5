"""KDEformer's theory: densities of exponentials, and a sampled product with bounded spectral error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from approxkmv.errors import InputError
from approxkmv.kmv.density import DensityLevels, ExactDensity, HashingBasedDensity, UniformDensity
from approxkmv.kmv.spectral_attention import spectral_attention, weighted_exponential_density


def case(n_q=150, n_k=200, d=4, d_v=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n_q, d)), rng.standard_normal((n_k, d)) + 0.5, rng.standard_normal((n_k, d_v)) + 0.3


def exact(seed):
    return ExactDensity(1.0)


def log_sums(q, p, log_w):
    logits = q @ p.T + log_w
    top = logits.max(1)
    return top + np.log(np.exp(logits - top[:, None]).sum(1))


def test_an_exact_density_gives_the_sums_themselves():
    q, p, _ = case()
    log_w = np.random.default_rng(1).standard_normal(len(p)) * 3
    # Shifts by 1,000 must neither overflow nor cost digits: float64 has 16.
    for shift in (0.0, 1000.0, -1000.0):
        found = weighted_exponential_density(q, p, log_w + shift, ExactDensity(1.0))
        np.testing.assert_allclose(found.log_sums, log_sums(q, p, log_w) + shift, atol=1e-9)
        assert found.exact_rows == 0
        assert found.tally.kernel_evaluations == len(q) * len(p)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "hashing"])
def test_estimates_of_row_sums_are_unbiased(kind):
    """12 queries, each mean within 4.5 standard errors over 300 seeds: false alarms with less than 1e-4."""
    q, p, _ = case(n_q=12)
    q, log_w = 0.3 * q, 0.3 * np.random.default_rng(1).standard_normal(len(p))
    make = {
        "uniform": lambda seed: UniformDensity(1.0, samples=40, seed=seed),
        "hashing": lambda seed: HashingBasedDensity(1.0, samples=16, scale=0.2, seed=seed),
    }[kind]
    found = np.stack([weighted_exponential_density(q, p, log_w, make(s)).log_sums for s in range(300)])
    ratio = np.exp(found - log_sums(q, p, log_w))
    error = ratio.std(0, ddof=1) / 300**0.5
    assert (np.abs(ratio.mean(0) - 1) < 4.5 * error).all()
    assert (error > 0).all()
    # A bias of an eighth would show.
    assert 4.5 * error.max() < 0.125


@pytest.mark.slow
def test_levels_keep_their_relative_error():
    """Each estimate fails with probability 0.1 at most, by the theorem.

    Of 60 that share nothing, 20 or more then fail with probability below 6e-6 (Chernoff's bound).
    """
    q, p, _ = case(n_q=60)
    failures = 0
    for seed, query in enumerate(0.5 * q):
        density = DensityLevels(1.0, relative_error=0.5, floor=1e-3, failure=0.1, seed=seed)
        found = weighted_exponential_density(query[None], p, np.zeros(len(p)), density)
        failures += abs(np.expm1(found.log_sums[0] - log_sums(query[None], p, 0.0)[0])) > 0.5
    assert failures < 20


def test_what_lies_below_the_floor_is_summed_exactly():
    q, p, _ = case(n_q=20)
    q[3] *= 40
    density = DensityLevels(1.0, relative_error=0.5, floor=1e-2, failure=0.1, seed=0, median_factor=1.0)
    log_w = np.random.default_rng(1).standard_normal(len(p))
    found = weighted_exponential_density(q, p, log_w, density)
    assert found.exact_rows >= 1
    assert found.log_sums[3] == pytest.approx(log_sums(q, p, log_w)[3], abs=1e-9)
    assert np.isfinite(found.log_sums).all()


def parts(q, k, v, scale):
    logits = scale * q @ k.T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    attention = weights / weights.sum(1, keepdims=True)
    return attention, attention @ v


def test_spectral_error_is_below_the_bound_and_falls_with_the_samples():
    """Mean over 30 seeds of the spectral error against |P|_F |V|_F / sqrt(m), which bounds its expectation.

    Sixteen times the samples, a quarter of the error; 30 seeds know the ratio to about a tenth.
    """
    q, k, v = case()
    attention, right = parts(q, k, v, 0.5)
    errors = {}
    for m in (20, 320):
        outs = [spectral_attention(q, k, v, m, scale=0.5, seed=s, density=exact).output for s in range(30)]
        errors[m] = np.mean([np.linalg.norm(out - right, 2) for out in outs])
        assert errors[m] < np.linalg.norm(attention) * np.linalg.norm(v) / m**0.5
        # Not by a bound so loose that it says nothing
        assert errors[m] > 0.2 * np.linalg.norm(attention) * np.linalg.norm(v) / m**0.5
    assert 3.0 < errors[20] / errors[320] < 5.3


def test_the_product_is_unbiased():
    """Ten projections of the output, each mean within 4.5 standard errors over 300 seeds: 1e-4 of false alarms."""
    q, k, v = case(n_q=40, n_k=60)
    _, right = parts(q, k, v, 0.5)
    along = np.random.default_rng(2).standard_normal((10, right.size))
    outs = [spectral_attention(q, k, v, 30, scale=0.5, seed=s, density=exact).output for s in range(300)]
    gaps = np.stack([along @ (out - right).ravel() for out in outs])
    assert (np.abs(gaps.mean(0)) < 4.5 * gaps.std(0, ddof=1) / 300**0.5).all()


def test_equal_keys_and_values_have_one_answer_whatever_is_drawn():
    q, k, v = case(n_k=30)
    k[:], v[:] = k[0], v[0]
    for m in (1, 7):
        out = spectral_attention(q, k, v, m, seed=0, density=exact).output
        np.testing.assert_allclose(out, np.broadcast_to(v[0], out.shape), rtol=1e-9)


def test_probabilities_are_of_column_norms_and_values():
    q, k, v = case()
    attention, _ = parts(q, k, v, 0.5)
    found = spectral_attention(q, k, v, 5, scale=0.5, seed=0, density=exact)
    columns, rows = (attention**2).sum(0), (v**2).sum(1)
    np.testing.assert_allclose(found.probabilities, 0.5 * (columns / columns.sum() + rows / rows.sum()), rtol=1e-9)
    # Each row sum and column norm from all pairs, and five columns
    assert found.kernel_evaluations == (2 * 200 + 5) * 150
    assert found.exact_rows == 0
    logits = 0.5 * q @ k.T
    np.testing.assert_allclose(found.log_row_sums, log_sums(0.5 * q, k, 0.0), atol=1e-9)
    assert np.all(found.log_row_sums >= logits.max(1))


@pytest.mark.slow
def test_with_estimated_densities_and_huge_logits():
    q, k, v = case()
    _, right = parts(q, k, v, 0.5)
    found = spectral_attention(torch.from_numpy(q), torch.from_numpy(k), torch.from_numpy(v), 4000, scale=0.5, seed=0)
    assert isinstance(found.output, torch.Tensor)
    # Row sums to within a half, most of them much closer, and 4,000 samples
    assert np.linalg.norm(found.output.numpy() - right, 2) < 0.3 * np.linalg.norm(right, 2)
    sharp = spectral_attention(q, k, v, 10, scale=1e4, seed=0)
    assert np.isfinite(sharp.output).all()
    # Rows and columns, of which each alone is fewer
    assert sharp.exact_rows > max(len(q), len(k))
    assert np.isfinite(spectral_attention(q, k, 0 * v, 10, seed=0).output).all()


def test_bad_input_is_one_line():
    q, k, v = case()
    with pytest.raises(InputError, match="a row for each of the 200 keys"):
        spectral_attention(q, k, v[:7], 5)
    with pytest.raises(InputError, match=r"logits may be 1e\+20"):
        spectral_attention(np.full((5, 1), 1e10), np.linspace(0.0, 1e10, 7)[:, None], v[:7], 5)
    with pytest.raises(InputError, match="samples is 0"):
        spectral_attention(q, k, v, 0)
    with pytest.raises(InputError, match=r"bandwidth 2\.0"):
        weighted_exponential_density(q, k, np.zeros(len(k)), ExactDensity(2.0))
    with pytest.raises(InputError, match="log_weights"):
        weighted_exponential_density(q, k, np.zeros(3), ExactDensity(1.0))
