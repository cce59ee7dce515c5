"""Density estimators: their mean, their spread as a function of the budget, and their cost."""

from __future__ import annotations

import math

import numpy as np
import pytest

from approxkmv.errors import InputError
from approxkmv.kmv.density import DensityLevels, ExactDensity, HashingBasedDensity, KernelDensity, UniformDensity
from approxkmv.kmv.hashing import PStableHash

SIGMA = 0.8


def cloud() -> tuple[np.ndarray, np.ndarray]:
    """300 points in 3 dimensions with kernel values at all scales, and 6 queries from dense to sparse places."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((300, 3)) * np.array([0.6, 1.2, 2.0])
    queries = np.linspace(0, 1, 6)[:, None] * np.array([0.8, 1.5, 2.5])
    return points, queries


def truth(points: np.ndarray, queries: np.ndarray) -> np.ndarray:
    difference = queries[:, None, :] - points[None, :, :]
    return np.exp(-(difference**2).sum(-1) / (2 * SIGMA**2)).mean(1)


def uniform(budget: int, seed: int) -> UniformDensity:
    return UniformDensity(SIGMA, samples=budget, seed=seed)


def hashed(budget: int, seed: int) -> HashingBasedDensity:
    return HashingBasedDensity(SIGMA, samples=budget, scale=0.02, seed=seed)


def estimates(make, budget: int, seeds: int) -> np.ndarray:
    points, queries = cloud()
    return np.stack([make(budget, seed).fit(points).query(queries) for seed in range(seeds)])


def level_estimates(recover: str, repetitions: int, seeds: int, guess: float, family: str = "p-stable") -> np.ndarray:
    """One average (no median) of so many repetitions at a fixed guess of the density."""
    points, queries = cloud()
    out = []
    for seed in range(seeds):
        levels = DensityLevels(
            SIGMA,
            relative_error=0.3,
            floor=1e-3,
            failure=0.1,
            recover=recover,
            family=family,
            seed=seed,
            repetition_factor=repetitions * 0.09,
            median_factor=1e-9,
        ).fit(points)
        assert levels.averages == 1
        assert levels.repetitions == repetitions
        out.append(levels.query_at(queries, guess))
    return np.stack(out)


def assert_unbiased(samples: np.ndarray, expected: np.ndarray, bias: float = 0.0) -> None:
    """The mean over seeds within 4.5 standard errors of the truth (false alarm 7e-6 per query), plus a known bias."""
    error = samples.std(0, ddof=1) / math.sqrt(len(samples))
    assert np.all(error < 0.15 * expected), "too few seeds to say anything"
    assert np.all(np.abs(samples.mean(0) - expected) <= 4.5 * error + bias * expected)


def test_exact_is_the_mean_kernel_value():
    points, queries = cloud()
    density = ExactDensity(SIGMA).fit(points)
    np.testing.assert_allclose(density.query(queries), truth(points, queries), rtol=1e-12)
    assert density.tally.kernel_evaluations == density.tally.distinct_evaluations == 6 * 300


def test_points_far_from_the_origin_keep_all_digits():
    """Their squares have eight digits less than the distances between neighbours."""
    points, queries = (part + 2048.0 for part in cloud())
    np.testing.assert_allclose(ExactDensity(SIGMA).fit(points).query(queries), truth(points, queries), rtol=1e-11)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ExactDensity(SIGMA), 1e-6),
        (lambda: UniformDensity(SIGMA, samples=2000, seed=0), 0.3),
        (lambda: DensityLevels(SIGMA, relative_error=0.3, floor=1e-3, failure=1e-4, recover="scan", seed=0), 0.3),
    ],
)
def test_points_far_from_the_origin_keep_their_densities(make, error):
    """Their squares have no digits left for the distances between neighbours."""
    points, queries = (part + 1e9 for part in cloud())
    dense = truth(points, queries) > 0.02
    assert dense.sum() > 2
    found = make().fit(points).query(queries)
    np.testing.assert_allclose(found[dense], truth(points, queries)[dense], rtol=error)


@pytest.mark.slow
@pytest.mark.parametrize("make", [uniform, hashed])
def test_uniform_and_hashing_based_are_unbiased(make):
    assert_unbiased(estimates(make, 16, 400), truth(*cloud()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recover", "family", "seeds"),
    [("scan", "p-stable", 300), ("hash", "p-stable", 150), ("hash", "ball-carving", 25)],
)
@pytest.mark.parametrize("guess", [0.25, 0.03])
def test_levels_are_unbiased_at_any_guess(recover, family, seeds, guess):
    """Hashing misses a sample with probability 0.3 % at most (1 % of the relative error): that bias is allowed."""
    samples = level_estimates(recover, 20, seeds, guess, family)
    assert_unbiased(samples, truth(*cloud()), bias=0.0 if recover == "scan" else 0.003)


@pytest.mark.slow
@pytest.mark.parametrize("make", [uniform, hashed])
def test_error_falls_as_one_over_the_root_of_the_budget(make):
    """Nine times the budget, a third of the error. Over 6 queries and 200 seeds its ratio spreads by about 5 %."""
    expected = truth(*cloud())
    small = np.sqrt((((estimates(make, 8, 200) - expected) / expected) ** 2).mean())
    large = np.sqrt((((estimates(make, 72, 200) - expected) / expected) ** 2).mean())
    assert 2.2 < small / large < 4.0


def test_error_of_levels_falls_as_one_over_the_root_of_the_repetitions():
    expected = truth(*cloud())
    rms = [np.sqrt((((level_estimates("scan", r, 200, 0.05) - expected) / expected) ** 2).mean(0)) for r in (8, 72)]
    ratio = float((rms[0] / rms[1]).mean())
    assert 2.4 < ratio < 3.7
    # The bound that the repetitions are chosen by: relative variance at most guess / density per repetition.
    assert np.all(rms[0] ** 2 * 8 <= 0.05 / expected * 1.4)


@pytest.mark.slow
def test_hashing_beats_uniform_sampling_where_the_density_is_low():
    """At a density of one point in 4,000 and 64 evaluations: the whole reason for hashing-based estimators."""
    rng = np.random.default_rng(1)
    points = np.concatenate([rng.standard_normal((1999, 2)) + 12.0, np.zeros((1, 2))]) * SIGMA
    query = np.array([[0.7, 0.0]]) * SIGMA
    expected = truth(points, query)[0]
    assert expected < 1e-3

    def rms(make) -> float:
        values = np.array([make(seed).fit(points).query(query)[0] for seed in range(60)])
        return float(np.sqrt(((values - expected) ** 2).mean()) / expected)

    by_hash = rms(lambda s: HashingBasedDensity(SIGMA, samples=64, scale=float(expected), seed=s))
    by_chance = rms(lambda s: UniformDensity(SIGMA, samples=64, seed=s))
    assert by_hash < 0.3
    assert by_chance > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("recover", ["scan", "hash"])
def test_levels_keep_their_relative_error_and_floor(recover):
    """Relative error 0.3 with failure 0.02 per query: of 25 seeds by 6 queries at most 9 may fail.

    With failure 0.02 more than 9 of 150 have probability 0.001.
    """
    points, queries = cloud()
    expected = truth(points, queries)
    failures, total = 0, 0
    for seed in range(25):
        levels = DensityLevels(SIGMA, relative_error=0.3, floor=2e-3, failure=0.02, recover=recover, seed=seed).fit(
            points
        )
        values = levels.query(queries)
        failures += int((np.abs(values - expected) > 0.3 * expected)[expected >= 2e-3].sum())
        total += int((expected >= 2e-3).sum())
        assert levels.tally.distinct_evaluations <= levels.tally.kernel_evaluations
        assert (levels.tally.hash_evaluations > 0) == (recover == "hash")
    assert total >= 100
    assert failures <= 9


def test_levels_answer_zero_below_the_floor():
    points, queries = cloud()
    far = queries[-1:] + 2.0
    density = float(truth(points, far)[0])
    levels = DensityLevels(SIGMA, relative_error=0.3, floor=4 * density, failure=0.01, seed=0).fit(points)
    assert levels.query(far)[0] == 0.0


def test_a_density_at_the_floor_is_reported():
    """Also if it is estimated a little below: of 20 seeds each fails with probability 0.001 at most."""
    points, query = np.zeros((300, 1)), np.array([[SIGMA * math.sqrt(2 * math.log(4))]])
    for seed in range(20):
        levels = DensityLevels(SIGMA, relative_error=0.3, floor=0.25, failure=1e-3, seed=seed).fit(points)
        assert levels.query(query)[0] == pytest.approx(0.25, rel=0.3)


def test_auto_scans_where_hashing_costs_more():
    points, _ = cloud()
    levels = DensityLevels(SIGMA, relative_error=0.3, floor=1e-3, failure=0.1, seed=0).fit(points)
    assert all(level.tables == 0 for level in levels.plan(0.25))
    # With a billion points a shell's sample is large and its buckets small: then hashing is chosen.
    levels._points = np.broadcast_to(np.zeros((1, 3)), (10**9, 3))
    assert any(level.tables > 0 for level in levels.plan(2.0**-20))


def test_cost_is_counted_in_kernel_evaluations():
    points, queries = cloud()
    sampled = UniformDensity(SIGMA, samples=50, averages=3, seed=0).fit(points)
    sampled.query(queries)
    assert sampled.tally.kernel_evaluations == 6 * 150
    # 150 draws of 300 points meet about 118.
    assert 6 * 100 < sampled.tally.distinct_evaluations < 6 * 136
    by_hash = HashingBasedDensity(SIGMA, samples=50, averages=3, seed=0).fit(points)
    by_hash.query(queries)
    assert 0 < by_hash.tally.kernel_evaluations <= 6 * 150
    assert by_hash.tally.hash_evaluations == 150 * 306
    # Nothing is evaluated for a query that shares a bucket with nobody.
    met = by_hash.tally.kernel_evaluations
    by_hash.query(queries + 1e6)
    assert by_hash.tally.kernel_evaluations == by_hash.tally.distinct_evaluations == met


@pytest.mark.parametrize("recover", ["scan", "hash"])
def test_costs_of_levels_by_hand(recover):
    """Every repetition asks for each point of its sample once, to 5 standard deviations, or wherever it is found.

    What is asked for does not depend on the number of queries held at once, and samples are hashed once.
    """
    points, queries = cloud()
    tallies = []
    for entries in (1 << 22, 400):
        levels = DensityLevels(SIGMA, relative_error=0.3, floor=1e-3, failure=0.1, recover=recover, seed=0)
        levels.block_entries = entries
        levels.fit(points).query_at(queries, 0.25)
        tallies.append(levels.tally)
    assert tallies[0] == tallies[1]
    found, trials, plan = tallies[0], levels.averages * levels.repetitions, levels.plan(0.25)
    rates, tables = (np.array([getattr(level, name) for level in plan]) for name in ("rate", "tables"))
    # Points that some repetition samples
    sampled = 300 * (1 - (1 - rates) ** trials)
    assert found.hash_evaluations == pytest.approx(tables @ (6 + sampled), rel=0.03)
    if recover == "scan":
        asked = 300 * trials * rates.sum()
        assert abs(found.kernel_evaluations / 6 - asked) < 5 * math.sqrt(asked)
        assert found.distinct_evaluations / 6 == pytest.approx(sampled.sum(), rel=0.03)
    else:
        # Most samples are found, in several tables of a level.
        assert 0.8 * 6 * sampled.sum() < found.distinct_evaluations <= 6 * 300 * len(plan)
        assert found.kernel_evaluations > 2 * 6 * 300 * trials * rates.sum()


@pytest.mark.parametrize(("error", "floor", "failure"), [(0.3, 1e-3, 0.1), (0.9, 0.25, 1e-4), (0.05, 0.9, 0.5)])
def test_sizes_of_levels_by_hand(error, floor, failure):
    levels = DensityLevels(SIGMA, relative_error=error, floor=floor, failure=failure).fit(cloud()[0])
    # The last guess is the first at most the floor; each may fail.
    last = 0.5 ** (levels.guesses - 1)
    assert last <= floor < 2 * last
    assert levels.repetitions == math.ceil(8 / error**2)
    assert levels.averages == math.ceil(8 * math.log(levels.guesses / failure))
    for guess in (1.0, 0.25, last):
        plan = levels.plan(guess)
        assert [level.index for level in plan] == list(range(len(plan)))
        np.testing.assert_allclose(
            [level.rate for level in plan], [min(1.0, 0.5**j / (300 * guess)) for j in range(len(plan))]
        )
        # Kernel values beyond the last shell add up to a quarter of the error at most, and are sampled all the same.
        assert 0.5 ** plan[-1].index <= error * guess / 4 < 2 * 0.5 ** plan[-1].index


@pytest.mark.parametrize("failure", [0.1, 1e-6])
def test_tables_miss_a_sample_as_rarely_as_is_said(failure):
    levels = DensityLevels(SIGMA, relative_error=0.5, floor=0.1, failure=failure, recover="hash").fit(cloud()[0])
    for level in levels.plan(0.125)[:-1]:
        chance = float(level.family.collision_probability(math.sqrt((level.index + 1) * math.log(2))))
        assert (1 - chance) ** level.tables <= min(failure, 0.5 / 100)


@pytest.mark.parametrize(("density", "asked"), [(1.0, 1), (0.49, 3), (0.3, 3), (0.25, 3), (0.24, 4), (0.01, 5)])
def test_the_guess_is_halved_until_the_estimate_reaches_it(density, asked):
    guesses = []

    class Known(DensityLevels):
        def _at_guess(self, queries, guess, step):
            guesses.append(guess)
            return np.full(len(queries), density)

    levels = Known(SIGMA, relative_error=0.5, floor=0.07, failure=0.1).fit(np.zeros((3, 2)))
    assert levels.query(np.zeros((2, 2))).tolist() == [density if density > 0.07 else 0.0] * 2
    assert guesses == [1.0, 0.5, 0.25, 0.125, 0.0625][:asked]


@pytest.mark.parametrize("recover", ["scan", "hash"])
@pytest.mark.parametrize("log2", [0.0, -0.4, -1.5, -2.5, -3.5, -6.0, -9.0])
def test_every_kernel_value_lies_in_one_level(log2, recover):
    """300 points of one kernel value, some beyond the last shell, at a guess of 1: to 5 deviations of a count."""
    points = np.zeros((300, 2))
    query = np.array([[SIGMA * math.sqrt(-2 * log2 * math.log(2)), 0.0]])
    levels = DensityLevels(
        SIGMA,
        relative_error=0.9,
        floor=0.5,
        failure=0.1,
        recover=recover,
        seed=1,
        repetition_factor=8000,
        median_factor=1e-9,
    ).fit(points)
    rate = [level.rate for level in levels.plan(1.0) if level.index <= -log2][-1]
    relative = 5 / math.sqrt(levels.repetitions * 300 * rate)
    assert levels.query_at(query, 1.0)[0] == pytest.approx(2.0**log2, rel=relative)
    assert relative < 0.2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_point_of_a_bucket_is_drawn(place):
    """All points in one bucket, of which one is at the query: a third of 900 draws, to 5 standard deviations."""
    points = np.full((3, 1), 40.0)
    points[place] = 0.0
    density = HashingBasedDensity(1.0, samples=900, family=PStableHash(1e9), seed=0).fit(points)
    assert density.query(np.zeros((1, 1)))[0] == pytest.approx(1 / 3, abs=5 * math.sqrt(2 / 9 / 900))


@pytest.mark.parametrize("recover", ["scan", "hash"])
def test_points_at_the_query_are_in_the_first_level(recover):
    """Rounding may put their squared distance below 0."""
    places = np.random.default_rng(3).standard_normal((40, 4))
    levels = DensityLevels(SIGMA, relative_error=0.5, floor=0.02, failure=0.1, recover=recover, seed=0).fit(places)
    assert (levels.query_at(places, 2.0**-5) >= 0.5 / 40).all()


def test_of_several_averages_the_median_is_taken():
    """A single sample of two places is all or nothing, and so is the median of three; a mean would be in thirds."""
    points = np.array([[0.0], [0.0], [1e3], [1e3]])
    found = {
        float(UniformDensity(1.0, samples=1, averages=3, seed=s).fit(points).query(points[:1])[0]) for s in range(20)
    }
    assert found == {0.0, 1.0}
    one, query = np.zeros((1, 1)), np.array([[1.5]])
    found = {HashingBasedDensity(1.0, samples=1, averages=3, seed=s).fit(one).query(query)[0] for s in range(20)}
    chance = HashingBasedDensity(1.0, samples=1).family.collision_probability(1.5 / math.sqrt(2))
    assert sorted(found) == [0.0, pytest.approx(math.exp(-(1.5**2) / 2) / float(chance))]


@pytest.mark.parametrize("scale", [0.5, 0.02, 1e-6])
def test_the_default_hash_collides_with_the_root_of_the_kernel_at_its_scale(scale):
    family = HashingBasedDensity(SIGMA, samples=1, scale=scale).family
    distance = math.sqrt(-math.log(scale))
    assert float(family.collision_probability(distance)) == pytest.approx(math.sqrt(scale))
    # Nearer, too, it is closer to the root than one or many functions come.
    nearer, root = float(family.collision_probability(distance / 2)), math.exp(-(distance**2) / 8)
    assert root**1.85 < nearer < root


def test_the_default_hash_at_the_ends_of_its_scale():
    assert float(HashingBasedDensity(SIGMA, samples=1, scale=1.0).family.collision_probability(0.1)) > 0.99
    assert float(HashingBasedDensity(SIGMA, samples=1, scale=0.0).family.collision_probability(0.0)) == 1.0


def test_points_so_far_that_they_cannot_collide_have_no_weight_if_they_do():
    density = HashingBasedDensity(1.0, samples=20, scale=1e-4, seed=0).fit(np.array([[2e100]]))
    assert density.query(np.array([[1e100]])).tolist() == [0.0]
    assert density.tally.kernel_evaluations > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: UniformDensity(SIGMA, samples=9, averages=3, seed=seed),
        lambda seed: HashingBasedDensity(SIGMA, samples=9, averages=3, seed=seed),
        lambda seed: DensityLevels(SIGMA, relative_error=0.5, floor=0.01, failure=0.1, recover="hash", seed=seed),
    ],
)
def test_same_seed_same_answer(make):
    points, queries = cloud()

    def one(estimator: KernelDensity) -> np.ndarray:
        return estimator.fit(points).query(queries)

    np.testing.assert_array_equal(one(make(7)), one(make(7)))
    assert np.any(one(make(7)) != one(make(8)))


@pytest.mark.parametrize(
    ("action", "word"),
    [
        (lambda: ExactDensity(0.0), "sigma"),
        (lambda: ExactDensity(1.0).query(np.zeros((1, 2))), "call fit"),
        (lambda: ExactDensity(1.0).fit(np.zeros((0, 2))), "empty"),
        (lambda: ExactDensity(1.0).fit(np.full((3, 2), 1e155)), r"more than 1e\+150"),
        (lambda: ExactDensity(1e-300).fit(np.ones((3, 2))).query(np.ones((1, 2))), r"more than 1e\+150"),
        (lambda: ExactDensity(1.0).fit(np.zeros((3, 2))).query(np.zeros((1, 3))), "width"),
        (lambda: UniformDensity(1.0, samples=0), "samples"),
        (lambda: HashingBasedDensity(1.0, samples=3, averages=0), "averages"),
        (lambda: DensityLevels(1.0, relative_error=1.5, floor=0.1, failure=0.1), "below 1"),
        (lambda: DensityLevels(1.0, relative_error=0.5, floor=0.0, failure=0.1), "floor"),
        (lambda: DensityLevels(1.0, relative_error=0.5, floor=0.1, failure=0.1, recover="guess"), "recover"),
        (lambda: UniformDensity(1.0, samples=3, seed=-1), "seed"),
    ],
)
def test_bad_input_is_one_clear_line(action, word):
    with pytest.raises(InputError, match=word) as caught:
        action()
    assert "\n" not in str(caught.value)
