"""The page of a study: drawn from tables alone, whatever of them is there, with labels as text."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from approxkmv.errors import TableError
from approxkmv.figures import catalogue
from approxkmv.page.contents import CAPTIONS, FIGURES
from approxkmv.page.heads import STATISTICS, of_model, rounded
from approxkmv.page.render import figures_of, write_page
from approxkmv.page.verdict import holds, measured, sentences
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
    ("sizes", "word"),
    [(["small"] * 270, "yes"), (["undecided"] + ["small"] * 269, "undecided"), (["large"] * 270, "no")],
)
def test_the_verdict_on_long_texts_is_that_of_the_table_of_growth(tmp_path, sizes, word):
    tables = Path(shutil.copytree(REFERENCE / "lengths" / "tables", tmp_path / "tables"))
    path = tables / "growth_smollm2-135m.csv"
    pd.read_csv(path).assign(size=sizes).to_csv(path, index=False)
    (facts,) = measured(tables)
    assert holds(tables, facts)[0] == word
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
    assert not [text for text in texts if "No heads were measured" in text]


def test_parameters_of_methods_are_for_reading(tmp_path):
    page = drawn(REFERENCE / "perplexity" / "tables", tmp_path / "index.html")
    texts = Tags(page).texts
    assert "backend fastest" in texts
    assert not [text for text in texts if text.startswith("{")]
    assert any("No heads were measured" in text for text in texts)
