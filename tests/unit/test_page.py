"""The page of a study: drawn from tables alone, whatever of them is there, with labels as text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from approxkmv.errors import TableError
from approxkmv.figures import catalogue
from approxkmv.page.contents import CAPTIONS, FIGURES
from approxkmv.page.heads import STATISTICS, of_model, rounded
from approxkmv.page.render import _records, figures_of, write_page
from approxkmv.page.verdict import holds, measured, sentences, sweep_sentence
from approxkmv.statistics.entries import OWN_MASK
from approxkmv.steps.page import make_page

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
STUDIES = sorted(path.parent.name for path in REFERENCE.glob("*/tables"))


class Tags(HTMLParser):
    """Every tag of a page, and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.texts.append(data)


def drawn(tables: Path, out: Path, figures: Path = Path("nowhere")) -> str:
    write_page(tables, figures, out, "a study")
    return out.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_the_page_of_a_reference_study_is_one_small_file_that_fetches_nothing(tmp_path, study):
    page = drawn(REFERENCE / study / "tables", tmp_path / "index.html", REFERENCE / study / "figures")
    assert len(page.encode()) < 5_000_000
    found = Tags(page)
    for tag, attributes in found.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    assert "url(" not in page.split("</style>")[0]
    assert "default-src 'none'" in page
    pictures = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(pictures) == len(list((REFERENCE / study / "figures").glob("*.png")))
    assert all(attributes["alt"] for attributes in pictures)
    assert page == drawn(REFERENCE / study / "tables", tmp_path / "index.html", REFERENCE / study / "figures")


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """The tables of the embedded study, a copy that a test may change."""
    return Path(shutil.copytree(REFERENCE / "embedded" / "tables", tmp_path / "tables"))


def relabel(tables: Path, model: str, label: str) -> None:
    path = tables / f"overview_{model}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label": label, "corpus": label}))


def test_labels_are_text_wherever_they_stand(tables, tmp_path):
    label = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"q\" 'a' {{ 7 * 7 }}"
    relabel(tables, "minilm-l6", label)
    found = Tags(drawn(tables, tmp_path / "index.html"))
    assert [attributes for tag, attributes in found.tags if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    assert not [tag for tag, _ in found.tags if tag == "img"]
    # In the verdict, and in the column of models in the table of claims.
    assert sum(label in text for text in found.texts) > 5


def test_what_is_missing_is_named_and_the_rest_is_drawn(tables, tmp_path):
    missing = ("paper_comparison.csv", "heads_minilm-l6.csv", "attention_minilm-l6.csv")
    page = drawn(tables, tmp_path / "index.html")
    assert not [name for name in missing if name in page]
    for name in missing:
        (tables / name).unlink()
    page = drawn(tables, tmp_path / "index.html")
    for name in missing:
        assert name in page
    assert 'id="explorer"' in page
    assert [name for name, _, _ in figures_of(tables, ["minilm-l6"])][:2] == ["context_scaling", "growth"]


def test_a_folder_without_tables_and_a_broken_table_are_one_line(tables, tmp_path):
    with pytest.raises(TableError, match="has no tables"):
        drawn(tmp_path / "nothing", tmp_path / "index.html")
    text = (tables / "heads_minilm-l6.csv").read_text()
    (tables / "heads_minilm-l6.csv").write_text(text[: len(text) // 2].rpartition("\n")[0] + "\n")
    with pytest.raises(TableError, match=r"heads_minilm-l6\.csv does not have one row for each of 6 layers"):
        drawn(tables, tmp_path / "index.html")
    assert not (tmp_path / "index.html").exists()


def test_models_and_figures_that_are_not_there_are_named(tables, tmp_path):
    with pytest.raises(TableError, match="no tables of the model 'minilm'; there is: minilm-l6, smollm2-135m"):
        make_page(tables, tmp_path / "out", "a study", models=["minilm-l6", "minilm"])
    with pytest.raises(TableError, match=r"there is no folder .*nowhere: leave out --figures"):
        make_page(tables, tmp_path / "out", "a study", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_the_explorer_has_the_numbers_of_the_tables(tables):
    facts = {facts["model"]: facts for facts in measured(tables)}["smollm2-135m"]
    model, missing = of_model(tables, facts)
    assert missing == []
    assert model["sets"] == ["all", "own"]
    heads, growth = (pd.read_csv(tables / f"{kind}_smollm2-135m.csv") for kind in ("heads", "growth"))
    place = 9 * 17 + 4
    for before, kind in (("", "all"), ("masked_", "own")):
        assert model["values"]["c"][kind]["v"][place] == pytest.approx(heads[f"{before}max_ratio"][place], rel=1e-3)
        own = model["values"]["exponent"][kind]
        for end, column in (("v", "exponent"), ("low", "exponent_low"), ("high", "exponent_high")):
            assert own[end][place] == pytest.approx(growth[f"{before}{column}"][place], rel=1e-3)
        assert model["trend"][kind] == growth[f"{before}trend"].tolist()
    curves = pd.read_csv(tables / "growth_curves_smollm2-135m.csv").query("layer == 17 and head == 4")
    assert model["curves"]["own"]["c"][place] == pytest.approx(curves["masked_adjusted_ratio"].tolist(), rel=1e-3)


def test_long_texts_have_their_statistics_at_the_longest_length():
    tables = REFERENCE / "lengths" / "tables"
    (facts,) = measured(tables)
    model, missing = of_model(tables, facts)
    assert missing == []
    scaling = pd.read_csv(tables / "length_scaling_smollm2-135m.csv").query(
        "length == 8192 and layer == 2 and head == 5"
    )
    assert model["values"]["keys_90"]["own"]["v"][2 * 9 + 5] == pytest.approx(
        float(scaling["masked_keys_90_mean"].iloc[0]), rel=1e-3
    )


def test_numbers_that_json_does_not_have():
    assert rounded([float("nan"), float("inf"), -float("inf"), 1.23456, 0.0]) == [None, "inf", "-inf", 1.235, 0.0]


@pytest.mark.parametrize(
    ("within", "word", "said"), [(72, "yes", "on all 72 heads."), (34, "no", "on 34 of 72 heads and fails on 38.")]
)
def test_the_verdict_says_on_how_many_heads_the_assumption_holds(tables, within, word, said):
    path = tables / "overview_minilm-l6.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"heads_within_bound": within}))
    facts = {facts["model"]: facts for facts in measured(tables)}["minilm-l6"]
    found, answer = holds(tables, facts)
    assert (found, answer.endswith(said)) == (word, True)
    assert any(f"for {within} of 72 heads" in line for line in sentences(tables, facts))


@pytest.mark.parametrize(
    ("sizes", "word", "said"),
    [
        (["small"] * 270, "yes", "on all 270 heads."),
        (["undecided"] + ["small"] * 269, "undecided", "on 269 of 270 heads and is undecided on 1."),
        (["undecided"] * 270, "undecided", "on 0 of 270 heads and is undecided on 270."),
        (["large"] * 270, "no", "on 0 of 270 heads and fails on 270."),
        (
            ["large"] + ["undecided"] * 4 + ["small"] * 265,
            "no",
            "on 265 of 270 heads, fails on 1 and is undecided on 4.",
        ),
    ],
)
def test_the_verdict_on_long_texts_is_that_of_the_table_of_growth(tmp_path, sizes, word, said):
    tables = Path(shutil.copytree(REFERENCE / "lengths" / "tables", tmp_path / "tables"))
    path = tables / "growth_smollm2-135m.csv"
    pd.read_csv(path).assign(size=sizes).to_csv(path, index=False)
    (facts,) = measured(tables)
    found, answer = holds(tables, facts)
    assert (found, answer.partition(", holds ")[2]) == (word, f"at n = 8,192 {said}")
    path.unlink()
    assert holds(tables, facts)[0] == "undecided"


def test_every_figure_has_a_place_on_the_page_and_every_caption_is_clean():
    from docutils.core import publish_parts

    assert set(FIGURES) == {*catalogue.PER_MODEL, *catalogue.PER_STUDY, *catalogue.PER_TABLE}
    for caption in sorted(CAPTIONS.glob("*.rst")):
        text = caption.read_text(encoding="utf-8")
        # 2: a warning is an exception; bars and underscores outside literals would be substitutions and links.
        body = publish_parts(text, writer="html", settings_overrides={"halt_level": 2})["body"]
        assert "reference" not in body.replace("docutils", "")
        assert "``" not in body
    assert {figure.caption for figure in FIGURES.values()} <= {caption.stem for caption in CAPTIONS.glob("*.rst")}


def test_every_statistic_of_the_explorer_is_a_column_of_some_table():
    heads = pd.read_csv(REFERENCE / "embedded" / "tables" / "heads_minilm-l6.csv")
    lengths = pd.read_csv(REFERENCE / "lengths" / "tables" / "length_scaling_smollm2-135m.csv")
    growth = pd.read_csv(REFERENCE / "embedded" / "tables" / "growth_minilm-l6.csv")
    columns = {"heads": heads, "lengths": lengths, "growth": growth}
    for one in STATISTICS:
        for kind, column in one.tables:
            assert kind == "attention" or column in columns[kind]


def test_the_verdict_of_a_sweep_is_who_won_it(tmp_path):
    tables = tmp_path / "tables"
    shutil.copytree(REFERENCE / "figure5" / "tables", tables)
    texts = Tags(drawn(tables, tmp_path / "index.html")).texts
    (sentence,) = [text for text in texts if text.startswith("At an error")]
    assert "exact" in sentence
    assert sweep_sentence(tables)[1:] in sentence
    assert sweep_sentence(tables, [tables / "sweep.csv"]) == ""
    assert not [text for text in texts if "No heads were measured" in text]


def test_parameters_of_methods_are_for_reading(tmp_path):
    page = drawn(REFERENCE / "perplexity" / "tables", tmp_path / "index.html")
    texts = Tags(page).texts
    assert "backend fastest" in texts
    assert not [text for text in texts if text.startswith("{")]
    assert any("No heads were measured" in text for text in texts)


OF_C = ("heads_within_bound", "median_ratio", "largest_ratio", "largest_ratio_layer", "largest_ratio_head")
# Of each statistic of the explorer the table and the column that its words name.
TAKEN_FROM = {
    "c": "heads max_ratio",
    "c_n": "growth ratio",
    "exponent": "growth exponent",
    "next": "heads median_next_ratio",
    "double": "heads median_double_ratio",
    "softmax": "heads median_softmax_ratio",
    "entropy": "attention entropy",
    "keys_90": "attention keys_90",
    "first": "attention first_mass",
    "rank": "attention stable_rank",
}


@pytest.fixture
def one(tmp_path: Path) -> tuple[Path, dict[str, pd.DataFrame]]:
    """Tables of a model of 2 x 3 heads, all numbers different, rows in no order; and the same in the heads' order."""
    folder = tmp_path / "one"
    folder.mkdir()
    facts = {"model": "m", "label": "a model", "corpus": "a corpus", "layers": 2, "heads": 3, "paper_bound": 5.15}
    facts |= {"mask": OWN_MASK, "left_out": ["the logits' cap of 50 in 2 of 2 layers"]}
    facts |= {"texts_used": 9, "texts_too_short": 4, "texts_cut": 2}
    for before, numbers in (("", (2, 7.25, 1234.5, 1, 2)), ("masked_", (5, 0.125, 6.5, 0, 1))):
        facts |= {f"{before}{name}": number for name, number in zip(OF_C, numbers, strict=True)}
    (folder / "overview_m.json").write_text(json.dumps(facts))
    generator = np.random.default_rng(0)
    whole = {name.split()[1]: name.split()[0] for name in TAKEN_FROM.values()}
    columns = {kind: [name for name, of in whole.items() if of == kind] for kind in ("heads", "attention")}
    columns["growth"] = [f"{name}{end}" for name in ("ratio", "exponent") for end in ("", "_low", "_high")]
    columns |= {"growth_curves": ["adjusted_ratio"], "readings_heads": ["ratio", "next_ratio", "double_ratio"]}
    along = {"growth_curves": {"prefix": [100, 200, 400]}, "readings_heads": {"reading": ["printed", "sigma"]}}
    tables = {}
    for kind, names in columns.items():
        axes = {"layer": range(2), "head": range(3)} | along.get(kind, {})
        axes |= {"entries": ["all", "masked"]} if kind == "readings_heads" else {}
        table = pd.MultiIndex.from_product(axes.values(), names=list(axes)).to_frame(index=False)
        for before in ("",) if kind == "readings_heads" else ("", "masked_"):
            table = table.assign(**{f"{before}{name}": generator.uniform(0.01, 0.99, len(table)) for name in names})
        tables[kind] = table
    words = {"size": ["small", "large", "large", "undecided", "small", "large"], "trend": ["grows"] * 5 + ["flat"]}
    words |= {"masked_size": ["small"] * 6, "masked_trend": ["flat", "undecided"] + ["grows"] * 4}
    words |= {f"{before}{name}": n for before in ("", "masked_") for name, n in (("length", 400), ("start", 200))}
    exponents = {"exponent": [0.05, 0.2, 0.3, 0.6, 0.1, -0.4], "masked_exponent": [0.7, 0.6, 0.9, 0.2, 0.0, -1.0]}
    tables["growth"] = tables["growth"].assign(**words, **exponents)
    texts = {100: 9, 200: 8, 400: 6}
    curves = tables["growth_curves"].assign(texts=lambda t: t["prefix"].map(texts))
    tables["growth_curves"] = curves.assign(masked_texts=curves["texts"] - 3)
    tables["readings_heads"].loc[2, ["ratio", "next_ratio", "double_ratio"]] = [np.nan, np.inf, 3.0]
    for kind, table in tables.items():
        table.sample(frac=1, random_state=1).to_csv(folder / f"{kind}_m.csv", index=False)
    return folder, tables


def test_the_sentences_are_what_the_tables_say(one):
    folder, _ = one
    (facts,) = measured(folder)
    assert sentences(folder, facts) == [
        "a model: 9 texts of a corpus (4 too short, 2 cut)",
        "not in K: the logits' cap of 50 in 2 of 2 layers",
        "c is at most 5.15, the paper's bound, for 2 of 6 heads; median 7.25, largest 1,234 "
        "(layer 1, head 2, counting from 0)",
        f"{OWN_MASK}: c is at most 5.15, the paper's bound, for 5 of 6 heads; median 0.125, largest 6.5 "
        "(layer 0, head 1, counting from 0)",
        "at n = 400 tokens c is small on 2 heads, large on 3, undecided on 1, against 5.15; from n = 200 its trend is: "
        "flat on 1 head, grows on 5; its exponent is above 0.1 on 3 heads, above 0.5 on 1",
        f"{OWN_MASK}: at n = 400 tokens c is small on 6 heads, against 5.15; from n = 200 its trend is: "
        "flat on 1 head, grows on 4, undecided on 1; its exponent is above 0.1 on 4 heads, above 0.5 on 3",
    ]
    answer = "The sparsity assumption, with c at most 5.15 as the paper reports, holds on 2 of 6 heads and fails on 4."
    assert holds(folder, facts) == ("no", answer)
    single = facts | {"layers": 1, "heads": 1, "heads_within_bound": 1}
    assert holds(folder, single) == ("yes", answer.replace("2 of 6 heads and fails on 4", "1 head"))
    # With too few texts or lengths nothing is known of growth.
    unknown = pd.read_csv(folder / "growth_m.csv").assign(start=0, exponent=np.nan, size="undecided")
    unknown.drop(columns=[name for name in unknown if "masked" in name]).to_csv(folder / "growth_m.csv", index=False)
    first, *_, last = sentences(folder, facts | {"texts_too_short": 0, "texts_cut": 0})
    assert first == "a model: 9 texts of a corpus"
    assert last.startswith("too few texts or lengths (5 texts are needed) to tell how c grows: ")
    assert last.endswith(": at n = 400 c is undecided on 6 heads")


def test_a_page_heads_each_verdict_with_what_was_measured_and_has_no_explorer_of_nothing(one, tmp_path):
    folder, tables = one
    texts = Tags(drawn(folder, tmp_path / "index.html")).texts
    place = texts.index("a model: 9 texts of a corpus (4 too short, 2 cut)")
    (facts,) = measured(folder)
    assert holds(folder, facts)[1] in texts[place : place + 4]
    for kind in tables:
        (folder / f"{kind}_m.csv").unlink()
    page = drawn(folder, tmp_path / "index.html")
    assert 'id="explorer"' not in page
    for kind in (*tables, "paper_comparison"):
        assert f"{kind}_m.csv" in page or f"{kind}.csv" in page
    # The paper claims nothing about long texts.
    assert "paper_comparison.csv" not in drawn(REFERENCE / "lengths" / "tables", tmp_path / "index.html")


def test_a_verdict_of_another_word_is_one_line(one):
    folder, tables = one
    (facts,) = measured(folder)
    for column in ("size", "masked_trend"):
        tables["growth"].assign(**{column: "huge"}).to_csv(folder / "growth_m.csv", index=False)
        with pytest.raises(TableError, match=rf"growth_m\.csv: {column} is 'huge', not "):
            sentences(folder, facts)


def test_facts_that_lack_one_are_one_line(one):
    folder, _ = one
    whole = json.loads((folder / "overview_m.json").read_text())
    of_long = {name: whole[name] for name in ("model", "label", "corpus", "layers", "heads", "paper_bound")}
    for kind, facts in (("overview", whole), ("lengths", of_long | {"lengths": [64], "texts_missing": []})):
        path = folder / f"{kind}_m.json"
        # What earlier versions lack, too
        for name in sorted(facts.keys() - {"mask", "left_out"}):
            path.write_text(json.dumps({other: value for other, value in facts.items() if other != name}))
            with pytest.raises(TableError, match=name):
                measured(folder)
        path.write_text(json.dumps(facts))
    assert len(measured(folder)) == 2


def test_what_an_earlier_study_left_is_no_model_of_this_one(one):
    folder, _ = one
    assert measured(folder, left=[folder / "overview_m.json"]) == measured(folder, ["another"]) == []
    assert [facts["model"] for facts in measured(folder, ["m"], [folder / "overview_n.json"])] == ["m"]


def test_long_texts_are_told_from_the_shortest_to_the_longest_with_those_that_end_before():
    (facts,) = measured(REFERENCE / "lengths" / "tables")
    missing = ["text 3: no 8,192, it has 5,000 tokens"]
    facts |= {"texts_missing": missing, "left_out": ["a sink in 1 of 30 layers"]}
    said = sentences(REFERENCE / "lengths" / "tables", facts)
    assert said[0].endswith(f": n = 64 to 8,192 on {facts['corpus']}")
    assert said[1:3] == ["not in K: a sink in 1 of 30 layers", *missing]


def test_each_number_of_the_explorer_is_the_column_that_its_words_name(one):
    folder, tables = one
    (facts,) = measured(folder)
    model, missing = of_model(folder, facts)
    assert missing == []
    assert (model["key"], model["label"], model["corpus"], model["bound"]) == ("m", "a model", "a corpus", 5.15)
    assert TAKEN_FROM.keys() == {one.key for one in STATISTICS} == model["values"].keys()
    assert model["whole"] == ["entropy", "keys_90", "first", "rank"]
    for before, kind in (("", "all"), ("masked_", "own")):
        for key, place in TAKEN_FROM.items():
            table, column = place.split()
            found = model["values"][key][kind]
            for end, part in {"v": "", "low": "_low", "high": "_high"}.items():
                if end == "v" or key in ("c_n", "exponent"):
                    assert found[end] == pytest.approx(tables[table][f"{before}{column}{part}"].tolist(), rel=1e-3)
        for name in ("size", "trend"):
            assert model[name][kind] == tables["growth"][f"{before}{name}"].tolist()
        assert model["octave"][kind] == [200, 400]
        curves = tables["growth_curves"][f"{before}adjusted_ratio"].to_numpy().reshape(6, 3)
        np.testing.assert_allclose(model["curves"][kind]["c"], curves, rtol=1e-3)
        assert model["curves"][kind]["texts"] == ([9, 8, 6] if kind == "all" else [6, 5, 3])
    assert model["curves"]["lengths"] == [100, 200, 400]
    assert list(model["readings"]) == ["sigma"]
    sigma = tables["readings_heads"].query("reading == 'sigma'")
    for entries, kind in (("all", "all"), ("masked", "own")):
        part = sigma[sigma["entries"] == entries]
        for key, column in (("c", "ratio"), ("next", "next_ratio"), ("double", "double_ratio")):
            assert model["readings"]["sigma"][kind][key] == rounded(part[column])


def test_each_number_of_long_texts_is_the_column_that_its_words_name():
    tables = REFERENCE / "lengths" / "tables"
    (facts,) = measured(tables)
    model, _ = of_model(tables, facts)
    assert model["key"] == "smollm2-135m, long texts"
    last = (
        pd.read_csv(tables / "length_scaling_smollm2-135m.csv").query("length == 8192").sort_values(["layer", "head"])
    )
    taken = {"c": "largest_ratio", "next": "next_ratio", "double": "double_ratio", "softmax": "softmax_ratio"}
    for key, column in (taken | {"keys_90": "keys_90_mean"}).items():
        for before, kind in (("", "all"), ("masked_", "own")):
            assert model["values"][key][kind]["v"] == rounded(last[f"{before}{column}"])


def test_the_claims_are_those_of_the_table_and_what_was_not_measured_is_a_dash(one, tmp_path):
    folder, _ = one
    row = {"claim": "c is small", "criterion": "c <= 5", "paper": 5.15, "model": "m", "entries": "all", "ours": 7.26}
    rows = [
        row | {"holds": "no"},
        row | {"claim": "c is small, read as sigma", "ours": 1e301, "holds": "no"},
        row | {"entries": "masked", "paper": np.nan, "ours": np.nan, "holds": "undecided"},
        row | {"model": "of an earlier study", "holds": "yes"},
        row | {"claim": "another, read as sigma", "ours": np.inf, "holds": "no"},
    ]
    pd.DataFrame(rows).to_csv(folder / "paper_comparison.csv", index=False)
    page = drawn(folder, tmp_path / "index.html")
    found = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page, re.S)
    # The readings are in a table of their own, after the others.
    assert [(claim, *re.findall(r"<td[^>]*>(.*?)</td>", rest, re.S)) for claim, rest in found] == [
        ("c is small", "c ≤ 5", "a model", "all", "5.15", "7.26", "no"),
        ("c is small", "c ≤ 5", "a model", "masked", "–", "–", "undecided"),
        ("c is small, read as sigma", "c ≤ 5", "a model", "all", "5.15", "1e+301", "no"),
        ("another, read as sigma", "c ≤ 5", "a model", "all", "5.15", "∞", "no"),
    ]
    assert "The same under other readings of the definition (2 rows)" in page


def test_a_perplexity_is_shown_to_four_digits_and_what_could_not_run_has_dashes(tmp_path):
    row = {"model": "m", "method": "plan", "parameters": '{"heads": {"exact-fused": 3}, "target": 0.1}', "tokens": 2048}
    rows = [
        row | {"perplexity": 17.3456, "exact_perplexity": 16.9123, "seconds": 2.3456, "exact_seconds": 4.3219},
        row | dict.fromkeys(("perplexity", "exact_perplexity", "seconds", "exact_seconds")) | {"method": "hnsw"},
    ]
    (tmp_path / "tables").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "tables" / "perplexity.csv", index=False)
    page = drawn(tmp_path / "tables", tmp_path / "index.html")
    found = re.findall(r"<tr>(<td.*?)</tr>", page, re.S)
    cells = [dict(re.findall(r'data-name="(.*?)">(.*?)</td>', one)) for one in found]
    words = {"model": "m", "method": "plan", "parameters": "target 0.1, exact-fused 3", "tokens": "2,048"}
    numbers = {"perplexity": "17.35", "exact perplexity": "16.91", "seconds": "2.346", "exact seconds": "4.322"}
    assert cells == [words | numbers, words | {"method": "hnsw"} | dict.fromkeys(numbers, "–")]


def test_records_are_those_of_the_tables_and_one_of_another_form_is_one_line(tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    machine = {"cores": 3, "processor": "a <processor>", "device": "cpu"}
    record = {"command": "approxkmv x", "commit": None, "machine": machine, "versions": {"b": "2", "a": "1"}}
    files = {"sweep": record, "overview": {"source": "path:m", "provenance": record | {"commit": "abc"}}}
    files |= {"plan": {"provenance": [1]}, "left": record}
    for name, value in files.items():
        (tables / f"{name}.json").write_text(json.dumps(value))
    found = list(_records(tables, [tables / "left.json"]))
    assert [(one["table"], one["source"], one["commit"]) for one in found] == [
        ("overview", "path:m", "abc"),
        ("sweep", None, None),
    ]
    for name in ("overview", "left"):
        (tables / f"{name}.json").unlink()
    page = drawn(tables, tmp_path / "index.html")
    assert "<dd>3 cores of a &lt;processor&gt;, cpu</dd>" in page
    assert "<code>not from a checkout</code>" in page
    assert "<dd>a 1, b 2</dd>" in page
    assert "<dt>settings" not in page
    (tables / "sweep.json").write_text(json.dumps(record | {"machine": machine | {"cores": None}}))
    assert "<dd>a &lt;processor&gt;, cpu</dd>" in drawn(tables, tmp_path / "index.html")
    settings = {"unit": "context", "rotary_scaling": {"method": "yarn", "factor": 2.0}}
    (tables / "sweep.json").write_text(json.dumps(record | {"settings": settings}))
    assert 'rotary_scaling {"method":"yarn","factor":2.0}' in drawn(tables, tmp_path / "index.html")
    for wrong in ({"machine": "x"}, {"machine": machine | {"cores": "3"}}, {"versions": ["a"]}):
        (tables / "sweep.json").write_text(json.dumps(record | wrong))
        with pytest.raises(TableError, match=r"sweep\.json"):
            drawn(tables, tmp_path / "index.html")


def test_a_model_measured_on_long_texts_too_has_each_figure_once(one, tmp_path):
    folder, _ = one
    for name in ("max_ratios_m", "growth_m", "context_scaling"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    pd.DataFrame({"prefix": [50]}).to_csv(folder / "context_scaling_m.csv", index=False)
    facts = json.loads((folder / "overview_m.json").read_text())
    (folder / "lengths_m.json").write_text(json.dumps(facts | {"lengths": [200, 400], "texts_missing": []}))
    page = drawn(folder, tmp_path / "index.html", tmp_path)
    assert re.findall(r'id="figure-(.*?)"', page) == ["max_ratios_m", "context_scaling", "growth_m"]
    assert "<h3>Growth of c per head</h3>" in page
    # Of two models a figure says of which it is, and is drawn of those that have its tables.
    for path in folder.glob("*_m.*"):
        other = path.with_name(path.name.replace("_m.", "_n."))
        other.write_text(path.read_text().replace('"model": "m"', '"model": "n"'))
    (folder / "growth_n.csv").unlink()
    page = drawn(folder, tmp_path / "index.html", tmp_path)
    assert "<h3>Growth of c per head, m</h3>" in page
    assert "<h3>c against length (Figure 4)</h3>" in page
    found = figures_of(folder, ["m", "n"])
    assert [figure for figure in found if figure[0] in ("growth", "growth_curves")] == [
        ("growth", ["m"], "growth_m"),
        ("growth_curves", ["m"], "growth_curves_m"),
    ]
    (folder / "context_scaling_n.csv").unlink()
    assert ("context_scaling", ["m"], "context_scaling") in figures_of(folder, ["m", "n"])
