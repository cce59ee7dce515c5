"""The cost study counts what a full run would evaluate, and its fits recover known exponents and crossings."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from approxkmv import approx_kmv
from approxkmv.errors import InputError, TableError
from approxkmv.figures.complexity import draw
from approxkmv.kmv.complexity import COLUMNS, FITTED, bound_exponents, fit_exponents, log10_crossing, measure_costs
from approxkmv.kmv.sparse_kernels import SPARSE_KERNELS
from approxkmv.slopes import log_log_line


def test_counts_are_those_of_a_full_run():
    table = measure_costs([200], kernels=["even spread"], seeds=1, rows=200)
    line = table.iloc[0]
    points = SPARSE_KERNELS["even spread"](200, 0)
    rng = np.random.default_rng([0, 200])
    rng.permutation(200)
    x = rng.standard_normal(200)
    result = approx_kmv(*points[:2], x, sigma=points.sigma, epsilon=0.5, seed=0)
    assert line["hash"] == result.hash_evaluations
    assert line["large"] == result.phases["large"].kernel_evaluations
    assert line["density"] == result.phases["density"].kernel_evaluations
    assert line["light"] == pytest.approx(result.phases["light"].kernel_evaluations, rel=0.01)
    assert line["heavy"] == pytest.approx(result.phases["heavy"].kernel_evaluations, rel=0.1)


def test_every_column_by_hand():
    """Of a sample of rows; what is counted in them is in the tests beside this one."""
    n, epsilon = 300, 0.4
    line = measure_costs([n], kernels=["clusters"], seeds=1, epsilon=epsilon, rows=50).iloc[0]
    points, rng = SPARSE_KERNELS["clusters"](n, 0), np.random.default_rng([0, n])
    rows, x = np.sort(rng.permutation(n)[:50]), rng.standard_normal(n)
    square = x**2 * n / (x**2).sum()
    large, kept = square >= n**0.109, (square < n**0.109) & (square > n**-4.0)
    assert line["rows"] == 50
    assert line["tables"] == math.ceil(10 * n ** (1 / 3) * math.log(n))
    assert line["hash"] == 2 * n * line["tables"]
    assert line["large"] == n * large.sum()
    assert line["density"] == n * kept.sum()
    # Buckets of squares that differ by 1 + epsilon / 2 at most, rounded up; the floor of each, and Theorem 2.2's cost
    _, sizes = np.unique(m := np.ceil(np.log(square[kept]) / math.log(1 + epsilon / 2)), return_counts=True)
    floors = epsilon**2 / (n * math.log(n) ** 2 * (1 + epsilon / 2) ** np.unique(m) * sizes)
    printed = n * (n ** (2 * 0.218) * floors**-0.173 * math.log(n**2)).sum()
    assert line["density_printed"] == pytest.approx(printed, rel=1e-9)
    for light in ("light", "light_printed"):
        whole = line["large"] + line["heavy"] + min(line["density"], line["density_printed"]) + line[light]
        assert line[light.replace("light", "total")] == pytest.approx(whole)
    gaps = ((points.queries[rows, None] - points.keys) ** 2).sum(2)
    entries = np.sort(np.exp(-gaps / (2 * points.sigma**2)).ravel())[::-1]
    assert line["tail_to_head"] == pytest.approx(entries[50:].sum() / entries[:50].sum())
    # At most every pair for the heavy keys, which collide in some table, and each kept column for its density
    assert line["large"] + line["density"] < line["distinct"] <= line["large"] + line["density"] + n * n
    assert line["n_squared"] == n * n


def test_a_sample_of_rows_stands_for_all():
    whole, sample = (measure_costs([600], kernels=["background"], seeds=1, rows=rows).iloc[0] for rows in (600, 100))
    for column in ("heavy", "light", "total", "distinct"):
        assert sample[column] == pytest.approx(whole[column], rel=0.15)
    assert sample["hash"] == whole["hash"]


@pytest.mark.parametrize("name", SPARSE_KERNELS)
def test_row_sums_of_the_kernels_do_not_grow(name):
    """To a tenth of their mean, at four times as many keys; the background adds about 1 to its diagonal."""
    means = []
    for n in (500, 2000):
        points = SPARSE_KERNELS[name](n, 0)
        matrix = np.exp(-torch.cdist(*map(torch.from_numpy, points[:2])).square().numpy() / (2 * points.sigma**2))
        means.append(matrix.sum(1).mean())
    assert means[1] == pytest.approx(means[0], rel=0.1)
    assert name != "background" or means[0] == pytest.approx(2.0, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE_KERNELS)
def test_the_kernels_satisfy_the_assumption_at_every_n(name):
    table = measure_costs([256, 1024, 4096], kernels=[name], seeds=1, rows=64)
    assert table["tail_to_head"].max() < 8
    assert table["tail_to_head"].iloc[-1] < 1.6 * table["tail_to_head"].iloc[0]


@pytest.mark.slow
def test_line_7_as_printed_asks_for_more_and_ever_more():
    table = measure_costs([256, 4096], kernels=["clusters"], seeds=2, rows=64)
    assert (table["light_printed"] > table["light"]).all()
    ratio = (table["light_printed"] / table["light"]).groupby(table["n"]).mean()
    assert ratio[4096] > 1.1 * ratio[256]


def synthetic(exponent: float, factor: float, noise: float = 0.0) -> pd.DataFrame:
    n = np.repeat([256, 1024, 4096, 16384], 3)
    wobble = np.exp(noise * np.random.default_rng(0).standard_normal(len(n)))
    cost = factor * n**exponent * np.log(n) * wobble
    return pd.DataFrame({"kernel": "k", "n": n, "seed": np.tile(range(3), 4), **dict.fromkeys(FITTED, cost)})


def test_fits_find_a_known_exponent_inside_their_interval():
    fit = fit_exponents(synthetic(1.7, 30.0, noise=0.1), draws=500).iloc[0]
    assert fit["exponent_low"] < 1.7 < fit["exponent_high"]
    assert fit["exponent_high"] - fit["exponent_low"] < 0.3
    assert fit["log10_crossing_low"] < log10_crossing(1.7, math.log(30.0)) < fit["log10_crossing_high"]
    # The 95 % interval of a slope of known error
    n = np.repeat([256, 1024, 4096, 16384], 3)
    costs = synthetic(1.7, 30.0, noise=0.1)["total"]
    error, plain_error = (log_log_line(n, costs / other)[2] for other in (np.log(n), 1.0))
    assert fit["exponent_high"] - fit["exponent_low"] == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert fit["plain_high"] - fit["plain_low"] == pytest.approx(2 * 1.96 * plain_error, rel=0.25)
    assert fit["plain_low"] < fit["plain_exponent"] < fit["plain_high"]
    # A line of another slope goes through the middle of the costs, too.
    for end in ("low", "high"):
        slope = fit[f"exponent_{end}"]
        level = math.log(30.0) + (1.7 - slope) * np.log(n).mean()
        assert fit[f"log10_crossing_{end}"] == pytest.approx(log10_crossing(slope, level), abs=0.15)
    # Without the logarithm the same costs look steeper.
    assert fit["plain_exponent"] > fit["exponent"] + 0.1


def test_what_a_fit_says_of_costs_without_noise():
    fit = fit_exponents(synthetic(1.7, 30.0), draws=20).iloc[0]
    assert fit[["exponent_low", "exponent", "exponent_high"]].tolist() == pytest.approx([1.7, 1.7, 1.7])
    assert fit["log10_crossing"] == pytest.approx(log10_crossing(1.7, math.log(30)))
    last = math.log(16384)
    assert fit["over_n_squared"] == pytest.approx(30 * math.exp(-0.3 * last) * last)
    # Through the last cost, with the paper's exponent
    assert fit["paper_exponent"] == 1.89
    assert fit["log10_crossing_paper"] == pytest.approx(log10_crossing(1.89, math.log(30) - 0.19 * last))


def test_intervals_where_samples_of_few_sizes_or_quadratic_costs_are_drawn():
    """Three sizes have one line, whichever is drawn twice elsewhere; some lines of noisy costs never fall below n^2."""
    three = fit_exponents(synthetic(1.7, 30.0, noise=0.1).query("seed == 0 and n < 10000"), draws=200).iloc[0]
    assert three[["exponent_low", "exponent_high"]].tolist() == pytest.approx([three["exponent"]] * 2)
    noisy = fit_exponents(synthetic(1.98, 30.0, noise=0.5), draws=200).iloc[0]
    assert noisy["exponent_low"] < 1.95 < 2.0 < noisy["exponent_high"]
    assert math.isfinite(noisy["log10_crossing_low"])
    assert math.isinf(noisy["log10_crossing_high"])


def test_crossings_solve_their_equation():
    for exponent, factor in ((1.5, 50.0), (1.89, 1000.0), (1.89, 1.0), (1.2, 10.0)):
        log_n = log10_crossing(exponent, math.log(factor)) * math.log(10)
        assert math.log(factor) + math.log(log_n) == pytest.approx((2 - exponent) * log_n, rel=1e-6)
    assert math.isinf(log10_crossing(2.0, 0.0))
    assert math.isinf(fit_exponents(synthetic(2.1, 5.0), draws=20).iloc[0]["log10_crossing"])
    assert log10_crossing(0.5, math.log(1e-9)) == 0.0
    # n^1.5 ln n is below n^2 everywhere.
    assert log10_crossing(1.5, 0.0) == 0.0


@pytest.mark.slow
def test_the_figure_is_drawn_from_the_table_alone(tmp_path):
    table = measure_costs([64, 128, 256], kernels=["clusters", "background"], seeds=2)
    assert list(table.columns) == list(COLUMNS)
    path = tmp_path / "complexity.csv"
    table.to_csv(path, index=False)
    outputs = draw(path, tmp_path / "figures" / "complexity")
    assert [p.suffix for p in outputs] == [".pdf", ".png"]
    assert all(p.stat().st_size > 10_000 for p in outputs)
    assert not list((tmp_path / "figures").glob("*.part"))


@pytest.mark.parametrize("first", [1.3, 1.72, 2.1])
def test_the_figure_shows_mean_costs_and_fitted_exponents_with_their_intervals(tmp_path, monkeypatch, first):
    from approxkmv.figures import complexity

    table = pd.DataFrame({"kernel": np.repeat(["a", "b"], 12), "n": np.tile(np.repeat([256, 1024, 4096, 16384], 3), 2)})
    generator = np.random.default_rng(0)
    for i, name in enumerate(name for name in COLUMNS if name not in table):
        power = np.where(table["kernel"] == "a", first, first + 0.1) + 0.02 * i
        noise = np.exp(0.05 * generator.standard_normal(len(table)))
        table[name] = 1e4 * table["n"] ** power * np.log(table["n"]) * noise
    table.assign(seed=np.tile(range(3), 8)).to_csv(tmp_path / "complexity.csv", index=False)
    figures = []
    monkeypatch.setattr(complexity, "save", lambda figure, stem: figures.append(figure))
    monkeypatch.setattr(complexity, "fit_exponents", lambda table: fit_exponents(table, draws=50))
    draw(tmp_path / "complexity.csv", tmp_path / "x")
    costs, exponents = figures[0].axes
    means = table.groupby(["kernel", "n"]).mean()
    lines = {line.get_label(): line.get_ydata() for line in costs.lines}
    for name in "ab":
        np.testing.assert_allclose(lines[f"asked for: {name}"], means.loc[name]["total"])
        assert any(
            np.allclose(line.get_ydata(), means.loc[name]["heavy"]) for line in costs.lines if len(line.get_xdata())
        )
    np.testing.assert_allclose(lines["hash evaluations"], table.groupby("n")["hash"].mean())
    n = np.array([256, 1024, 4096, 16384])
    np.testing.assert_allclose(lines["exact product, $n^2$"], n**2)
    slope = lines["slope 1.89"]
    assert np.diff(np.log(slope)) / np.diff(np.log(n)) == pytest.approx([1.89] * 3)
    fits = fit_exponents(table, draws=50).set_index(["quantity", "kernel"])
    drawn = [container.lines for container in exponents.containers]
    assert len(drawn) == 2 * len(FITTED)
    for (quantity, name), (point, _, (bar,)) in zip(itertools.product(FITTED, "ab"), drawn, strict=True):
        fit = fits.loc[quantity, name]
        assert point.get_xdata()[0] == pytest.approx(fit["exponent"])
        assert bar.get_segments()[0][:, 0] == pytest.approx([fit["exponent_low"], fit["exponent_high"]])
    total = fits.loc["total"]
    times = [f"{end:,.0f}" for end in (total["over_n_squared"].min(), total["over_n_squared"].max())]
    ends = [f"$10^{{{end:.0f}}}$" for end in (total["log10_crossing_low"].min(), total["log10_crossing_high"].max())]
    words = " ".join(figures[0].get_suptitle().split())
    assert words.startswith(
        f"At n = 16,384 the printed constants (line 7 mended) ask for {times[0]} to {times[1]} times"
    )
    said = {1.3: f"they win only beyond an n between {ends[0]} and {ends[1]}", 2.1: "no n is found at which"}
    assert said.get(first, f"they win only beyond an n of {ends[0]}, if at all") in words
    assert ("(astronomical)" in words) == (first < 2 and total["log10_crossing_low"].min() > 12)
    assert [complexity._power(power) for power in (3.0, 4.9, 5.0, math.inf)] == ["1,000", "79,433", "$10^{5}$", "never"]


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="sizes"):
        measure_costs([])
    with pytest.raises(InputError, match="sizes is 1: it must be at least 2"):
        measure_costs([1])
    with pytest.raises(InputError, match="kernels"):
        measure_costs([64], kernels=["dense"])
    with pytest.raises(InputError, match="epsilon"):
        measure_costs([64], epsilon=0.0)
    with pytest.raises(InputError, match="three sizes"):
        fit_exponents(synthetic(1.5, 1.0).query("n < 2000"))
    with pytest.raises(TableError, match="is missing"):
        draw(tmp_path / "none.csv", tmp_path / "x")
    (tmp_path / "cut.csv").write_text("kernel,n\na,3\n")
    with pytest.raises(TableError, match="lacks"):
        draw(tmp_path / "cut.csv", tmp_path / "x")


@pytest.mark.parametrize("rebalanced", [False, True])
def test_the_exponent_of_the_bound_is_the_least_over_the_algorithms_parameters(rebalanced):
    growth = np.array([-1.0, 0.0, 0.1, 0.218, 0.327, 0.346, 0.6, 0.91, 1.0])
    g = np.maximum(growth, 0)
    # A grid: alpha, gamma, then beta, each term as the proofs have it.
    alpha, gamma = np.meshgrid(np.linspace(0, 1, 1001), np.linspace(0, 0.5, 1001), indexing="ij")
    betas = np.linspace(0.1, 0.8, 701) if rebalanced else [0.218]
    least = np.full(len(g), np.inf)
    for i, each in enumerate(g):
        heavy = np.maximum(1 + 2 * alpha + each, 2 + gamma - alpha + each).min(0)
        for beta in betas:
            terms = np.maximum(np.maximum(heavy, 2 - gamma[0]), 2 + gamma[0] - beta + each)
            least[i] = min(least[i], max(terms.min(), 1.346 + 2 * beta))
    # Steps of 0.001 in alpha, doubled.
    np.testing.assert_allclose(bound_exponents(growth, rebalanced=rebalanced), np.minimum(least, 2), atol=2e-3)


def test_the_bound_is_quadratic_where_it_is_said_to_be():
    assert bound_exponents(np.array([0.2179, 0.2181]), rebalanced=False).round(9).tolist() == [1.99995, 2.0]
    assert bound_exponents(np.array([0.3269, 0.3271]), rebalanced=True).round(9).tolist() == [1.99996, 2.0]
