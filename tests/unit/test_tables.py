"""From per-context values to the tables that figures and claims are drawn from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from approxkmv.steps.compare import claims, growth_exponent
from approxkmv.steps.summarise import per_head, scaling_with_length

HEADS = pd.DataFrame(
    {
        "context": [0, 1, 2, 0, 1, 2],
        "layer": [0] * 3 + [1] * 3,
        "head": [0] * 3 + [2] * 3,
        "max_ratio": [1.0, 5.0, 2.0, 0.5, 0.25, 0.125],
        "max_prefix": [50, 60, 70, 80, 90, 100],
        "log_next": [0.0, 0.01, 0.02, 1.0, 2.0, 3.0],
        "log_double": [0.1, 0.2, 0.3, 900.0, 1000.0, 1100.0],
    }
)


def test_per_head_takes_the_maximum_over_contexts_and_medians_of_order_ratios():
    table = per_head(HEADS).set_index(["layer", "head"])
    first = table.loc[(0, 0)]
    assert (first["contexts"], first["max_ratio"], first["max_ratio_context"], first["max_ratio_prefix"]) == (
        3,
        5,
        1,
        60,
    )
    assert first["median_ratio"] == 2.0
    assert first["median_next_ratio"] == pytest.approx(np.exp(0.01))
    assert first["median_double_ratio"] == pytest.approx(np.exp(0.2))


def test_an_order_ratio_beyond_float64_stays_finite():
    row = per_head(HEADS).set_index(["layer", "head"]).loc[(1, 2)]
    assert row["median_log_double"] == 1000.0
    assert np.isfinite(row["median_double_ratio"])


def test_scaling_takes_the_maximum_over_heads_per_context_then_mean_and_deviation():
    values = pd.DataFrame(
        {
            "prefix": [50] * 4 + [100] * 2,
            "context": [0, 0, 1, 1, 0, 0],
            "layer": [0, 0, 0, 0, 0, 0],
            "head": [0, 1, 0, 1, 0, 1],
            "ratio": [1.0, 3.0, 5.0, 2.0, 7.0, 9.0],
        }
    )
    table = scaling_with_length(values).set_index("prefix")
    assert table.loc[50, "contexts"] == 2
    assert table.loc[50, "mean"] == 4.0
    assert table.loc[50, "std"] == 1.0
    assert (table.loc[100, "contexts"], table.loc[100, "mean"], table.loc[100, "std"]) == (1, 9.0, 0.0)


def scaling(slope: float, contexts: int = 10) -> pd.DataFrame:
    prefix = np.array([50, 100, 200, 400])
    return pd.DataFrame({"prefix": prefix, "contexts": contexts, "mean": 3.0 * prefix**slope})


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_the_growth_exponent_is_the_slope_in_logs(slope):
    assert growth_exponent(scaling(slope))[0] == pytest.approx(slope, abs=1e-12)


def test_lengths_with_few_texts_do_not_decide_the_exponent():
    table = scaling(0.0)
    table.loc[3, ["contexts", "mean"]] = [1, 1000.0]
    assert growth_exponent(table)[0] == pytest.approx(0.0, abs=1e-12)


def test_claims_hold_or_not_by_their_criterion():
    overview = {"model": "m", "paper_bound": 4.6, "texts_used": 3}
    heads = pd.DataFrame(
        {"max_ratio": [1.0, 4.6], "median_next_ratio": [1.0, 1.01], "median_double_ratio": [2.0, 19.0]}
    )
    assert [row["holds"] for row in claims(overview, heads, scaling(0.0))] == ["yes"] * 5
    worse = pd.DataFrame(
        {"max_ratio": [1.0, 4.7], "median_next_ratio": [1.0, 1.2], "median_double_ratio": [21.0, 30.0]}
    )
    assert [row["holds"] for row in claims(overview, worse, scaling(0.4))] == ["no"] * 5
