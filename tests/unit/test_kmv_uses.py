"""The two uses of the product: the top eigenvalue, and attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kmv_kernels import DATA, background, even_spread

from approxkmv import approx_attention, approx_kmv, top_eigenvalue
from approxkmv.errors import InputError
from approxkmv.kernels import reduce_attention
from approxkmv.kmv import attention_product as attention_product_module
from approxkmv.kmv.algorithm import KMVResult
from approxkmv.kmv.attention_product import attention_product, best_origin


def points_of(name: str) -> tuple[np.ndarray, float]:
    rng = np.random.default_rng(0)
    if name == "background":
        case = background(60)
        return case.keys, case.sigma
    if name == "even spread":
        case = even_spread(60)
        return case.keys, case.sigma
    if name == "one cluster":
        return np.concatenate([0.2 * rng.standard_normal((15, 3)), 30 * rng.standard_normal((45, 3))]), 1.0
    return 100.0 * np.arange(60.0)[:, None], 1.0


@pytest.mark.parametrize("name", ["background", "even spread", "one cluster", "identity"])
def test_top_eigenvalue_is_within_epsilon(name):
    points, sigma = points_of(name)
    matrix = np.exp(-((points[:, None] - points[None]) ** 2).sum(-1) / (2 * sigma**2))
    exact = np.linalg.eigvalsh(matrix)[-1]
    result = top_eigenvalue(points, sigma, 0.25, seed=1)
    assert abs(result.value - exact) <= 0.25 * exact
    vector = np.asarray(result.vector)
    assert np.linalg.norm(vector) == pytest.approx(1.0)
    assert vector @ matrix @ vector >= 0.75 * exact
    assert result.iterations == math.ceil(math.log(60 / 0.25) / 0.25) + 1


def test_one_power_step_is_not_enough():
    """The start alone misses the eigenvalue of a small cluster: the steps are what finds it."""
    points, sigma = points_of("one cluster")
    assert top_eigenvalue(points, sigma, 0.25, seed=1, iterations=1).value < 0.75 * 12
    assert top_eigenvalue(points, sigma, 0.25, seed=1).value > 0.75 * 12


def test_power_steps_are_products_to_a_quarter_of_epsilon():
    points, sigma = points_of("background")
    x, heavy, quotients, evaluations = np.full(60, 60**-0.5), None, [], 0
    for seed in np.random.SeedSequence(3).generate_state(2, np.uint64):
        made = approx_kmv(points, points, x, sigma=sigma, epsilon=0.5 / 4, seed=int(seed), heavy=heavy)
        heavy, evaluations = made.heavy, evaluations + made.kernel_evaluations
        quotients.append(x @ made.y)
        x = made.y / np.linalg.norm(made.y)
    found = top_eigenvalue(points, sigma, 0.5, seed=3, iterations=2)
    assert found.value == pytest.approx(max(quotients), rel=1e-12)
    assert found.kernel_evaluations == evaluations


def test_top_eigenvalue_repeats_and_keeps_the_kind():
    points, sigma = points_of("one cluster")
    a = top_eigenvalue(points, sigma, 0.5, seed=3)
    b = top_eigenvalue(torch.from_numpy(points), sigma, 0.5, seed=3)
    assert a.value == b.value
    assert isinstance(b.vector, torch.Tensor)
    # Points so far apart that K is the identity: the practical method ends after a step, and says so.
    found = top_eigenvalue(100.0 * torch.eye(20), 1.0, 0.25, method="practical", seed=1)
    assert found.iterations == 1
    assert found.vector.dtype == torch.float64
    # The sets S_i are found once: one step hashes, the others do not.
    assert a.hash_evaluations == top_eigenvalue(points, sigma, 0.5, seed=3, iterations=1).hash_evaluations


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((np.zeros((0, 2)), 1.0, 0.5), "empty"),
        ((np.zeros(3), 1.0, 0.5), "matrix"),
        ((np.zeros((3, 2)), 0.0, 0.5), "sigma"),
        ((np.zeros((3, 2)), 1.0, 0.0), "epsilon"),
        ((np.zeros((3, 2)), 1.0, 1.0), "below 1"),
    ],
)
def test_top_eigenvalue_refuses_bad_input(arguments, word):
    with pytest.raises(InputError, match=word):
        top_eigenvalue(*arguments)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    s = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(s * (q.double() @ k.double().mT), -1) @ v.double()


def assert_within(output, exact, v, epsilon):
    error = torch.linalg.vector_norm(output - exact, dim=-2)
    bound = torch.maximum(torch.linalg.vector_norm(v, dim=-2), torch.linalg.vector_norm(exact, dim=-2))
    assert torch.all(torch.linalg.vector_norm(exact, dim=-2) > epsilon * bound), "zeros are within epsilon too"
    assert torch.all(error <= epsilon * bound)


def drawn(factor: float, n_q: int = 60, n_k: int = 70, d: int = 8, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    q = factor * torch.randn(n_q, d, generator=g, dtype=torch.float64)
    k = factor * torch.randn(n_k, d, generator=g, dtype=torch.float64)
    return q, k, 2 + torch.randn(n_k, 3, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 3.0, 60.0])
@pytest.mark.parametrize("epsilon", [0.5, 0.1])
def test_attention_is_within_epsilon_of_softmax(factor, epsilon):
    """From uniform attention to logits of ten thousand, where every row's kernel sum underflows."""
    q, k, v = drawn(factor)
    exact = softmax_attention(q, k, v)
    result = attention_product(q, k, v, epsilon, seed=0)
    assert torch.isfinite(result.output).all()
    assert_within(result.output, exact, v, epsilon)
    if factor == 60.0:
        assert float((q @ k.mT / math.sqrt(8)).abs().max()) > 1e4
        assert result.exact_rows == result.rows == 60
    if factor <= 0.3:
        assert result.exact_rows == 0
        # Estimated, not exact: the products' samples were drawn.
        assert float((result.output - exact).abs().max()) > 0.0 or factor == 0.0


def test_attention_on_a_real_head():
    with np.load(DATA) as heads:
        q, k = heads["q"], heads["k"]
    v = 2 + np.random.default_rng(0).standard_normal((2, q.shape[1], 2))
    result = attention_product(q, k, v, 0.25, seed=0)
    exact = softmax_attention(torch.from_numpy(q), torch.from_numpy(k), torch.from_numpy(v))
    assert isinstance(result.output, np.ndarray)
    assert_within(torch.from_numpy(result.output), exact, torch.from_numpy(v), 0.25)
    assert 0 < result.exact_rows < result.rows == 272


def test_costs_of_attention_are_those_of_its_products_and_exact_rows():
    q, k, v = drawn(60.0)
    one, two = (attention_product(*(t.expand(n, -1, -1) for t in (q, k, v)), 0.5, seed=0) for n in (1, 2))
    # The row sums' densities meet every pair, and then each row is evaluated exactly.
    assert 2 * 60 * 70 <= one.distinct_evaluations < 2.2 * 60 * 70
    assert (two.exact_rows, two.rows) == (2 * one.exact_rows, 2 * one.rows) == (120, 120)
    assert two.distinct_evaluations == pytest.approx(2 * one.distinct_evaluations, rel=0.05)
    assert two.hash_evaluations == 2 * one.hash_evaluations
    # Every key is heavy, found once for all columns; each column and the row sums have densities or large entries.
    q, k, v = drawn(0.3)
    for columns in (1, 3):
        found = attention_product(q, k, v[:, :columns], 0.5, seed=0)
        assert found.distinct_evaluations == (1 + 1 + columns) * 60 * 70
        assert found.hash_evaluations == math.ceil(10 * 70 ** (1 / 3) * math.log(70)) * (60 + 70)


@pytest.mark.parametrize("offset", [-3.0, 0.0, 0.5, 3.0])
def test_the_origin_and_balance_are_the_best(offset):
    """Of 0 and the keys' mean, and of all balances, by the mean of log K; keys may lie on the queries' side."""
    q, k, _ = drawn(1.0)
    q, k = q + 1.0, k + offset

    def mean_log(centre, balance):
        reduction = reduce_attention(q * balance, (k - centre) / balance, 1.0)
        return -float(torch.cdist(reduction.queries, reduction.keys).square().mean()) / (2 * reduction.sigma**2)

    centre, balance = best_origin(q, k)
    best = mean_log(centre, balance)
    for other in (torch.zeros(8), k.mean(0)):
        assert all(
            mean_log(other, factor * balance) <= best + 1e-9 for factor in (0.5, 0.8, 0.95, 1.0, 1.05, 1.25, 2.0)
        )


def test_what_attention_asks_of_its_products(monkeypatch):
    """Errors of half of epsilon times the floor a row, seeds of their own, exact rows below the floor and its error."""
    asked = []

    def exact_product(queries, keys, x, *, sigma, epsilon, seed, **given):
        kernel = np.exp(-torch.cdist(queries, keys).square().numpy() / (2 * sigma**2))
        asked.append((epsilon, seed, kernel.sum(1)))
        return KMVResult(kernel @ x.numpy(), None, 7, 5, 3, {}, 0, 0, np.zeros(0), 1, 0.0)

    monkeypatch.setattr(attention_product_module, "approx_kmv", exact_product)
    q, k, v = drawn(1.0, n_q=200)
    result = attention_product(q, k, v, 0.4, seed=0, row_floor=0.5)
    (of_sums, *_), *of_columns = asked
    # A row of sums is allowed epsilon |1|_2 / sqrt(n_q); all rows of a column together epsilon |v|_2.
    assert of_sums * math.sqrt(70 / 200) == pytest.approx(0.5 * 0.4 * 0.5)
    assert [epsilon for epsilon, *_ in of_columns] == pytest.approx(3 * [0.5 * 0.4 * 0.5])
    assert len({seed for _, seed, _ in asked}) == 4
    sums = asked[0][2]
    assert 0 < (sums < 0.5).sum() < (sums < 0.6).sum() < 200
    assert result.exact_rows == (sums < 0.5 * 1.2).sum()
    pairs = result.exact_rows * 70
    assert (result.kernel_evaluations, result.distinct_evaluations) == (4 * 7 + pairs, 4 * 5 + pairs)
    assert result.hash_evaluations == 4 * 3
    torch.testing.assert_close(result.output, softmax_attention(q, k, v))


def test_attention_at_one_large_query_beside_ordinary_ones():
    q, k, v = drawn(0.5)
    q[3] *= 1e4
    result = attention_product(q, k, v, 0.25, seed=0)
    assert_within(result.output, softmax_attention(q, k, v), v, 0.25)
    assert result.exact_rows >= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factor", [1.0, 1e-200, 1e45])
def test_attention_where_queries_or_keys_are_zero_or_equal(factor):
    rng = np.random.default_rng(6)
    q, k, v = rng.standard_normal((5, 3)), rng.standard_normal((7, 3)), rng.standard_normal((7, 2))
    zeros = np.zeros((5, 3))
    cases = [(zeros, factor * k), (factor * q, np.zeros((7, 3))), (zeros, np.zeros((7, 3))), (q, 0 * k + 2.0 * factor)]
    cases += [(0 * q + factor, k), (factor * q[:1], k[:1]), (factor * q, np.repeat(k[:1], 7, 0))]
    for queries, keys in cases:
        logits = queries @ keys.T / math.sqrt(3)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        right = weights @ v[: len(keys)] / weights.sum(1, keepdims=True)
        gap = attention_product(queries, keys, v[: len(keys)], 0.1, seed=0).output - right
        assert (np.linalg.norm(gap, axis=0) <= 0.1 * np.linalg.norm(v[: len(keys)], axis=0)).all()


def test_attention_takes_batches_scale_and_other_sizes():
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 2, n, d, generator=g) for n, d in ((9, 5), (30, 5), (30, 2)))
    v += 2
    out = approx_attention(q, k, v, 0.3, scale=0.2, seed=0)
    assert out.shape == (2, 2, 9, 2)
    assert out.dtype == torch.float64
    assert_within(out, softmax_attention(q, k, v, 0.2), v.double(), 0.3)
    assert torch.equal(out, approx_attention(q, k, v, 0.3, scale=0.2, seed=0))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"v": torch.zeros(4, 2)}, "v "),
        ({"v": torch.zeros(5)}, "v "),
        ({"v": torch.full((5, 2), math.nan)}, "v holds a NaN"),
        ({"v": np.zeros((5, 2))}, "different kinds"),
        ({"k": torch.zeros(5, 4)}, "width"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"scale": -1.0}, "scale"),
        ({"row_floor": 0.0}, "row_floor"),
        ({"seed": -1}, "seed"),
    ],
)
def test_attention_refuses_bad_input(change, word):
    arguments = {"q": torch.zeros(6, 3), "k": torch.zeros(5, 3), "v": torch.zeros(5, 2), "epsilon": 0.5, **change}
    with pytest.raises(InputError, match=word):
        approx_attention(**arguments)
