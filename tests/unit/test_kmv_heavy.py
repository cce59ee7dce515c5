"""FindHeavy returns every heavy pair in at least 99 % of seeds, and no light one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kmv_kernels import SPARSE, Case, background, real_head

from approxkmv.errors import InputError
from approxkmv.kmv.constants import PaperConstants
from approxkmv.kmv.hashing import near_family
from approxkmv.kmv.heavy import HeavyKeys, find_heavy

ALPHA = 1 / 3


def found_matrix(heavy: HeavyKeys, shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape, dtype=bool)
    out[heavy.rows(), heavy.indices] = True
    return out


def run(case: Case, **options) -> HeavyKeys:
    return find_heavy(case.queries, case.keys, sigma=case.sigma, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "seeds"),
    [(name, "p-stable", 100) for name in (*SPARSE, "real head")] + [("even spread", "ball-carving", 20)],
)
def test_every_heavy_pair_and_no_light_one(name, family, seeds):
    """At 100 keys. A seed fails with probability 10^4 n^-10 at most: one failure in 100 would already be a fault."""
    case = real_head() if name == "real head" else SPARSE[name](100)
    heavy = case.matrix >= len(case.keys) ** -ALPHA
    assert heavy.sum() >= 10
    complete = 0
    for seed in range(seeds):
        found = found_matrix(run(case, seed=seed, family=family), heavy.shape)
        assert not (found & ~heavy).any()
        complete += bool((found == heavy).all())
    assert complete >= 0.99 * seeds


def test_too_few_tables_lose_heavy_pairs():
    """The same test would fail with a tenth of the logarithm's factor: it can tell."""
    case = SPARSE["even spread"](100)
    heavy = case.matrix >= 100**-ALPHA
    few = PaperConstants(table_factor=0.05)
    complete = sum((found_matrix(run(case, seed=s, constants=few), heavy.shape) == heavy).all() for s in range(20))
    assert complete <= 10


def test_queries_and_keys_may_differ_in_number():
    case = background(90)
    heavy = find_heavy(case.queries[:17], case.keys, sigma=case.sigma, seed=0)
    expected = case.matrix[:17] >= 90**-ALPHA
    assert len(heavy) == 17
    np.testing.assert_array_equal(found_matrix(heavy, (17, 90)), expected)
    one = find_heavy(case.queries, case.keys[:1], sigma=case.sigma, seed=0)
    # With one key n^-alpha = 1: heavy means equal.
    np.testing.assert_array_equal(found_matrix(one, (90, 1)), case.matrix[:, :1] >= 1 - 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.8, 1.0])
def test_any_alpha(alpha):
    case = SPARSE["even spread"](40)
    case = Case(np.concatenate([case.queries, case.keys[:3]]), case.keys, case.sigma)
    found = found_matrix(run(case, seed=1, alpha=alpha), case.matrix.shape)
    np.testing.assert_array_equal(found, case.matrix >= 40**-alpha * (1 - 1e-12))


def test_a_pair_that_meets_the_threshold_is_heavy():
    """K = n^-alpha but for rounding, which goes either way."""
    for n in range(3, 30):
        keys = np.arange(n)[:, None] * 1e3
        keys[0] = math.sqrt(2 * ALPHA * math.log(n))
        assert find_heavy(np.zeros((1, 1)), keys, sigma=1.0, seed=0)[0].tolist() == [0]


def test_sets_are_a_sequence_of_sorted_indices():
    heavy = run(SPARSE["clusters"](64), seed=0)
    assert len(heavy) == 64
    assert all(np.all(np.diff(keys) > 0) for keys in heavy)
    np.testing.assert_array_equal(np.concatenate(list(heavy)), heavy.indices)
    np.testing.assert_array_equal(heavy[-1], heavy[63])
    assert len(heavy[3:5]) == 2
    with pytest.raises(IndexError):
        heavy[64]
    assert np.all(heavy.log_values >= -ALPHA * np.log(64) - 1e-9)


@pytest.mark.parametrize(("family", "factor"), [("p-stable", 0.1), ("ball-carving", 0.02)])
def test_the_answer_does_not_depend_on_the_memory(family, factor):
    case = SPARSE["even spread"](600)
    # Too few tables on purpose, so that what is found depends on the tables that were drawn. Two blocks of rows.
    few = PaperConstants(table_factor=factor)
    wide = run(case, seed=3, family=family, constants=few)
    tight = run(case, seed=3, family=family, constants=few, memory=1_340_000)
    np.testing.assert_array_equal(wide.starts, tight.starts)
    np.testing.assert_array_equal(wide.indices, tight.indices)
    assert wide.tally == tight.tally


def test_cost_is_tables_times_points_and_collisions():
    case = SPARSE["even spread"](200)
    heavy = run(case, seed=0)
    assert heavy.tables == PaperConstants().tables(200, ALPHA)
    assert heavy.tally.hash_evaluations == heavy.tables * 400
    assert len(heavy.indices) <= heavy.tally.distinct_evaluations <= 200 * 200
    assert heavy.tally.distinct_evaluations <= heavy.tally.kernel_evaluations


@pytest.mark.parametrize(("factor", "seeds"), [(10.0, 1), (0.05, 200)])
def test_collisions_are_those_of_the_family_at_the_near_distance(factor, seeds):
    """About 400 tables in all, of two or several hundred a run: to 5 standard deviations of what a table scans.

    At the distance where K = n^-alpha, sqrt(2 alpha ln n) sigma, points collide with that probability in each.
    """
    case, n = SPARSE["even spread"](200), 200
    runs = [
        run(case, seed=s, constants=PaperConstants(table_factor=factor)).tally.kernel_evaluations for s in range(seeds)
    ]
    tables = seeds * math.ceil(factor * n**ALPHA * math.log(n))
    family = near_family("p-stable", near := math.sqrt(2 * ALPHA * math.log(n)), n**-ALPHA, n=n)
    distances = np.sqrt(((case.queries[:, None] - case.keys) ** 2).sum(2)) / case.sigma
    assert float(family.collision_probability(near)) == pytest.approx(n**-ALPHA, rel=1e-4)
    expected = float(family.collision_probability(distances).sum())
    drawn = family.draw(3, 400, np.random.default_rng(1))
    codes_q, codes_k = drawn.codes(case.queries / case.sigma), drawn.codes(case.keys / case.sigma)
    deviation = (codes_q[:, :, None] == codes_k[:, None]).sum((1, 2)).std()
    assert abs(sum(runs) / tables - expected) < 5 * deviation / math.sqrt(tables)
    # Eight tables in a run of two, or a near distance a quarter off, would show.
    assert 5 * deviation / math.sqrt(tables) < 0.16 * expected


def test_torch_gives_the_sets_of_numpy():
    case = SPARSE["clusters"](50)
    a = run(case, seed=2)
    b = find_heavy(torch.from_numpy(case.queries), torch.from_numpy(case.keys), sigma=case.sigma, seed=2)
    np.testing.assert_array_equal(a.indices, b.indices)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"keys": np.zeros((3, 5))}, "width"),
        ({"keys": np.zeros((0, 2))}, "empty"),
        ({"queries": np.zeros(3)}, r"matrix \(n, d\)"),
        ({"queries": np.full((3, 2), np.nan)}, "queries holds a NaN"),
        ({"keys": torch.zeros(3, 2)}, "different kinds"),
        ({"sigma": 0.0}, "sigma"),
        ({"alpha": 1.5}, "alpha"),
        ({"family": "simhash"}, "p-stable, ball-carving"),
        ({"seed": 1.5}, "seed"),
        ({"memory": 1000}, "at least"),
        ({"sigma": 1e-300}, "bandwidths apart"),
        ({"queries": np.full((3, 2), 1e160)}, "bandwidths apart"),
    ],
)
def test_bad_input_is_one_clear_line(change, word):
    arguments = {"queries": np.zeros((3, 2)), "keys": np.arange(6.0).reshape(3, 2), "sigma": 1.0, **change}
    with pytest.raises(InputError, match=word) as caught:
        find_heavy(arguments.pop("queries"), arguments.pop("keys"), **arguments)
    assert "\n" not in str(caught.value)
