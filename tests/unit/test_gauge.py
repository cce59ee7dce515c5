"""The gauge: what it changes and what it does not, and which error of K attention can bear."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from approxkmv.errors import InputError, TableError
from approxkmv.figures.gauge import NEEDED_POWER
from approxkmv.kernels import log_kernel
from approxkmv.statistics.gauge import FACTORS, Gauge, gauge
from approxkmv.statistics.heads import head_statistics

HEADS, N, D = 4, 48, 8
# The error of attention, relative to |v|, that the paper's A.1.4 allows
TOLERANCE = 0.1


def heads(seed: int = 0, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(HEADS, N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return size * q, size * k + 0.5, torch.randn(HEADS, N, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("t", FACTORS)
def test_attention_is_the_same_at_every_t_and_c_is_not(t):
    q, k, v = heads()
    one, other = ((s @ v[..., None]) for s in (torch.softmax(q @ k.mT, -1), torch.softmax((t * q) @ (k / t).mT, -1)))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    found = gauge(q, k, v, 1.0, [1.0, t])
    assert t == 1.0 or (abs(np.log(found.ratio[:, 0] / found.ratio[:, 1])) > 0.05).all()
    moved = gauge(t * q, k / t, v, 1.0, [1.0])
    np.testing.assert_allclose(moved.ratio[:, 0], found.ratio[:, 1], rtol=1e-9)
    np.testing.assert_allclose(moved.log_bound[:, 0], found.log_bound[:, 1], atol=1e-9)


def attention(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    logits = q @ k.mT / np.sqrt(D)
    return torch.softmax(logits if seen is None else logits.masked_fill(~seen, -torch.inf), -1)


CAUSAL = torch.ones(N, N).tril().bool()
# Of each query the eight keys before it and its own, as in a layer with a window.
WINDOW = CAUSAL & ~CAUSAL.tril(-9)


@pytest.mark.parametrize("mask", [None, CAUSAL, WINDOW], ids=["all", "causal", "window"])
@pytest.mark.parametrize("t", [0.125, 1.0, 8.0])
def test_every_column_is_what_its_words_say_of_the_matrix_itself(t, mask):
    q, k, v = heads(1)
    found = gauge(q, k, v, factors=[t], mask=mask)
    seen = torch.ones(N, N).bool() if mask is None else mask
    matrix = log_kernel(t * q, k / t).exp() * seen
    sums = matrix.sum(-1)
    np.testing.assert_allclose(found.participation[:, 0], sums.sum(-1) ** 2 / sums.square().sum(-1), rtol=1e-9)
    np.testing.assert_allclose(np.exp(found.log_largest_row[:, 0]), sums.amax(-1), rtol=1e-9)
    np.testing.assert_allclose(np.exp(found.log_norm[:, 0]), torch.linalg.matrix_norm(matrix, 2), rtol=1e-4)
    np.testing.assert_allclose(np.exp(found.log_zero_for_ones[:, 0]), sums.norm(dim=-1) / np.sqrt(N), rtol=1e-9)
    largest = matrix.flatten(1).sort(descending=True).values
    np.testing.assert_allclose(found.ratio[:, 0], largest[:, N:].sum(-1) / largest[:, :N].sum(-1), rtol=1e-8)
    if mask is None:
        np.testing.assert_allclose(found.ratio[:, 0], head_statistics(t * q, k / t, N).ratios[..., -1], rtol=1e-8)
    out = (matrix @ v[..., None])[..., 0] / sums
    torch.testing.assert_close(out, (attention(q, k, seen) @ v[..., None])[..., 0], rtol=1e-9, atol=1e-12)
    root = np.sqrt(N)
    cost = 1 + root * out.abs().amax(-1) / v.norm(dim=-1) + TOLERANCE * root
    np.testing.assert_allclose(np.exp(found.log_sufficient[:, 0]), TOLERANCE * sums.amin(-1) / cost, rtol=1e-9)
    mean = (seen.double() / seen.sum(-1, keepdim=True) @ v[..., None])[..., 0]
    error = (mean - out).norm(dim=-1) / v.norm(dim=-1)
    np.testing.assert_allclose(found.mean_error, error, rtol=1e-9)


def test_for_small_t_the_kernel_becomes_the_attention_matrix_and_for_large_t_one_row_carries_it():
    q, k, v = heads(2)
    found = gauge(q, k, v, factors=[1e-4, 64.0])
    np.testing.assert_allclose(found.ratio[:, 0], found.limit_ratio, rtol=1e-6)
    np.testing.assert_allclose(found.participation[:, 0], found.limit_participation, rtol=1e-6)
    # (A) holds for every head at some t, and says nothing there.
    assert (found.ratio[:, 1] < 1e-6).all()
    np.testing.assert_allclose(found.participation[:, 1], 1.0, rtol=1e-6)


def worst(rows: np.ndarray, out: np.ndarray, v: np.ndarray, epsilon: float) -> float:
    """The error of y2/y1 when both errors of size epsilon |x| stand in the one row where they do most."""
    root = np.sqrt(len(rows))
    with np.errstate(divide="ignore"):
        errors = epsilon * (np.linalg.norm(v) + root * np.abs(out)) / (rows - epsilon * root)
    return float(np.where(rows > epsilon * root, errors, np.inf).max() / np.linalg.norm(v))


def worst_entry(rows: np.ndarray, out: np.ndarray, v: np.ndarray, epsilon: float) -> float:
    """The error of y2/y1 when one row of K1 is epsilon too small, and that of Kv epsilon |v| / sqrt(n) too large."""
    size = np.linalg.norm(v)
    with np.errstate(divide="ignore"):
        errors = epsilon * (size / np.sqrt(len(rows)) + np.abs(out)) / (rows - epsilon)
    return float(np.where(rows > epsilon, errors, np.inf).max() / size)


def test_the_error_that_a_cost_below_n_squared_needs():
    # n^1.89 / epsilon^2 = n^2
    assert pytest.approx(2.0) == 1.89 - 2 * NEEDED_POWER


def spread(rows: np.ndarray, out: np.ndarray, v: np.ndarray, epsilon: float, generator: np.random.Generator) -> float:
    """The error for random errors of that size, spread over rows in proportion to powers of 1 / r."""
    root, size = np.sqrt(len(rows)), np.linalg.norm(v)
    largest = 0.0
    for power in (0.0, 0.5, 1.0, 2.0, 4.0):
        one, two = (generator.exponential(size=len(rows)) * (rows.min() / rows) ** power for _ in range(2))
        one, two = epsilon * root * one / np.linalg.norm(one), epsilon * size * two / np.linalg.norm(two)
        # The signs that add up.
        errors = (two + np.abs(out) * one) / (rows - one)
        largest = max(largest, float(np.linalg.norm(errors) / size))
    return largest


@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["all", "causal"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0.3, 1.0, 2.0])
def test_the_error_that_attention_bears_lies_between_half_the_bound_and_the_bound(seed, size, mask):
    q, k, v = heads(seed, size)
    found = gauge(q, k, v, mask=mask)
    generator = np.random.default_rng(seed)
    out = (attention(q, k, mask) @ v[..., None])[..., 0].numpy()
    for head in range(HEADS):
        for place, t in enumerate(FACTORS):
            log_values = log_kernel(t * q[head], k[head] / t)
            log_values = log_values if mask is None else log_values.masked_fill(~mask, -torch.inf)
            log_rows = log_values.logsumexp(-1).numpy()
            mine, column = out[head], v[head].numpy()
            # Row sums and errors relative to the smallest row: some kernels are 0 in float64.
            with np.errstate(over="ignore"):
                rows = np.exp(log_rows - log_rows.min())
            logs = found.log_bound[head, place], found.log_sufficient[head, place]
            bound, sufficient = np.exp(np.array(logs) - log_rows.min())
            # One row alone reaches the tolerance at the bound, not before: a wrong constant in either direction fails.
            assert worst(rows, mine, column, bound * 1.001) > TOLERANCE
            assert worst(rows, mine, column, bound * 0.999) < TOLERANCE
            # Of errors that are bounded in each entry, as in the proof of Lemma 3.5, root n times as much.
            assert worst_entry(rows, mine, column, np.sqrt(N) * bound * 1.001) > TOLERANCE
            assert worst_entry(rows, mine, column, np.sqrt(N) * bound * 0.999) < TOLERANCE
            for epsilon in (sufficient, bound / 2):
                assert worst(rows, mine, column, epsilon) <= TOLERANCE * (1 + 1e-9)
                assert spread(rows, mine, column, epsilon, generator) <= TOLERANCE * (1 + 1e-9)
            # The two simple limits, and that the trivial answer y = 0 is far outside.
            assert bound <= min(TOLERANCE * rows.min(), rows.min() / np.sqrt(N))
            assert found.log_bound[head, place] < found.log_norm[head, place]


@pytest.mark.parametrize("size", [0.3, 1.0, 2.0])
def test_no_gauge_bears_more_than_the_largest_weights_allow(size):
    q, k, v = heads(4, size)
    generator = torch.Generator().manual_seed(5)
    weights = torch.softmax(q @ k.mT / np.sqrt(D), -1)
    share = (weights @ v[..., None])[..., 0].abs() / v.norm(dim=-1, keepdim=True)
    allowed = TOLERANCE / (weights.amax(-1) * (1 + np.sqrt(N) * share + TOLERANCE * np.sqrt(N)))
    most = allowed.amin(-1).log().numpy()
    for _ in range(20):
        change, shift = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((D, D), (D,)))
        moved = q @ change, k @ torch.linalg.inv(change).mT + shift
        torch.testing.assert_close(
            torch.softmax(moved[0] @ moved[1].mT / np.sqrt(D), -1), weights, rtol=1e-6, atol=1e-9
        )
        assert (gauge(*moved, v).log_bound <= most[:, None] + 1e-9).all()
    # A kernel all of whose rows have an entry of 1 reaches it: each query is a key, and all keys are of one length.
    same = torch.nn.functional.normalize(k, dim=-1) * size
    weights = torch.softmax(same @ same.mT / np.sqrt(D), -1)
    share = (weights @ v[..., None])[..., 0].abs() / v.norm(dim=-1, keepdim=True)
    allowed = TOLERANCE / (weights.amax(-1) * (1 + np.sqrt(N) * share + TOLERANCE * np.sqrt(N)))
    np.testing.assert_allclose(gauge(same, same, v, factors=[1.0]).log_bound[:, 0], allowed.amin(-1).log(), atol=1e-9)


@pytest.mark.parametrize("size", [0.01, 1.0])
def test_with_a_causal_mask_the_first_query_s_only_key_limits_the_error(size):
    q, k, v = heads(6, size)
    most = np.log(TOLERANCE / (1 + TOLERANCE * np.sqrt(N)))
    assert (gauge(q, k, v, mask=CAUSAL).log_bound <= most).all()
    # Equal keys without a mask bear more: the limit is the mask's.
    assert size == 1.0 or (gauge(q, 0 * k, v).log_bound > most).any()


def test_errors_spread_over_all_rows_are_borne_up_to_the_root_mean_square_of_the_largest_weights():
    for seed, size in ((0, 0.3), (1, 1.0), (2, 2.0)):
        q, k, v = heads(seed, size)
        weights = torch.softmax(q @ k.mT / np.sqrt(D), -1)
        allowed = TOLERANCE / weights.amax(-1).square().mean(-1).sqrt()
        for t in (0.5, 1.0, 2.0):
            rows = log_kernel(t * q, k / t).logsumexp(-1).exp()
            # The error of every entry of Kv is epsilon |v| / sqrt(n).
            error = (1.001 * allowed / np.sqrt(N))[:, None] * v.norm(dim=-1, keepdim=True) / rows
            assert (error.norm(dim=-1) > TOLERANCE * v.norm(dim=-1)).all()
    # Where every row has an entry of 1 it is the limit itself.
    same = torch.nn.functional.normalize(k, dim=-1) * size
    rows = log_kernel(same, same).exp().sum(-1)
    weights = torch.softmax(same @ same.mT / np.sqrt(D), -1)
    torch.testing.assert_close(rows.reciprocal().square().mean(-1), weights.amax(-1).square().mean(-1))


def test_a_wrong_constant_would_be_found():
    # Without sqrt(n), the size of ones, the condition for y1 is missed: the error is beyond the tolerance then.
    q, k, v = heads()
    out = (torch.softmax(q @ k.mT / np.sqrt(D), -1) @ v[..., None])[..., 0].numpy()[0]
    rows = log_kernel(q[0], k[0]).exp().sum(-1).numpy()
    wrong = TOLERANCE * rows.min() / (1 + np.abs(out).max() / np.linalg.norm(v[0]) + TOLERANCE)
    assert worst(rows, out, v[0].numpy(), wrong) > TOLERANCE


def test_large_logits_and_small_row_sums_are_finite():
    q, k, v = heads(3, 40.0)
    found = gauge(q, k, v)
    for part in (found.ratio, found.log_norm, found.log_bound, found.log_sufficient, found.log_zero_for_ones):
        assert np.isfinite(part).all()
    # exp of these is 0 in float64: they are handed on as logarithms.
    assert found.log_bound.min() < -800


def test_a_column_of_another_shape_or_of_zeros_is_refused():
    q, k, v = heads()
    with pytest.raises(InputError, match="one column per head"):
        gauge(q, k, v[:, :-1])
    # Of one head alone, and of numbers whose squares float64 does not have.
    for column in (torch.zeros_like(v[:1]), 1e-200 * v[:1], 1e200 * v[:1]):
        with pytest.raises(InputError, match="not 0"):
            gauge(q, k, torch.cat([v[1:], column]))


def test_queries_and_keys_of_different_lengths_and_no_factor_are_refused():
    q, k, v = heads()
    with pytest.raises(InputError, match=r"must both be \(heads, n, d\)"):
        gauge(q, k[:, :-1], v[:, :-1], mask=torch.ones(N, N - 1).bool())
    with pytest.raises(InputError, match="must both be"):
        gauge(q[0], k[0], v[0])
    for factors in ((), 0.0, [1.0, -1.0], [1e10], [1e-10], ["1"], [True], [float("nan")]):
        with pytest.raises(InputError, match="factors are"):
            gauge(q, k, v, factors=factors)


def test_a_mask_of_another_shape_or_with_a_row_without_keys_is_refused():
    q, k, v = heads()
    for mask in (CAUSAL[:-1], CAUSAL[:, :-1], CAUSAL.tril(-1)):
        with pytest.raises(InputError, match="at least one key"):
            gauge(q, k, v, mask=mask)


def test_the_table_has_each_number_of_each_head_and_factor_under_its_name():
    from approxkmv.steps.gauge import _rows

    count = 3
    numbers = iter(np.arange(1.0, 1e4))

    def some(*shape: int) -> np.ndarray:
        return np.array([next(numbers) for _ in range(int(np.prod(shape)))]).reshape(shape)

    found = Gauge(*(some(count, len(FACTORS)) for _ in range(7)), *(some(count) for _ in range(3)))
    table = _rows(found, np.arange(count)).set_index(["head", "t"])
    assert len(table) == count * (len(FACTORS) + 1)
    for head in range(count):
        for i, t in enumerate(FACTORS):
            row = table.loc[(head, t)]
            assert (row["ratio"], row["participation"]) == (found.ratio[head, i], found.participation[head, i])
            for name in ("largest_row", "norm", "zero_for_ones", "sufficient", "bound"):
                assert row[f"log10_{name}"] == pytest.approx(getattr(found, f"log_{name}")[head, i] / np.log(10))
        limit = table.loc[(head, 0.0)]
        assert (limit["ratio"], limit["participation"]) == (found.limit_ratio[head], found.limit_participation[head])
        assert limit[[name for name in table if "log10" in name]].isna().all()
        assert (table.loc[head, "mean_error"] == found.mean_error[head]).all()


def test_a_head_is_gauged_by_its_first_column_that_is_not_zero_and_left_out_without_one(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from approxkmv.steps import gauge as step

    q, k, _ = heads()
    v = torch.randn(2, HEADS, N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v[0, 2, :, :2] = 0.0
    v[0, 1] = 0.0
    v[1] = 0.0
    spans = torch.tensor([[0, N]] * N)
    captured = SimpleNamespace(
        queries=[q, q], keys=[k, k], values=v, spans=[spans, spans], scales=torch.tensor([0.3, 0.3])
    )
    model = SimpleNamespace(max_positions=None, tokenize=lambda text, limit: [5] * N, n_layers=2, is_causal=False)
    model.has_own_masks, model.capture = False, lambda texts, values: [captured]
    monkeypatch.setattr(step, "load_model", lambda *_: model)
    monkeypatch.setattr(step, "read_table", lambda *_: {"text": ["a"]})
    study = SimpleNamespace(max_tokens=100, min_tokens=10)
    table = step.measure_gauge(study, "m", tmp_path, tmp_path, tmp_path)
    assert table[["layer", "head"]].drop_duplicates().to_numpy().tolist() == [[0, 0], [0, 2], [0, 3]]
    for head, column in ((0, 0), (2, 2), (3, 0)):
        alone = gauge(q[head : head + 1], k[head : head + 1], v[0, head : head + 1, :, column], 0.3)
        own = table[table["head"] == head].set_index("t")
        assert own["mean_error"].to_numpy() == pytest.approx(alone.mean_error[0])
        assert own.loc[list(FACTORS), "log10_bound"].to_numpy() == pytest.approx(alone.log_bound[0] / np.log(10))
    v[:] = 0.0
    with pytest.raises(TableError, match="model m: all its values are 0"):
        step.measure_gauge(study, "m", tmp_path, tmp_path, tmp_path)
