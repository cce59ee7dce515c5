"""From per-context values to the tables that figures and claims are drawn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from approxkmv.config import Study, load_config, study_of
from approxkmv.errors import TableError
from approxkmv.figures import context_scaling, max_ratios, order_ratios, style
from approxkmv.files import hash_file, write_csv, write_json, write_parquet
from approxkmv.results.tables import ModelTables, facts_of_attention, read_heads, read_overview
from approxkmv.statistics.entries import CAUSAL, EVERY_KEY
from approxkmv.statistics.readings import POWERS, READINGS
from approxkmv.steps import readings_table
from approxkmv.steps.attention_table import write_attention_table
from approxkmv.steps.compare import claims, claims_as_read, compare, growth_exponent
from approxkmv.steps.growth import growth_of, measure_growth
from approxkmv.steps.length_scaling import length_scaling
from approxkmv.steps.length_scaling import summarise as summarise_lengths
from approxkmv.steps.lengths import too_short
from approxkmv.steps.show import lines
from approxkmv.steps.summary import per_head, scaling_with_length, summarise
from approxkmv.words import counted, significant

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
    assert row["median_double_ratio"] == pytest.approx(np.exp(709.0))


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


def test_of_a_causal_model_the_scaling_is_there_again_over_the_masked_ratios():
    values = pd.DataFrame(
        {
            "prefix": [50] * 4,
            "context": [0, 0, 1, 1],
            "layer": 0,
            "head": [0, 1, 0, 1],
            "ratio": [1.0, 3.0, 5.0, 2.0],
            # The largest head is another one than above.
            "masked_ratio": [0.5, 0.25, 0.125, 1.5],
        }
    )
    row = scaling_with_length(values).iloc[0]
    assert (row["contexts"], row["mean"], row["std"]) == (2, 4.0, 1.0)
    assert (row["masked_mean"], row["masked_std"], row["masked_min"], row["masked_max"]) == (1.0, 0.5, 0.5, 1.5)
    assert row["masked_median_of_heads"] == (0.375 + 0.8125) / 2
    assert not [name for name in scaling_with_length(values.drop(columns="masked_ratio")) if "masked" in name]


def random_texts(names: tuple[str, ...], along: dict[str, list[int]], texts: int = 5) -> pd.DataFrame:
    """Rows of 2 layers x 3 heads on some texts, all values different, with and without the mask, in no order."""
    axes = {"context": range(texts), "layer": range(2), "head": range(3)} | along
    table = pd.MultiIndex.from_product(axes.values(), names=list(axes)).to_frame(index=False)
    generator = np.random.default_rng(5)
    columns = {f"{before}{name}": generator.gamma(0.5, 3.0, len(table)) for before in ("", "masked_") for name in names}
    return table.assign(**columns).sample(frac=1, random_state=2)


def test_each_column_of_the_heads_is_over_the_texts_of_one_head_under_one_mask():
    exponents = ("last_ratio", "softmax_ratio", "tail_exponent", "column_exponent")
    values = random_texts(("max_ratio", "log_next", "log_double", *exponents), {})
    for before in ("", "masked_"):
        values[f"{before}max_prefix"] = np.random.default_rng(len(before)).permutation(len(values))
    table = per_head(values)
    assert table["contexts"].tolist() == [5] * 6
    for row in table.to_dict("records"):
        texts = values[(values["layer"] == row["layer"]) & (values["head"] == row["head"])].reset_index(drop=True)
        for before in ("", "masked_"):
            of = {name.removeprefix(before): texts[name].to_numpy() for name in texts if name.startswith(before)}
            worst = int(np.argmax(of["max_ratio"]))
            expected = {
                "max_ratio": of["max_ratio"][worst],
                "max_ratio_context": texts["context"][worst],
                "max_ratio_prefix": of["max_prefix"][worst],
                "median_ratio": np.median(of["max_ratio"]),
                "p95_ratio": np.quantile(of["max_ratio"], 0.95),
                "median_log_next": np.median(of["log_next"]),
                "median_log_double": np.median(of["log_double"]),
                "median_next_ratio": np.exp(np.median(of["log_next"])),
                "median_double_ratio": np.exp(np.median(of["log_double"])),
                **{f"median_{name}": np.median(of[name]) for name in exponents},
                "max_softmax_ratio": of["softmax_ratio"].max(),
            }
            assert {name: row[f"{before}{name}"] for name in expected} == pytest.approx(expected)
    assert len(table.columns) == 3 + 2 * len(expected)


def test_each_column_of_the_scaling_is_over_texts_of_the_largest_or_the_median_head():
    values = random_texts(("ratio",), {"prefix": [50, 100]})
    values = values[(values["prefix"] == 50) | (values["context"] < 3)]
    table = scaling_with_length(values).set_index("prefix")
    assert table["contexts"].tolist() == [5, 3]
    for prefix, row in table.iterrows():
        for before in ("", "masked_"):
            part = values[values["prefix"] == prefix].pivot_table(f"{before}ratio", "context", ["layer", "head"])
            largest, middle = part.to_numpy().max(1), np.median(part.to_numpy(), 1)
            expected = {"mean": largest.mean(), "std": largest.std(), "min": largest.min(), "max": largest.max()}
            expected |= {"median_of_heads": middle.mean()}
            assert {name: row[f"{before}{name}"] for name in expected} == pytest.approx(expected)


def test_each_column_of_long_texts_is_over_the_texts_of_one_head_at_one_length():
    from approxkmv.results.tables import KEYS

    names = ("ratio", "log_next", "log_double", "softmax_ratio", "tail_exponent", *KEYS)
    values = random_texts(names, {"length": [64, 128]})
    values.loc[values["length"] == 128, "masked_log_double"] += 800.0
    table = length_scaling(values[(values["length"] == 64) | (values["context"] < 4)])
    assert table.groupby("length")["texts"].unique().to_dict() == {64: [5], 128: [4]}
    for row in table.to_dict("records"):
        texts = values[
            (values[["layer", "head", "length"]] == [row[n] for n in ("layer", "head", "length")]).all(axis=1)
        ]
        texts = texts[texts["context"] < row["texts"]]
        for before in ("", "masked_"):
            median = {name: np.median(texts[f"{before}{name}"]) for name in names}
            expected = {name: median[name] for name in names if name != "log_next"}
            expected["largest_ratio"] = texts[f"{before}ratio"].max()
            with np.errstate(over="ignore"):
                for name in ("next", "double"):
                    expected[f"{name}_ratio"] = min(np.exp(median[f"log_{name}"]), np.finfo(float).max)
            assert {name: row[f"{before}{name}"] for name in expected} == pytest.approx(expected)


def test_long_texts_that_end_before_the_longest_length_are_named_and_no_others(tmp_path):
    from approxkmv.results.tables import KEYS

    names = ("ratio", "log_next", "log_double", "softmax_ratio", "tail_exponent", *KEYS)
    study = shards(tmp_path, causal=True).model_copy(update={"lengths": (66, 128, 256)})
    values = random_texts(names, {"length": [66, 128]}, texts=3)
    write_parquet(tmp_path / "0000.lengths.parquet", values[(values["context"] > 0) | (values["length"] == 66)])
    taken = pd.read_csv(tmp_path / "0000.contexts.csv", keep_default_na=False).iloc[:5]
    taken.assign(tokens=[100, 300, 256, 50, 30], cut=[0, 44, 0, 0, 0], used=[True] * 4 + [False]).to_csv(
        tmp_path / "0000.contexts.csv", index=False
    )
    write_texts(tmp_path, 5)
    model = next(iter(study.models.values()))
    facts = summarise_lengths(study, model, tmp_path / "texts.parquet", tmp_path, tmp_path, {})
    assert facts["texts_used"] == 3
    assert facts["lengths"] == [66, 128]
    assert facts["lengths_left_out"] == {"256": "no text reaches it"}
    assert facts["texts_missing"] == [
        "text 0: no 128, 256, it has 100 tokens",
        "text 3: no 66, 128, 256, it has 50 tokens",
    ]
    assert (facts["layers"], facts["heads"]) == (2, 3)


def test_curves_keep_a_small_c_and_a_c_of_nothing_is_a_millionth():
    values = pd.DataFrame({"context": [0, 0, 1, 1], "prefix": [50, 100] * 2, "layer": 0, "head": 0})
    _, curves = growth_of(values.assign(ratio=[4e-5, 0.0, 1e-5, 0.0]), 4.6)
    assert curves["ratio"].tolist() == pytest.approx([2e-5, 1e-6])


def test_numbers_of_things():
    assert [counted(number, "text") for number in (0, 1, 2)] == ["0 texts", "1 text", "2 texts"]
    assert [significant(value) for value in (0.0, 0.00571, 57.76, 999.4, 999.6, 12345.6)] == [
        *("0", "0.00571", "57.8", "999", "1,000", "12,346"),
    ]


def test_a_length_that_a_text_has_is_not_missing():
    assert too_short(3, 128, False, (64, 128, 256, 1024)) == "text 3: no 256, 1,024, it has 128 tokens"
    why = "the model's positions or max_tokens end at 2,048"
    assert too_short(0, 2048, True, (2048, 4096)) == f"text 0: no 4,096, {why}"


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
    overview = {"model": "m", "paper_bound": 4.6, "texts_used": 3, "mask": CAUSAL}
    heads = pd.DataFrame(
        {"max_ratio": [1.0, 4.6], "median_next_ratio": [1.0, 1.01], "median_double_ratio": [2.0, 19.0]}
    )
    assert [row["holds"] for row in claims(overview, heads, scaling(0.0))] == ["yes"] * 5
    worse = pd.DataFrame(
        {"max_ratio": [1.0, 4.7], "median_next_ratio": [1.0, 1.2], "median_double_ratio": [21.0, 30.0]}
    )
    assert [row["holds"] for row in claims(overview, worse, scaling(0.4))] == ["no"] * 5
    # All of them are no fewer.
    one = pd.DataFrame({"max_ratio": [1.0] * 499 + [4.7], "median_next_ratio": 1.0, "median_double_ratio": 2.0})
    assert [row["holds"] for row in claims(overview, one, scaling(0.0))] == ["no", "no", "yes", "yes", "yes"]


def test_masked_claims_are_judged_over_the_masked_columns_and_say_nothing_of_the_paper():
    overview = {"model": "m", "paper_bound": 4.6, "texts_used": 3, "mask": CAUSAL}
    names = ("max_ratio", "median_next_ratio", "median_double_ratio")
    bad, good = ([4.7, 1.2, 30.0], [4.5, 1.0, 2.0])
    heads = pd.DataFrame([bad + good], columns=[*names, *(f"masked_{name}" for name in names)])
    table = scaling(0.4).assign(masked_mean=2.0)
    every, masked = claims(overview, heads, table), claims(overview, heads, table, "masked_")
    assert [row["holds"] for row in every] == ["no"] * 5
    assert [row["holds"] for row in masked] == ["yes"] * 5
    assert {row["entries"] for row in every} == {"all"}
    assert {row["entries"] for row in masked} == {"causal"}
    assert every[0]["paper"] == 4.6
    assert {row["paper"] for row in masked} == {None}
    assert masked[0]["ours"] == 4.5


def test_claims_at_the_edges_of_their_criteria():
    overview = {"model": "m", "paper_bound": 5.0, "texts_used": 3, "layers": 7, "mask": "windows of 8 keys"}

    def holds(next_ratios, double_ratios, slope, **more):
        ratios = {"median_next_ratio": next_ratios, "median_double_ratio": double_ratios}
        heads = pd.DataFrame({"max_ratio": [5.0] * 20} | ratios)
        found = claims(overview, heads, scaling(slope).assign(**more))
        assert found[0]["criterion"] == "largest c over 20 heads and 3 texts <= 5"
        assert [row["ours"] for row in found[:2]] == [5.0, 1.0]
        return [row["holds"] for row in found[2:]]

    # 19 of 20 are almost all and 18 are not; half are not most; an exponent of 0.05 is no growth.
    assert holds([1.05] * 19 + [1.051], [20.0] * 11 + [21.0] * 9, 0.05) == ["yes", "yes", "yes"]
    assert holds([1.05] * 18 + [1.051] * 2, [20.0] * 10 + [21.0] * 10, 0.15) == ["no", "no", "no"]
    assert holds([1.0] * 20, [1.0] * 20, 0.0, mean=[1.0, 0.0, 0.0, 0.0]) == ["yes", "yes", "undecided"]
    masked = pd.DataFrame(
        [{f"masked_{name}": 1.0 for name in ("max_ratio", "median_next_ratio", "median_double_ratio")}]
    )
    assert {row["entries"] for row in claims(overview, masked, scaling(0.0).assign(masked_mean=1.0), "masked_")} == {
        "masked"
    }


def test_the_exponent_is_of_the_lengths_that_its_words_name():
    table = scaling(0.5).assign(contexts=[9, 9, 5, 4], masked_mean=2.0)
    table.loc[0, "mean"] = 0.0
    assert growth_exponent(table) == (pytest.approx(0.5), "100 to 200")
    assert growth_exponent(table, "masked_") == (pytest.approx(0.0), "50 to 200")
    # Of fewer texts the page says that they are too few to tell, and so does the claim.
    for few in (scaling(0.5).assign(contexts=[4, 4, 2, 1]), scaling(0.5).iloc[:1]):
        slope, words = growth_exponent(few)
        assert (np.isnan(slope), words) == (True, "(too few texts or lengths)")


def test_readings_are_judged_each_by_its_own_number():
    table = pd.DataFrame(
        {"reading": ["printed", "float32"], "largest_ratio": [5.0, np.nan], "median_double": [3.0, np.inf]}
    )
    found = claims_as_read({"model": "m", "paper_bound": 5.0}, table)
    assert [(row["claim"].rpartition(" ")[2], row["paper"], row["holds"]) for row in found] == [
        ("printed", 5.0, "yes"),
        ("printed", 20.0, "yes"),
        ("float32", 5.0, "undecided"),
        ("float32", 20.0, "no"),
    ]
    assert [row["ours"] for row in found][:2] == [5.0, 3.0]


LAYERS, HEADS_PER_LAYER, TEXTS, PREFIXES = 3, 2, 6, (50, 100)


def write_texts(folder: Path, count: int) -> None:
    write_parquet(folder / "texts.parquet", pd.DataFrame({"index": range(count), "name": "t", "text": "t"}))


def shards(folder: Path, *, causal: bool, prefixes: tuple[int, ...] = PREFIXES) -> Study:
    """One shard as the statistics step writes it, masked values a quarter of the others; returns its study."""
    study = study_of(load_config(Path(__file__).parents[2] / "config.yaml"), "embedded")
    study = study.model_copy(update={"prefixes": PREFIXES, "shard_contexts": TEXTS})
    generator = np.random.default_rng(3)
    context, layer, head = (i.ravel() for i in np.indices((TEXTS, LAYERS, HEADS_PER_LAYER)))
    heads = pd.DataFrame({"context": context, "layer": layer, "head": head, "tokens": 120})
    # Layer 0 is above any bound without a mask, and below it with one.
    ratio = np.where(layer == 0, 10.0, 1.0) + generator.uniform(0, 0.5, len(layer))
    for before, factor in (("", 1.0), ("masked_", 0.25))[: 2 if causal else 1]:
        heads[f"{before}max_ratio"] = factor * ratio
        heads[f"{before}max_prefix"] = 100
        heads[f"{before}log_next"], heads[f"{before}log_double"] = 0.01, 4.0 * factor
    curves = [
        heads[["context", "layer", "head"]].assign(
            prefix=prefix,
            **{f"{before}ratio": heads[f"{before}max_ratio"] for before in ("", "masked_")[: 2 if causal else 1]},
        )
        for prefix in prefixes
    ]
    read = [
        heads[["context", "layer", "head"]].assign(
            reading=name,
            entries=entries,
            ratio=ratio,
            log_next=np.inf,
            log_double=np.nan,
            underflows=True,
            undefined=context == 0,
        )
        for name in {*READINGS, *POWERS}
        for entries in ("all", "causal")[: 2 if causal else 1]
    ]
    write_parquet(folder / "0000.readings.parquet", pd.concat(read))
    empty = heads[["context", "layer", "head"]].assign(prefix=0, ratio=0.0).iloc[:0]
    write_parquet(folder / "0000.heads.parquet", heads)
    write_parquet(folder / "0000.prefixes.parquet", pd.concat(curves) if curves else empty)
    write_texts(folder, TEXTS)
    taken = pd.DataFrame({"context": range(TEXTS), "name": "t", "tokens": 120, "cut": 0, "used": True})
    taken["causal"], taken["mask"], taken["left_out"] = causal, CAUSAL if causal else EVERY_KEY, ""
    taken.to_csv(folder / "0000.contexts.csv", index=False)
    return study


def summarised(folder: Path, *, causal: bool) -> tuple[Study, str]:
    """All tables of a model in folder/tables."""
    study = shards(folder, causal=causal)
    name, model = next(iter(study.models.items()))
    model = model.model_copy(update={"paper_bound": 4.6})
    summarise(study, model, folder / "texts.parquet", folder, folder / "tables", {})
    measure_growth(study, name, folder / "texts.parquet", folder, folder / "tables")
    return study, name


@pytest.mark.parametrize("causal", [False, True])
def test_overview_and_comparison_have_the_masked_values_of_a_causal_model_beside_the_others(tmp_path, causal):
    study = shards(tmp_path, causal=causal)
    name, model = next(iter(study.models.items()))
    hashes = {"sha256": "a" * 64, "files": {"model.safetensors": "b" * 64}}
    model = model.model_copy(update={"paper_bound": 4.6, **hashes})
    facts = summarise(study, model, tmp_path / "texts.parquet", tmp_path, tmp_path / "tables", {})
    assert facts["causal"] == causal
    assert (facts["source"], facts["sha256"]) == (model.source, {"archive": "a" * 64, "model.safetensors": "b" * 64})
    assert facts["heads_within_bound"] == 4
    assert (facts["largest_ratio_layer"], 10.0 < facts["largest_ratio"] < 10.5) == (0, True)
    assert ("masked_heads_within_bound" in facts) == causal
    if causal:
        assert facts["masked_heads_within_bound"] == 6
        assert facts["masked_largest_ratio"] == facts["largest_ratio"] / 4
        assert facts["masked_median_ratio"] == facts["median_ratio"] / 4
        assert facts["masked_largest_ratio_head"] == facts["largest_ratio_head"]
    readings_table.summarise(study, model, tmp_path / "texts.parquet", tmp_path, tmp_path / "tables")
    table = compare(tmp_path / "tables", [name], tmp_path / "comparison.csv")
    assert table["entries"].tolist() == ["all"] * 5 + ["causal"] * 5 * causal + ["all"] * 2 * len(READINGS)
    first = table[table["claim"].str.contains("every head and text")].set_index("entries")["holds"]
    assert first.to_dict() == {"all": "no"} | ({"causal": "yes"} if causal else {})
    if causal:
        path = tmp_path / "tables" / f"context_scaling_{name}.csv"
        write_csv(path, pd.read_csv(path)[["prefix", "contexts", "mean"]])
        with pytest.raises(TableError, match="has no masked values"):
            compare(tmp_path / "tables", [name], tmp_path / "comparison.csv")


def test_the_overview_counts_the_texts_and_the_bound_is_within_itself(tmp_path):
    study = shards(tmp_path, causal=True).model_copy(update={"shard_contexts": 9})
    taken = pd.read_csv(tmp_path / "0000.contexts.csv", keep_default_na=False)
    taken.loc[:1, "cut"] = 5
    taken["tokens"] = [100, 110, 120, 130, 150, 190]
    more = taken.iloc[:3].assign(context=[6, 7, 8], tokens=20, cut=1, used=False)
    pd.concat([taken, more]).to_csv(tmp_path / "0000.contexts.csv", index=False)
    write_texts(tmp_path, 9)
    name, model = next(iter(study.models.items()))
    values = pd.read_parquet(tmp_path / "0000.heads.parquet")
    # The largest c of all is of another head.
    values.loc[(values["layer"] == 2) & (values["head"] == 1) & (values["context"] == 2), "max_ratio"] = 99.0
    values.to_parquet(tmp_path / "0000.heads.parquet")
    hash_file(tmp_path / "0000.heads.parquet").unlink()
    ratios = np.sort(values.groupby(["layer", "head"])["max_ratio"].max())
    model = model.model_copy(update={"paper_bound": float(ratios[2]), "sha256": None, "files": {}})
    facts = summarise(study, model, tmp_path / "texts.parquet", tmp_path, tmp_path / "tables", {})
    counts = {"texts": 9, "texts_used": 6, "texts_too_short": 3, "texts_cut": 2, "tokens_median": 125.0}
    counts |= {"sha256": {}, "tokens_max": 190, "layers": 3, "heads": 2, "heads_within_bound": 3, "largest_ratio": 99.0}
    counts |= {"largest_ratio_layer": 2, "largest_ratio_head": 1, "median_ratio": pytest.approx(np.median(ratios))}
    assert {key: facts[key] for key in counts} == counts
    # A head is large by the model's bound and no other.
    growth = measure_growth(
        study.model_copy(update={"models": {name: model.model_copy(update={"paper_bound": 1e9})}}),
        *(name, tmp_path / "texts.parquet", tmp_path, tmp_path / "tables"),
    )
    assert set(growth["size"]) == {"small"}


def test_rows_of_the_softmax_are_means_over_texts_under_each_mask(tmp_path):
    from approxkmv.results.tables import ATTENTION

    study = shards(tmp_path, causal=True)
    values = random_texts(tuple(ATTENTION), {}, texts=TEXTS).assign(tokens=120)
    write_parquet(tmp_path / "0000.attention.parquet", values)
    table = write_attention_table(study, "m", tmp_path / "texts.parquet", tmp_path, tmp_path)
    assert table["texts"].tolist() == [TEXTS] * 6
    for row in table.to_dict("records"):
        part = values[(values["layer"] == row["layer"]) & (values["head"] == row["head"])]
        names = [f"{before}{name}" for before in ("", "masked_") for name in ATTENTION]
        assert {name: row[name] for name in names} == pytest.approx({name: part[name].mean() for name in names})


def test_what_an_earlier_study_left_is_named_once_and_counted(tmp_path, monkeypatch):
    from approxkmv.steps import show

    summarised(tmp_path, causal=False)
    for count, words in ((3, "t0, t1, t2;"), (5, "t0, t1, t2 and 2 more;")):
        monkeypatch.setattr(show, "leftovers", lambda results, count=count: [results / f"t{i}" for i in range(count)])
        said = lines(tmp_path)
        assert not said[0].startswith(" ")
        assert said[0].endswith(": 6 texts of SQuAD v1.1 dev")
        assert said[1].startswith("  c is at most 4.6")
        (left,) = [line for line in said if line.startswith("of an earlier study: ")]
        assert left.startswith(f"of an earlier study: {words} ")


def test_the_last_words_of_a_run_give_both_masks(tmp_path):
    summarised(tmp_path, causal=True)
    said = "\n".join(lines(tmp_path))
    assert "c is at most 4.6, the paper's bound, for 4 of 6 heads" in said
    assert "no key after its query: c is at most 4.6, the paper's bound, for 6 of 6 heads" in said


def test_texts_that_reach_no_prefix_are_one_line_that_says_what_to_change(tmp_path):
    study = shards(tmp_path, causal=False, prefixes=()).model_copy(update={"prefixes": (20, *PREFIXES)})
    name, model = next(iter(study.models.items()))
    with pytest.raises(TableError, match="no text reaches the shortest of prefixes, 50 tokens: put a shorter") as error:
        summarise(study, model, tmp_path / "texts.parquet", tmp_path, tmp_path / "tables", {})
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    assert not (tmp_path / "tables").exists()
    # The growth step reads the same file.
    (tmp_path / "tables").mkdir()
    with pytest.raises(TableError, match="put a shorter one there"):
        measure_growth(study, name, tmp_path / "texts.parquet", tmp_path, tmp_path / "tables")


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_figures_draw_both_masks_of_a_causal_model(tmp_path, monkeypatch, causal):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _, name = summarised(tmp_path, causal=causal)
    drawn = {}
    for module in (max_ratios, order_ratios, style):
        monkeypatch.setattr(module, "save", lambda figure, stem: drawn.setdefault(stem, figure) and [])
    max_ratios.draw(tmp_path / "tables", name, "c")
    order_ratios.draw(tmp_path / "tables", name, "order")
    context_scaling.draw(tmp_path / "tables", [name], "scaling")
    cells = LAYERS * HEADS_PER_LAYER

    def panels(stem: str) -> dict[str, int]:
        """Title of each panel with a grid, and how many of its cells are outlined."""
        # Each outline is drawn twice: white, and black inside it.
        return {a._left_title.get_text(): len(a.patches) // 2 for a in drawn[stem].axes if len(a.texts) == cells}

    # Of the masked values no cell is above the bound of c, nor above the 20 of K_(n)/K_(2n): e^4 is, e^1 is not.
    assert list(panels("c").values()) == [HEADS_PER_LAYER, 0][: 1 + causal]
    # Of a causal model both panels are of K_(n)/K_(2n): over all entries, and over those that its attention uses.
    assert list(panels("order").values()) == ([cells, 0] if causal else [0, cells])
    assert sum("no key after its query" in title for title in panels("c") | panels("order")) == 2 * causal
    dashed = [line for line in drawn["scaling"].axes[0].lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert len(dashed) == causal
    if causal:
        solid = drawn["scaling"].axes[0].lines[0]
        np.testing.assert_allclose(dashed[0].get_ydata(), solid.get_ydata() / 4)
    for figure in drawn.values():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        outside = [a._left_title for a in figure.axes] + figure.texts + ([figure._suptitle] if figure._suptitle else [])
        texts = [text for text in dict.fromkeys(outside) if text.get_text()]
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
        for i, one in enumerate(boxes):
            assert one.x0 >= 0
            assert one.x1 <= figure.bbox.width
            assert not any(one.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("unit", ["context", "sentence"])
def test_the_table_of_readings_has_a_row_per_reading_and_entries(tmp_path, unit):
    study = shards(tmp_path, causal=True).model_copy(update={"unit": unit})
    model = next(iter(study.models.values())).model_copy(update={"paper_bound": 4.6})
    table = readings_table.summarise(study, model, tmp_path / "texts.parquet", tmp_path, tmp_path)
    columns = "reading,entries,heads,texts,largest_ratio,heads_within_bound,median_ratio,median_next,median_double,"
    assert ",".join(table.columns) == f"{columns}share_underflowing,share_infinite,share_undefined"
    first = ["printed" if unit == "context" else "sentences", *READINGS[1:]]
    assert table["reading"].tolist() == [name for name in first for _ in range(2)]
    assert table["entries"].tolist() == ["all", "causal"] * len(READINGS)
    row = table.iloc[0]
    # Layer 0 of three is above the bound; an infinite ratio stays infinite, and one that is 0/0 is left out.
    assert (row["heads"], row["texts"], row["heads_within_bound"], row["share_underflowing"]) == (6, TEXTS, 4, 1.0)
    assert (row["share_infinite"], row["share_undefined"]) == (1 - 1 / TEXTS, 1 / TEXTS)
    assert row["median_next"] == np.inf
    assert np.isnan(row["median_double"])
    path = pd.read_csv(tmp_path / f"readings_path_{model.name}.csv")
    path = path[path["entries"] == "all"]
    assert path["power"].tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    # Of each head the largest c of any text, and over heads the median of these.
    values = pd.read_parquet(tmp_path / "0000.readings.parquet").query("reading == 'printed' and entries == 'causal'")
    largest = values.groupby(["layer", "head"])["ratio"].max()
    row = table.iloc[1]
    assert (row["largest_ratio"], row["median_ratio"]) == (largest.max(), largest.median())
    within = model.model_copy(update={"paper_bound": float(largest.max())})
    again = readings_table.summarise(study, within, tmp_path / "texts.parquet", tmp_path, tmp_path / "again")
    assert again["heads_within_bound"].iloc[1] == 6
    # The table per head is what the first is made from.
    heads = pd.read_csv(tmp_path / f"readings_heads_{model.name}.csv")
    for row in table.to_dict("records"):
        part = heads[(heads["reading"] == row["reading"]) & (heads["entries"] == row["entries"])]
        assert len(part) == row["heads"]
        assert part["ratio"].max() == pytest.approx(row["largest_ratio"])
        np.testing.assert_allclose(part["double_ratio"].median(), row["median_double"])


FACTS = {"model": "m", "label": "a model", "corpus": "c", "mask": "own", "left_out": ["a cap"], "paper_bound": 4.6}
FACTS |= dict.fromkeys(("texts_used", "texts_too_short", "texts_cut"), 2) | {"layers": 3, "heads": 2}
FACTS |= {"largest_ratio": 5.5, "largest_ratio_layer": 0, "largest_ratio_head": 1, "median_ratio": 1}
FACTS |= {"heads_within_bound": 4, "lengths": [10, 20], "texts_missing": ["text 3"]}
OF_MASK = ("largest_ratio", "median_ratio", "largest_ratio_layer", "largest_ratio_head", "heads_within_bound")
MASKED_FACTS = {f"masked_{name}": FACTS[name] for name in OF_MASK}


def test_the_facts_of_a_model_are_each_of_their_type(tmp_path):
    path = tmp_path / "overview_m.json"

    def read(facts: dict[str, object]) -> dict[str, object]:
        write_json(path, facts)
        return read_overview(path, *FACTS)

    assert read(FACTS | MASKED_FACTS) == FACTS | MASKED_FACTS
    for name, value in (FACTS | MASKED_FACTS).items():
        wrong = {str: [3], list: ["x", [None], [3, "x"], [True]], int: [0.5, -1, "x", True], float: ["x", -1.0, True]}
        # A number without a fraction may stand for any.
        kind = float if name.endswith(("paper_bound", "_ratio")) else type(value)
        for other in wrong[kind]:
            with pytest.raises(TableError, match=name):
                read(FACTS | MASKED_FACTS | {name: other})
        if name not in ("mask", "left_out"):
            with pytest.raises(TableError, match=f"lacks {name}"):
                read({key: one for key, one in (FACTS | MASKED_FACTS).items() if key != name})
    with pytest.raises(TableError, match="names no lengths"):
        read(FACTS | {"lengths": []})
    # Of those that are not asked for nothing is known, masked or not.
    write_json(path, {"model": "m", "masked_median_ratio": "x", "lengths": "x"})
    assert read_overview(path, "model")["model"] == "m"
    for name, value in (("mask", 3), ("left_out", "x")):
        write_json(path, {"model": "m", name: value})
        with pytest.raises(TableError, match=name):
            read_overview(path, "model")
    # Versions before wrote neither.
    for causal, words in ((True, CAUSAL), (False, EVERY_KEY), (None, EVERY_KEY)):
        write_json(path, {"model": "m", "causal": causal})
        facts = read_overview(path, "model")
        assert (facts["mask"], facts["left_out"]) == (words, [])


def test_a_table_has_one_row_for_each_head_and_no_other(tmp_path):
    path = tmp_path / "heads_m.csv"
    layer, head, prefix = (index.ravel() for index in np.indices((3, 2, 2)))
    whole = pd.DataFrame({"layer": layer, "head": head, "prefix": 10 + prefix, "ratio": 1.5, "masked_ratio": 0.5})
    facts = {"layers": 3, "heads": 2}

    def read(table: pd.DataFrame, along: str | None) -> pd.DataFrame:
        write_csv(path, table)
        return read_heads(path, facts, {"ratio": "at least 0"}, along)

    for along, table in (("prefix", whole), (None, whole[prefix == 0])):
        assert len(read(table, along)) == len(table)
        beyond = {"layer": table["layer"].replace(2, 3)}, {"head": table["head"].replace(1, 2)}
        again = pd.concat([table.iloc[:-1], table.iloc[:1]])
        for wrong in (table.iloc[1:], pd.concat([table, table.iloc[:1]]), again, *(table.assign(**x) for x in beyond)):
            with pytest.raises(TableError, match="does not have one row for each of 3 layers and 2 heads"):
                read(wrong, along)
        for name in ("layer", "head", "ratio", "masked_ratio", *([along] if along else [])):
            with pytest.raises(TableError, match=f"column {name} must hold"):
                read(table.assign(**{name: -1}), along)
    with pytest.raises(TableError, match="has no rows"):
        read(whole.iloc[:0], None)


def test_what_is_said_of_a_models_attention_is_what_its_shards_say():
    contexts = pd.DataFrame({"causal": [True, True], "mask": "windows", "left_out": "the cap of 5; the learned sink"})
    expected = {"causal": True, "mask": "windows", "left_out": ["the cap of 5", "the learned sink"]}
    assert facts_of_attention(contexts) == expected
    # An empty cell of a CSV is read as NaN.
    for nothing in (np.nan, None):
        plain = contexts.assign(causal=False, left_out=nothing)
        assert facts_of_attention(plain) == {"causal": False, "mask": "windows", "left_out": []}


def test_the_overview_comes_before_what_is_known_of_long_texts(tmp_path):
    names = ModelTables(tmp_path, "m")
    assert names.facts == names.lengths
    for path in (names.lengths, names.overview):
        path.touch()
        assert names.facts == path
