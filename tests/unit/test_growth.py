"""Growth per head: the exponent, its interval, the verdict and its reason, and the two tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from approxkmv.statistics.growth import FAR_LENGTH, Growth, fit_growth, verdict
from approxkmv.steps.growth import growth_of

LENGTHS = np.array([50, 100, 200, 400])


def sample(exponents, texts: int = 40, noise: float = 0.0, seed: int = 0):
    """Texts of different levels, the long ones at the lower levels, and of different lengths."""
    generator = np.random.default_rng(seed)
    names, lengths, rows = [], [], []
    for text in range(texts):
        reached = LENGTHS[: 2 + text % 3]
        level = np.exp(-(text % 3) + 0.2 * generator.normal())
        for n in reached:
            names.append(text)
            lengths.append(n)
            rows.append(level * n ** np.asarray(exponents) * np.exp(noise * generator.normal(size=len(exponents))))
    return np.array(names), np.array(lengths), np.array(rows)


def test_the_exponent_is_that_within_each_text_whatever_the_levels():
    fit = fit_growth(*sample([-0.3, 0.0, 0.4, 1.0]))
    np.testing.assert_allclose(fit.exponent, [-0.3, 0.0, 0.4, 1.0], atol=1e-12)
    np.testing.assert_allclose(fit.exponent_low, fit.exponent_high, atol=1e-12)
    # A fit over all points at once is misled by the levels: this is what the level per text is for.
    _, lengths, rows = sample([0.0])
    assert np.polyfit(np.log(lengths), np.log(rows[:, 0]), 1)[0] < -0.2


def test_the_bootstrap_equals_one_that_draws_texts_one_by_one():
    texts, lengths, rows = sample([0.3], texts=12, noise=0.3)
    fit = fit_growth(texts, lengths, rows, draws=4000)
    generator = np.random.default_rng(5)
    slopes = []
    for _ in range(2000):
        x, y = [], []
        for text in generator.integers(0, 12, 12):
            mine = texts == text
            x.append(np.log(lengths[mine]) - np.log(lengths[mine]).mean())
            y.append(np.log(rows[mine, 0]) - np.log(rows[mine, 0]).mean())
        x, y = np.concatenate(x), np.concatenate(y)
        slopes.append((x @ y) / (x @ x))
    # Both are drawn: the quantiles of 2,000 draws scatter by some 5 % of the width.
    width = fit.exponent_high[0] - fit.exponent_low[0]
    np.testing.assert_allclose(
        [fit.exponent_low[0], fit.exponent_high[0]], np.quantile(slopes, [0.025, 0.975]), atol=0.15 * width
    )


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(60):
        fit = fit_growth(*sample([0.3], noise=0.5, seed=seed), draws=300)
        covered += fit.exponent_low[0] <= 0.3 <= fit.exponent_high[0]
    # Binomial(60, 0.95) is below 50 once in a thousand; the bootstrap with 40 texts covers a little less.
    assert covered >= 50


def test_the_same_seed_gives_the_same_interval():
    one, two, other = (fit_growth(*sample([0.3], noise=0.5), seed=seed) for seed in (1, 1, 2))
    assert one.exponent_low == two.exponent_low
    assert one.exponent_low != other.exponent_low


def test_a_head_without_a_tail_has_no_growth():
    texts, lengths, rows = sample([0.0])
    fit = fit_growth(texts, lengths, np.zeros_like(rows))
    assert fit.exponent[0] == 0
    assert verdict(fit, 0, 0.0)[0] == "holds"


def growth(low: float, high: float, far: float, texts: int = 20) -> Growth:
    array = np.array
    return Growth(
        texts, array([(low + high) / 2]), array([low]), array([high]), array([0.0]), array([far]), array([far])
    )


@pytest.mark.parametrize(
    ("low", "high", "far", "largest", "word", "reason"),
    [
        (-0.2, 0.09, 80.0, 80.0, "holds", "below 0.1"),
        (0.2, 0.9, 4.9, 1.0, "holds", f"{FAR_LENGTH:,}"),
        (0.51, 0.9, 100.0, 5.1, "fails", "c reaches 5.1"),
        (0.51, 0.9, 100.0, 4.9, "undecided", "c is at most 4.9 at the lengths seen"),
        (0.1, 0.5, 9.0, 80.0, "grows slowly", "within 0.1 and 0.5"),
        (0.05, 0.4, 9.0, 80.0, "undecided", "both sides of 0.1"),
        (0.3, 0.7, 9.0, 80.0, "undecided", "both sides of 0.5"),
        (0.0, 0.7, 9.0, 80.0, "undecided", "both sides of 0.1 and 0.5"),
    ],
)
def test_verdicts_at_their_edges(low, high, far, largest, word, reason):
    found, why = verdict(growth(low, high, far), 0, largest)
    assert found == word
    assert reason in why


def test_few_texts_decide_nothing():
    found, why = verdict(growth(0.0, 0.0, 0.1, texts=4), 0, 0.1)
    assert found == "undecided"
    assert "only 4 texts" in why


def test_texts_of_one_length_decide_nothing():
    fit = fit_growth(np.arange(9), np.full(9, 50), np.ones((9, 2)))
    assert fit.texts == 0
    assert verdict(fit, 1, 1.0)[0] == "undecided"


def test_the_tables_have_both_masks_side_by_side_and_curves_follow_the_fit():
    texts, lengths, rows = sample([0.2, 0.9])
    parts = [
        pd.DataFrame({"context": texts, "layer": 1, "head": head, "prefix": lengths, "ratio": rows[:, head]}).assign(
            masked_ratio=rows[:, head] / 2
        )
        for head in (0, 1)
    ]
    heads = pd.DataFrame({"layer": 1, "head": [0, 1], "max_ratio": rows.max(0), "masked_max_ratio": rows.max(0) / 2})
    table, curves = growth_of(pd.concat(parts), heads, seed=0)
    np.testing.assert_allclose(table["exponent"], [0.2, 0.9], atol=1e-12)
    np.testing.assert_allclose(table["masked_exponent"], [0.2, 0.9], atol=1e-12)
    np.testing.assert_allclose(table["coefficient"], 2 * table["masked_coefficient"])
    assert table["verdict"].tolist()[1] == "fails"
    merged = curves.merge(table, on=["layer", "head"])
    np.testing.assert_allclose(
        merged["adjusted_ratio"], merged["coefficient"] * merged["prefix"] ** merged["exponent"], rtol=1e-9
    )
    assert curves.groupby("prefix")["texts_x" if "texts_x" in curves else "texts"].first().tolist() == [40, 40, 26, 13]


def test_the_findings_count_undecided_heads_by_the_reasons_of_the_verdicts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from findings import undecided_rows, where

    found = [
        verdict(growth(0.6, 0.9, 100.0), 0, 1.0),
        verdict(growth(0.3, 0.7, 9.0), 0, 80.0),
        verdict(growth(0.6, 0.7, 9.0), 0, 2.0),
        verdict(growth(0.0, 0.0, 0.1, texts=4), 0, 0.1),
        verdict(growth(-0.2, 0.0, 80.0), 0, 80.0),
    ]
    table = pd.DataFrame(found, columns=["verdict", "reason"]).assign(layer=[0, 0, 1, 1, 4], exponent=0.0)
    row = undecided_rows("a model", table)[0]
    assert row["undecided"] == "4"
    assert list(row.values())[3:] == ["2", "1", "1"]
    assert where(table, "", "undecided") == "layer 0: 2, layer 1: 2"
    assert where(table, "", "holds") == "layer 4: 1"
    assert where(table, "", "fails") == "none"
