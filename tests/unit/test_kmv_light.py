"""Algorithm 2 and its parts: the split of x, buckets, counts with the right distribution, sufficient budgets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kmv_kernels import SPARSE, Case, background
from scipy import stats

from approxkmv.errors import InputError
from approxkmv.kmv import light as light_module
from approxkmv.kmv.algorithm import approx_kmv
from approxkmv.kmv.constants import PaperConstants
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.density import ExactDensity
from approxkmv.kmv.gaussian import GaussianKernel
from approxkmv.kmv.heavy import HeavyKeys, find_heavy
from approxkmv.kmv.light import Errors, approx_light, bucket
from approxkmv.kmv.preprocess import split
from approxkmv.kmv.sampling import BinomialTable, averages_of_counts, draw_survivors, survivors


def test_split_partitions_the_keys_and_rescales_x():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(500) * 10.0 ** rng.integers(-6, 3, 500)
    parts = split(x, gamma=0.109, epsilon=0.5)
    assert np.sum(parts.scaled**2) == pytest.approx(500)
    np.testing.assert_allclose(parts.scaled * parts.norm_factor, x)
    np.testing.assert_array_equal(np.sort(np.concatenate([parts.large, parts.small, parts.kept])), np.arange(500))
    square = parts.scaled**2
    assert square[parts.large].min() >= 500**0.109
    assert square[parts.kept].max() < 500**0.109
    assert square[parts.small].max() <= 500**-4.0 < square[parts.kept].min()
    assert len(parts.large) <= 500 ** (1 - 0.109)


@pytest.mark.parametrize("factor", [1e-200, 1.0, 1e200])
def test_split_survives_extreme_scales(factor):
    parts = split(factor * np.array([1.0, -2.0, 3.0, 0.0]), gamma=0.109, epsilon=0.5)
    np.testing.assert_allclose(parts.scaled, split(np.array([1.0, -2.0, 3.0, 0.0]), gamma=0.109, epsilon=0.5).scaled)
    assert parts.norm_factor == pytest.approx(factor * math.sqrt(14 / 4))


def test_squares_at_the_bounds_of_definition_3_1():
    """Large from n^gamma on, and small up to the other bound; one entry alone is large, whatever the error."""
    assert split(np.ones(4), gamma=0.0, epsilon=0.5).large.tolist() == [0, 1, 2, 3]
    tiny = split(np.array([0.0, 1.0, 1.0]), gamma=0.5, epsilon=0.5, constants=PaperConstants(small_exponent=1e4))
    assert (tiny.small.tolist(), tiny.kept.tolist()) == ([0], [1, 2])
    one = split(np.array([3.0]), gamma=0.109, epsilon=10.0)
    assert (one.large.tolist(), one.small.tolist()) == ([0], [])


def test_split_of_zero():
    parts = split(np.zeros(5), gamma=0.109, epsilon=0.5)
    assert len(parts.large) == len(parts.kept) == 0
    assert parts.norm_factor == 0.0


def test_dropping_small_entries_costs_a_quarter_of_epsilon_at_most():
    """The printed bound x_j^2 <= n^-4 alone would allow 1/n per row: too much where epsilon n < 4."""
    for epsilon in (0.5, 0.01, 1e-6):
        for n in (2, 30, 1000):
            for power, factor in ((0, 1.999), (0.5, 1.999), (1, 1.999), (0, 0.999), (0.5, 0.999), (1, 0.999)):
                entry = factor * n**-2.0 * min(1.0, epsilon * n / 4) ** power
                x = np.full(n, entry)
                x[0] = math.sqrt(n)
                parts = split(x, gamma=0.109, epsilon=epsilon)
                assert np.abs(parts.scaled[parts.small]).sum() <= epsilon / 4
            assert len(parts.small) == n - 1


@pytest.mark.parametrize("epsilon", [0.01, 0.25, 0.5, 3.0])
def test_every_kept_key_is_in_the_bucket_of_its_square(epsilon):
    x = np.random.default_rng(1).standard_normal(400)
    parts = split(x, gamma=0.109, epsilon=0.5)
    b = bucket(parts.scaled, parts.kept, epsilon)
    np.testing.assert_array_equal(np.sort(b.order), parts.kept)
    np.testing.assert_array_equal(b.starts, np.concatenate([[0], np.cumsum(b.sizes)[:-1]]))
    rounded = np.repeat(b.rounded, b.sizes)
    square = parts.scaled[b.order] ** 2
    ratio = 1 + min(epsilon, 1.0)
    assert np.all(square <= rounded * (1 + 1e-9))
    assert np.all(rounded <= square * ratio * (1 + 1e-9))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("epsilon", [1e-12, 1e-16, 1e-30])
def test_buckets_of_an_epsilon_that_float64_cannot_add_to_1(epsilon):
    scaled = np.array([1e-8, 0.3, 0.3, 1.0, 1.2])
    b = bucket(scaled, np.arange(5), epsilon)
    assert b.sizes.tolist() == [1, 2, 1, 1]
    np.testing.assert_allclose(np.repeat(b.rounded, b.sizes), scaled**2, rtol=1e-9)


@pytest.mark.parametrize(("repetitions", "n"), [(1, 3), (7, 5), (40, 400), (5000, 100), (10**6, 300), (10**9, 128)])
def test_counts_are_binomial(repetitions, n):
    """Chi-square over cells of expectation 50 or more, 200,000 draws; false alarm 1e-4 per case."""
    draws = 200_000
    counts = BinomialTable(repetitions, 1 / n).draw((draws // 100, 100), np.random.default_rng(2)).ravel()
    law = stats.binom(repetitions, 1 / n)
    edges = np.unique(law.ppf(np.linspace(0.001, 0.999, 40)))
    upper = np.concatenate([edges, [np.inf]])
    mass = np.diff(np.concatenate([[0.0], law.cdf(edges), [1.0]]))
    seen = np.histogram(counts, np.concatenate([[-1.0], upper[:-1], [1e18]]) + 0.5)[0]
    keep = mass * draws >= 50
    expected = np.concatenate([mass[keep], [mass[~keep].sum()]]) * draws
    observed = np.concatenate([seen[keep], [seen[~keep].sum()]])
    if expected[-1] < 50:
        expected, observed = expected[:-1] * (observed[:-1].sum() / expected[:-1].sum()), observed[:-1]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4
    assert np.all(counts == np.round(counts))
    assert counts.min() >= 0
    assert counts.max() <= repetitions


@pytest.mark.slow
def test_single_survivors_have_the_law_of_the_counts():
    """Both ways of drawing one row's samples: same mean and variance of the average, and of the number of samples."""
    values = np.random.default_rng(3).standard_normal(30)
    n, repetitions = 50, 8
    by_count, by_sample, numbers = [], [], []
    for seed in range(4000):
        rng = np.random.default_rng(seed)
        by_count.append(averages_of_counts(values, repetitions, 1, n, rng)[0][0])
        group, key = draw_survivors(30, repetitions, 1, n, rng)
        assert np.all(group == 0)
        by_sample.append(values[key].sum() * n / repetitions)
        numbers.append(len(key))
    variance = n * (1 - 1 / n) * (values**2).sum() / repetitions
    for sample in (np.array(by_count), np.array(by_sample)):
        assert abs(sample.mean() - values.sum()) <= 4.5 * math.sqrt(variance / 4000)
        # The variance of 4,000 values with kurtosis below 9 is within 4.5 * sqrt(8 / 4000) = 20 %.
        assert sample.var() == pytest.approx(variance, rel=0.2)
    assert np.mean(numbers) == pytest.approx(30 * repetitions / n, rel=0.05)


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_as_many_survive_as_were_drawn(n):
    for seed in range(5):
        wanted = survivors(6 * 5 * 4, n, np.random.default_rng(seed))
        assert len(draw_survivors(6, 5, 4, n, np.random.default_rng(seed))[1]) == wanted


def test_survivors_are_distinct_trials():
    rng = np.random.default_rng(4)
    group, key = draw_survivors(3, 1, 5, 1, rng)
    # With survival probability 1 every key survives in every average, once.
    assert sorted(zip(group.tolist(), key.tolist(), strict=True)) == [(g, k) for g in range(5) for k in range(3)]
    # Of 2,000 trials about 500: drawn with replacement, some 60 would be the same.
    group, key = draw_survivors(50, 1, 40, 4, rng)
    assert len(key) > 400
    assert len(set(zip(group.tolist(), key.tolist(), strict=True))) == len(key)


def test_repetitions_past_every_integer_give_the_expectation():
    values = np.array([1.0, 2.0])
    averages, asked = averages_of_counts(values, 1 << 63, 3, 10, np.random.default_rng(0))
    assert averages.tolist() == [3.0] * 3
    assert asked == 3 * (1 << 63) * 2 // 10
    assert survivors(1 << 70, 8, np.random.default_rng(0)) == 1 << 67


def test_survivors_of_keys_of_value_0_are_asked_for_too():
    """20 keys, 50 repetitions and 4 averages at 1/5: about 800, to five standard deviations."""
    for values in (np.zeros(20), np.r_[np.zeros(15), np.ones(5)]):
        _, asked = averages_of_counts(values, 50, 4, 5, np.random.default_rng(1))
        assert abs(asked - 800) < 5 * math.sqrt(4000 * 0.2 * 0.8)


def light_of(case, x, *, density="exact", row_error=0.25, constants=None, seed=0, hidden=0.125, **options):
    kernel = GaussianKernel(case.queries, case.keys, case.sigma)
    heavy = find_heavy(case.queries, case.keys, sigma=case.sigma, seed=0)
    parts = split(x, gamma=0.109, epsilon=0.5)
    light = approx_light(
        kernel,
        parts.scaled,
        parts.kept,
        heavy,
        Errors(row_error, 0.25, hidden),
        density=density,
        constants=constants or PaperConstants(),
        source=np.random.SeedSequence(seed),
        memory=1 << 28,
        **options,
    )
    mask = np.zeros(case.matrix.shape, dtype=bool)
    mask[:, parts.kept] = True
    mask[heavy.rows(), heavy.indices] = False
    return light, np.where(mask, case.matrix, 0.0), parts.scaled


@pytest.mark.slow
def test_one_average_has_the_mean_and_the_variance_of_the_proof():
    """E z_i and Var z_i = (n - 1) sum_j (x_j K_ij)^2 / R, over 200 seeds, summed over rows."""
    case = background(60)
    x = np.random.default_rng(5).standard_normal(60)
    constants = PaperConstants(median_factor=1e-9, repetition_factor=1.0)
    runs = [light_of(case, x, constants=constants, seed=s)[0] for s in range(200)]
    light, matrix, scaled = light_of(case, x, constants=constants)
    assert light.averages == 1
    z = np.stack([r.z for r in runs])
    mean = matrix @ scaled
    variance = 59 * (matrix**2 @ scaled**2) / light.repetitions
    score = (z - mean) / np.sqrt(variance)
    # 12,000 nearly independent scores: mean within 4.5 / sqrt(12000), mean square within 5 %.
    assert abs(score.mean()) < 4.5 / math.sqrt(score.size)
    assert (score**2).mean() == pytest.approx(1.0, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("density", ["exact", "levels"])
@pytest.mark.parametrize("name", ["background", "clusters"])
def test_budgets_cover_the_light_mass(name, density):
    """s_i is at least the true sum over light keys of x_j^2 K_ij^2, but for the buckets that are hidden."""
    case = SPARSE[name](40)
    light, matrix, scaled = light_of(case, np.random.default_rng(6).standard_normal(40), density=density, hidden=0.125)
    mass = matrix**2 @ scaled**2
    # A hidden bucket has mass below hidden^2 / (n count^2) each.
    assert np.all(light.squared_sum >= mass - 0.125**2 / 40)
    assert (light.level_buckets > 0) == (density == "levels")
    if density == "levels":
        assert light.density_tally.distinct_evaluations < light.density_tally.kernel_evaluations


@pytest.mark.parametrize("hidden", [1e-9, 0.5])
@pytest.mark.parametrize("rounded", [True, False])
def test_budgets_by_hand(rounded, hidden):
    """Line 7, with exact densities: squares are rounded up, those of heavy keys if `rounded`.

    A bucket whose mean of K^2 is below (1 - beta) floor is left out.
    """
    case = SPARSE["even spread"](60)
    constants = PaperConstants(subtract_rounded=rounded)
    light, matrix, scaled = light_of(
        case, np.random.default_rng(4).standard_normal(60), hidden=hidden, constants=constants
    )
    square = scaled**2
    kept = (square < 60**0.109) & (square > 60**-4.0)
    up = 1.25 ** np.ceil(np.log(square) / math.log(1.25))
    sizes = {m: (up[kept] == m).sum() for m in up[kept]}
    density = {m: (case.matrix[:, kept & (up == m)] ** 2).mean(1) for m in sizes}
    count, beta = max(math.log(60), len(sizes)), 60**-0.218
    floors = {m: hidden**2 / (60 * count**2 * m * sizes[m]) for m in sizes}
    shown = np.stack([density[m] >= (1 - beta) * floors[m] for m in up[kept]], 1)
    assert (shown.mean() > 0.95) == (hidden < 0.1)
    heavy = np.where((matrix[:, kept] == 0) & shown, case.matrix[:, kept], 0.0)
    known = heavy**2 @ (up if rounded else square)[kept]
    expected = np.where(shown, case.matrix[:, kept], 0.0) ** 2 @ up[kept] / (1 - beta) - known
    expected[(matrix[:, kept] * shown == 0).all(1)] = 0.0
    assert (known > 0).sum() > 30
    np.testing.assert_allclose(light.squared_sum, expected, rtol=1e-9)
    np.testing.assert_allclose(light.repetitions, np.ceil(10 * 60 * expected / 0.25**2))
    assert light.density_tally == Tally(60 * kept.sum(), 60 * kept.sum())
    assert light.averages == math.ceil(10 * math.log(60))


@pytest.mark.parametrize("least", [0, 3])
def test_what_is_asked_of_densities_by_levels(least, monkeypatch):
    """Line 5: of k^2, relative error n^-0.218, failure n^-2, and floors that hide no more than `hidden` a row."""
    asked = []

    class Exact(ExactDensity):
        def __init__(self, sigma, *, seed, **given):
            super().__init__(sigma)
            asked.append(given)

        def least_evaluations(self):
            return least

    monkeypatch.setattr(light_module, "DensityLevels", Exact)
    case, x = SPARSE["even spread"](60), np.random.default_rng(4).standard_normal(60)
    exact, _, scaled = light_of(case, x)
    found, _, _ = light_of(case, x, density="auto" if least else "levels")
    square = scaled**2
    powers, sizes = np.unique(
        np.ceil(np.log(square[(square < 60**0.109) & (square > 60**-4.0)]) / math.log(1.25)), return_counts=True
    )
    floors = 0.125**2 / (60 * max(math.log(60), len(sizes)) ** 2 * 1.25**powers * sizes)
    assert len(sizes) > math.log(60)
    assert found.level_buckets == (sizes > least).sum() > 2
    np.testing.assert_allclose([given["floor"] for given in asked], floors)
    assert {(given["relative_error"], given["failure"]) for given in asked} == {(60**-0.218, 60.0**-2)}
    # Exact densities by another way
    np.testing.assert_allclose(found.squared_sum, exact.squared_sum, rtol=1e-9)
    # Of these each bucket's keys meet every query, of the others all keys.
    of_levels = 60 * sizes[sizes > least].sum()
    assert found.density_tally.kernel_evaluations == 60 * sizes.sum()
    assert found.density_tally.distinct_evaluations == of_levels + (60 * sizes.sum() if least else 0)


def test_a_density_asks_for_the_larger_side_where_failures_are_united():
    """And log n stands for the number of buckets where there are fewer."""
    asked = {}

    class Exact(ExactDensity):
        def __init__(self, sigma, *, seed, **given):
            super().__init__(sigma)
            asked.update(given)

    case = SPARSE["even spread"](60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(light_module, "DensityLevels", Exact)
        light_of(Case(case.queries, case.keys[:40], case.sigma), np.ones(40), density="levels")
    assert (asked["relative_error"], asked["failure"]) == (40**-0.218, 60.0**-2)
    assert asked["floor"] == pytest.approx(0.125**2 / (40 * math.log(40) ** 2 * 40))


def light_of_two(density, *, row_error=1e3, seed=0, constants=None):
    """Two keys at distance 0 and 1 of a query, one of them heavy, among 8."""
    kernel = GaussianKernel(np.zeros((1, 1)), np.array([[0.0], [1.0], *6 * [[9.0]]]), 1.0)
    heavy = HeavyKeys(np.array([0, 1]), np.array([0]), np.zeros(1), 1, Tally())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(light_module, "DensityLevels", density)
        return approx_light(
            kernel,
            np.r_[1.0, 1.0, np.zeros(6)],
            np.array([0, 1]),
            heavy,
            Errors(row_error, 0.25, 1e-3),
            density="levels",
            constants=constants or PaperConstants(),
            source=np.random.SeedSequence(seed),
            memory=1 << 24,
        )


def test_a_density_that_is_too_low_leaves_one_repetition():
    class Low(ExactDensity):
        def __init__(self, sigma, **_):
            super().__init__(sigma)

        def query(self, queries):
            return 0.1 * super().query(queries)

    light = light_of_two(Low)
    assert (light.squared_sum.tolist(), light.repetitions.tolist()) == ([0.0], [1.0])
    assert np.isfinite(light.z).all()


def test_of_the_averages_the_median_is_taken():
    """One repetition of a key that survives in one of eight: most of 21 averages are 0."""
    for seed in range(8):
        light = light_of_two(lambda sigma, **_: ExactDensity(sigma), seed=seed)
        assert (light.averages, light.repetitions.tolist()) == (21, [1.0])
        assert light.sampling_tally.kernel_evaluations > 0
        assert light.z.tolist() == [0.0]


def test_samples_of_some_of_the_keys_are_weighed_by_all():
    """The light key of T, one of 8: an average of R repetitions is its term times 8 / R times how often it survived."""
    one = PaperConstants(median_factor=1e-9)
    for seed in range(5):
        light = light_of_two(lambda sigma, **_: ExactDensity(sigma), row_error=4.0, seed=seed, constants=one)
        times = light.sampling_tally.kernel_evaluations
        assert 3 < light.repetitions[0] < 16
        assert light.sampling_tally.distinct_evaluations == min(times, 1)
        assert light.z[0] == pytest.approx(math.exp(-0.5) * 8 / light.repetitions[0] * times)


@pytest.mark.parametrize("rounds", [1, 7])
@pytest.mark.parametrize("density", ["exact", "levels"])
def test_one_key_survives_in_every_repetition(density, rounds):
    """So its term is what each average is, whether samples are drawn or counted; evaluated once."""
    kernel = GaussianKernel(np.zeros((1, 2)), np.array([[0.5, 0.7]]), 1.0)
    none = HeavyKeys(np.zeros(2, int), np.empty(0, int), np.empty(0), 0, Tally())
    value = math.exp(-0.37)
    # s = K^2 / (1 - 1/2) in line 7
    errors = Errors(math.sqrt(10 * 2 * value**2 / (rounds - 0.5)), 0.25, 0.1)
    given = {"density": density, "constants": PaperConstants(), "source": np.random.SeedSequence(0), "memory": 1 << 24}
    with pytest.MonkeyPatch.context() as patch:
        # An exact density, of the squares, by way of levels
        patch.setattr(light_module, "DensityLevels", lambda sigma, **_: ExactDensity(sigma))
        light = approx_light(kernel, np.array([-1.0]), np.array([0]), none, errors, **given)
    assert light.z[0] == pytest.approx(-value, rel=1e-12)
    assert light.repetitions.tolist() == [rounds]
    assert light.sampling_tally == Tally(rounds, int(density == "levels"))


def test_hidden_buckets_add_up_to_their_share_at_most():
    """With sampling noise all but gone, what is left of the error is the buckets below the density floor."""
    case = background(60)
    x = np.random.default_rng(7).standard_normal(60)
    light, matrix, scaled = light_of(case, x, row_error=1e-5, hidden=0.5)
    error = np.abs(light.z - matrix @ scaled)
    assert error.max() > 1e-3, "no bucket was hidden: the test shows nothing"
    assert error.max() <= 0.5


@pytest.mark.slow
def test_small_budgets_are_sampled_pair_by_pair():
    """Budgets below one evaluation per key: fewer than all pairs are computed, mean and variance stay the proof's."""
    case = background(250)
    x = np.random.default_rng(8).choice([-1.0, 1.0], 250)  # of one bucket, since each costs seconds
    few = PaperConstants(median_factor=1e-9, repetition_factor=2.0, density_error_exponent=0.05)
    kernel = GaussianKernel(case.queries, case.keys, case.sigma)
    heavy = find_heavy(case.queries, case.keys, sigma=case.sigma, seed=0)
    parts = split(x, gamma=0.109, epsilon=0.5)
    mask = np.zeros((250, 250))
    mask[:, parts.kept] = 1.0
    mask[heavy.rows(), heavy.indices] = 0.0
    terms = case.matrix * mask * parts.scaled
    scores = []
    for seed in range(12):
        kernel.computed = 0
        light = approx_light(
            kernel,
            parts.scaled,
            parts.kept,
            heavy,
            Errors(2.0, 1.0, 1e-3),
            density="levels",
            constants=few,
            source=np.random.SeedSequence(seed),
            memory=1 << 28,
        )
        assert light.averages == 1
        assert light.sampling_tally.distinct_evaluations == kernel.computed
        assert 0 < light.sampling_tally.distinct_evaluations < 0.5 * 250 * 250
        variance = 249 * (terms**2).sum(1) / light.repetitions
        scores.append((light.z - terms.sum(1)) / np.sqrt(variance))
    score = np.concatenate(scores)
    # 3,000 scores of kurtosis below 4: the standard deviation of their mean square is 3 %.
    assert abs(score.mean()) < 4.5 / math.sqrt(score.size)
    assert (score**2).mean() == pytest.approx(1.0, rel=0.15)


@pytest.mark.slow
def test_the_median_errs_less_than_one_average():
    """Of m averages, each nearly normal, the median's variance is pi / (2 m) of one's; m = 10 ln n."""
    case = background(60)
    x = np.random.default_rng(5).standard_normal(60)
    runs = [light_of(case, x, constants=PaperConstants(repetition_factor=1.0), seed=s)[0] for s in range(40)]
    light, matrix, scaled = light_of(case, x, constants=PaperConstants(repetition_factor=1.0))
    assert light.averages == 41
    variance = 59 * (matrix**2 @ scaled**2) / light.repetitions
    score = (np.stack([r.z for r in runs]) - matrix @ scaled) / np.sqrt(variance)
    # 2,400 nearly independent scores: their mean square has a standard deviation of 3 %.
    assert (score**2).mean() == pytest.approx(math.pi / (2 * light.averages), rel=0.15)


def test_counts_only_asks_for_what_a_full_run_asks_for():
    case = background(80)
    x = np.random.default_rng(9).standard_normal(80)
    full, _, _ = light_of(case, x)
    counted, _, _ = light_of(case, x, counts_only=True)
    np.testing.assert_array_equal(full.repetitions, counted.repetitions)
    asked = full.sampling_tally.kernel_evaluations
    assert counted.sampling_tally.kernel_evaluations == pytest.approx(asked, rel=5 / math.sqrt(asked))


@pytest.mark.parametrize("field", ["table_factor", "repetition_factor", "density_error_exponent"])
@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_constants_must_be_positive_and_finite(field, value):
    with pytest.raises(InputError, match=field):
        PaperConstants(**{field: value})
    with pytest.raises(InputError, match="exceed 1"):
        PaperConstants(epsilon_divisor=1.0)


def test_constants_are_the_printed_ones():
    c = PaperConstants()
    assert c.tables(1000, 1 / 3) == math.ceil(10 * 1000 ** (1 / 3) * math.log(1000))
    assert c.averages(1000) == math.ceil(10 * math.log(1000))
    assert c.density_error(1000) == pytest.approx(1000**-0.218)
    assert c.density_failure(1000) == pytest.approx(1e-6)
    # Both are 1 at n = 1, where they would say nothing; a union over more queries than keys has more tables.
    assert (c.density_error(1), c.density_failure(1)) == (0.5, 0.25)
    assert c.tables(100, 0.5, 1000) == math.ceil(10 * 10 * math.log(1000))
    assert (c.repetition_factor, c.small_exponent, c.density_exponent) == (10, 4, 0.173)


def test_cost_falls_with_epsilon_squared():
    case = background(100)
    x = np.random.default_rng(10).standard_normal(100)
    asked = [
        approx_kmv(case.queries, case.keys, x, sigma=case.sigma, epsilon=e, seed=0).phases["light"].kernel_evaluations
        for e in (0.5, 0.125)
    ]
    assert asked[1] / asked[0] == pytest.approx(16, rel=0.3)
