"""The page in a real browser: what a reader points at, chooses, types and keeps. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from approxkmv.page.render import write_page

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LABEL = "<script>window.wrong = 1</script><b>model & co</b>"
SIZES = {"desk": (1280, 900), "phone": (360, 740)}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded study, of SmolLM2 without softmax statistics, of MiniLM with a label that is no HTML."""
    folder = tmp_path_factory.mktemp("page") / "tables"
    shutil.copytree(REFERENCE / "embedded" / "tables", folder)
    # An older study, of which one model lacks a table
    (folder / "attention_smollm2-135m.csv").unlink()
    path = folder / "overview_minilm-l6.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label": LABEL}))
    write_page(folder, REFERENCE / "embedded" / "figures", folder.parent / "index.html", "a study")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as started:
        # A container's root may not have Chromium's sandbox.
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, tables: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end there must have been no error, no message and no request but the page itself."""
    contexts, wrong = [], []

    def open_page(state: str = "", size: str = "desk", scheme: str = "light") -> Any:
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        file = (tables.parent / "index.html").as_uri()
        page.on(
            "request", lambda request: None if request.url.startswith((file, "data:")) else wrong.append(request.url)
        )
        page.goto(file + state)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def column(tables: Path, kind: str, name: str, model: str = "minilm-l6") -> pd.Series:
    return pd.read_csv(tables / f"{kind}_{model}.csv").set_index(["layer", "head"])[name]


def test_it_loads_without_errors_or_requests_and_shows_the_three_largest_heads(opened, tables):
    page = opened()
    cells = page.locator("#map-a button")
    assert cells.count() == 72
    largest = column(tables, "heads", "max_ratio").nlargest(3)
    for (layer, head), value in largest.items():
        cell = page.locator(f"#a-{layer}-{head}")
        assert cell.inner_text() == f"{value:.0f}"
        # Yellow end of the colours: these are the brightest cells.
        _, green, blue = (
            int(part) for part in cell.evaluate("c => getComputedStyle(c).backgroundColor")[4:-1].split(",")
        )
        assert green > 200 > blue
    layer, head = largest.index[0]
    assert page.locator("h3", has_text=f"Layer {layer}, head {head}").is_visible()


def test_labels_are_shown_as_text_and_run_nothing(opened):
    page = opened()
    assert page.locator(".verdict h3").first.inner_text().startswith(f"{LABEL}: ")
    assert LABEL in page.locator("#model-a option").first.inner_text()
    assert page.evaluate("window.wrong") is None
    assert page.locator("main b").count() == 0


def test_pointing_at_a_head_shows_its_numbers_with_intervals(opened, tables):
    page = opened()
    assert page.locator("#tip").is_hidden()
    page.hover("#a-2-3")
    shown = page.locator("#tip").inner_text()
    growth = pd.read_csv(tables / "growth_minilm-l6.csv").set_index(["layer", "head"]).loc[(2, 3)]
    assert shown.startswith(f"layer 2, head 3 {growth['size']}, {growth['trend']}")
    assert f"largest c: {column(tables, 'heads', 'max_ratio')[(2, 3)]:.3g}" in shown
    ends = [f"{growth[f'exponent{end}']:.3g}".replace("-", "−") for end in ("", "_low", "_high")]
    assert f"exponent of c: {ends[0]} ({ends[1]} to {ends[2]})" in shown
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_choosing_a_head_draws_it_and_the_link_keeps_what_is_seen(opened, tables):
    page = opened()
    before = page.locator(".details").inner_html()
    page.click("#a-4-0")
    assert page.locator(".details h3").inner_text() == "Layer 4, head 0"
    assert page.locator(".details").inner_html() != before
    assert page.locator(".details svg[role=img]").count() == 3
    curve = column(tables, "growth_curves", "adjusted_ratio")[(4, 0)]
    assert page.locator(".details svg circle.own").count() >= len(curve)
    page.check("#two")
    page.click("#b-7-2")
    page.select_option("#stat", "double")
    page.select_option("#reading", "sigma")
    page.select_option("#filter", "growing")
    kept, seen = page.url, page.locator(".panels").inner_text()
    assert page.locator(".aside a").get_attribute("href") == "#" + kept.split("#")[1]
    again = opened("#" + kept.split("#")[1])
    assert again.locator(".panels").inner_text() == seen
    assert [again.locator(f"#{name}").input_value() for name in ("stat", "reading", "filter")] == [
        "double",
        "sigma",
        "growing",
    ]
    assert again.locator("#two").is_checked()


@pytest.mark.parametrize(
    "state", ["#stat=nothing&a=minilm-l6~99~0&b=~~&filter=", "#a=%3Cscript%3E~0~0&set=x", "#claims"]
)
def test_a_link_with_words_that_do_not_exist_shows_the_start(opened, state):
    page = opened(state)
    assert page.locator(".details h3").first.inner_text() == "Layer 0, head 11"
    assert page.locator("#stat").input_value() == "c"


def test_the_map_shows_what_is_chosen(opened, tables):
    page = opened()
    page.select_option("#stat", "keys_90")
    assert page.locator("#a-1-5").inner_text() == f"{column(tables, 'attention', 'keys_90')[(1, 5)]:.0f}"
    page.select_option("#stat", "c")
    page.select_option("#reading", "sigma")
    sigma = (
        pd.read_csv(tables / "readings_heads_minilm-l6.csv").query("reading == 'sigma'").set_index(["layer", "head"])
    )
    assert (
        page.locator("#a-1-5")
        .get_attribute("aria-label")
        .startswith(f"layer 1, head 5: largest c {sigma['ratio'][(1, 5)]:.3g}")
    )
    page.select_option("#reading", "printed")
    page.select_option("#model-a", "smollm2-135m")
    whole = page.locator("#a-0-4").inner_text()
    page.select_option("#set", "own")
    masked = column(tables, "heads", "masked_max_ratio", "smollm2-135m")[(0, 4)]
    assert whole != page.locator("#a-0-4").inner_text() == f"{masked:.0f}"
    page.select_option("#stat", "keys_90")
    assert "do not have this" in page.locator(".panel").inner_text()


@pytest.mark.parametrize(("filter", "name", "words"), [("large", "size", ["large"]), ("growing", "trend", ["grows"])])
def test_the_filter_leaves_the_heads_that_the_tables_name(opened, tables, filter, name, words):
    page = opened()
    page.select_option("#filter", filter)
    kept = column(tables, "growth", name).isin(words)
    assert page.locator("#counted").inner_text() == f"{kept.sum()} of 72 heads"
    faded = {cell.get_attribute("id") for cell in page.locator("#map-a .dim").all()}
    assert faded == {f"a-{layer}-{head}" for layer, head in kept[~kept].index}


def test_two_models_stand_side_by_side_and_each_has_its_own_head(opened):
    page = opened()
    page.check("#two")
    a, b = (page.locator(f"#map-{side}").bounding_box() for side in "ab")
    assert a["x"] + a["width"] <= b["x"]
    assert page.locator("#model-b").input_value() == "smollm2-135m"
    page.click("#b-3-1")
    assert page.locator(".details h3").all_inner_texts() == ["Layer 0, head 11", "Layer 3, head 1"]
    page.select_option("#model-b", "minilm-l6")
    page.click("#b-5-5")
    assert page.locator(".details h3").all_inner_texts() == ["Layer 0, head 11", "Layer 5, head 5"]


def test_the_keyboard_alone_reaches_a_head(opened):
    page = opened()
    page.locator("#model-a").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.id"
    assert page.evaluate(focused) == "a-0-11"
    for key, place in (
        ("ArrowLeft", "a-0-10"),
        ("ArrowDown", "a-1-10"),
        ("ArrowRight", "a-1-11"),
        ("ArrowUp", "a-0-11"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(focused) == place
        assert page.locator("#tip").is_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("Enter")
    assert page.locator(".details h3").inner_text() == "Layer 1, head 11"
    assert page.evaluate(focused) == "a-1-11"
    assert "Layer 1, head 11" in page.locator("[aria-live]").inner_text()


def test_a_screen_reader_has_names_for_everything(opened):
    page = opened()
    assert page.locator("html[lang=en]").count() == 1
    assert page.locator("main h2").count() >= 4
    for selector, name in (
        ("#map-a button", "aria-label"),
        ("img", "alt"),
        ("svg", "aria-label"),
        ("#map-a", "aria-label"),
    ):
        found = page.locator(selector).all()
        assert found
        assert all(one.get_attribute(name) for one in found)
    for name in ("stat", "set", "reading", "filter", "two"):
        assert page.evaluate(f"document.getElementById('{name}').labels[0].innerText.trim()")
    assert page.locator("#map-a button[tabindex='0']").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["", "#stat=exponent&a=smollm2-135m~3~4&b=minilm-l6~0~0"])
def test_a_phone_scrolls_one_way_only(opened, scheme, state):
    page = opened(state, size="phone", scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES["phone"][0]
    back, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (back < ink) == (scheme == "dark") or back == "rgb(255, 255, 255)"
    page.click("#map-a .chosen")
    tip = page.locator("#tip").bounding_box()
    assert tip is None or (tip["x"] >= 0 and tip["x"] + tip["width"] <= SIZES["phone"][0])


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page of a folder of tables; at the end there must have been no error."""
    pages, wrong = [], []

    def open_page(tables: Path, state: str = "", size: str = "desk") -> Any:
        write_page(tables, Path("nowhere"), tmp_path / "index.html", "a study")
        width, height = SIZES[size]
        page = browser.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((tmp_path / "index.html").as_uri() + state)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


def test_a_model_with_a_bias_and_no_mask_has_c_of_all_entries_and_attention_of_its_own(shown, tmp_path):
    """MPNet: of its tables only that of attention has masked columns."""
    tables = REFERENCE / "families" / "tables"
    page = shown(tables, "#set=own&a=mpnet-base~3~4")
    row = pd.read_csv(tables / "growth_mpnet-base.csv").query("layer == 3 and head == 4").iloc[0]
    assert page.locator(".badges").inner_text() == f"{row['size']}, {row['trend']}"
    assert page.locator("#a-3-4").get_attribute("aria-label").endswith(f"; {row['size']}, {row['trend']}")
    assert "entries: every query with every key." in page.locator(".frame .note").inner_text()
    page.select_option("#filter", "growing")
    growing = (pd.read_csv(tables / "growth_mpnet-base.csv")["trend"] == "grows").sum()
    assert page.locator("#counted").inner_text() == f"{growing} of 144 heads"
    page.select_option("#stat", "entropy")
    bias = json.loads((tables / "overview_mpnet-base.json").read_text())["left_out"][0]
    assert f"entries: every query with every key, {bias}." in page.locator(".frame .note").inner_text()
    own = pd.read_csv(tables / "attention_mpnet-base.csv").query("layer == 3 and head == 4")["masked_entropy"].iloc[0]
    assert page.locator("#a-3-4").inner_text() == f"{own:.1f}"


@pytest.mark.parametrize("size", list(SIZES))
def test_no_number_of_a_wide_map_is_cut_and_a_choice_leaves_it_where_it_is(shown, tmp_path, size):
    folder = tmp_path / "tables"
    folder.mkdir()
    heads = pd.read_csv(REFERENCE / "embedded" / "tables" / "heads_minilm-l6.csv")
    heads = pd.concat([heads] * 2).assign(layer=[layer for layer in range(3) for _ in range(48)], head=[*range(48)] * 3)
    heads["median_double_ratio"] = [1.7e308, 1234.0, 0.0512] * 48
    heads["max_ratio"] = [1234.0, 8.6, 0.05] * 48
    heads.to_csv(folder / "heads_minilm-l6.csv", index=False)
    facts = json.loads((REFERENCE / "embedded" / "tables" / "overview_minilm-l6.json").read_text())
    (folder / "overview_minilm-l6.json").write_text(json.dumps(facts | {"layers": 3, "heads": 48}))
    page = shown(folder, size=size)
    # Of an outlined cell three pixels at each side are lines.
    cut = """() => [...document.querySelectorAll("#map-a button")].filter((button) => {
      const words = document.createRange();
      words.selectNodeContents(button);
      const room = button.clientWidth - (button.classList.contains("above") ? 6 : 0);
      return words.getBoundingClientRect().width > room;
    }).map((button) => button.textContent)"""
    for statistic in ("c", "double"):
        page.select_option("#stat", statistic)
        assert page.evaluate(cut) == []
    page.evaluate("document.querySelector('#scroll-a').scrollLeft = 600")
    page.evaluate("document.querySelector('#a-1-40').click()")
    assert page.evaluate("document.querySelector('#scroll-a').scrollLeft") == 600


def near(words: str) -> Any:
    """A number of the page, which has three digits, and two with an exponent."""
    return pytest.approx(float(words.replace("−", "-").replace(",", "")), rel=6e-2 if "e" in words else 6e-3)


def test_the_numbers_beside_the_map_are_those_of_the_head_and_of_the_median_head(shown):
    tables = REFERENCE / "embedded" / "tables"
    page = shown(tables, "#set=own&a=smollm2-135m~17~4")
    rows = page.locator(".details > table.numbers tbody tr").all()
    found = {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}
    heads, growth, attention = (
        pd.read_csv(tables / f"{kind}_smollm2-135m.csv") for kind in ("heads", "growth", "attention")
    )
    taken = {"largest c": heads["masked_max_ratio"], "K(n)/K(2n)": heads["masked_median_double_ratio"]}
    taken |= {"exponent of c": growth["masked_exponent"], "entropy of a row": attention["masked_entropy"]}
    for name, column in taken.items():
        own, interval, middle = found[name]
        assert column[17 * 9 + 4] == near(own)
        assert column.median() == near(middle)
        if name == "exponent of c":
            low, high = interval.split(" to ")
            assert growth["masked_exponent_low"][17 * 9 + 4] == near(low)
            assert growth["masked_exponent_high"][17 * 9 + 4] == near(high)
        else:
            assert interval == "–"
    (strip,) = [one for one in page.locator(".details figcaption").all_inner_texts() if one.startswith("K(n)/K(2n)")]
    assert heads["masked_median_double_ratio"].median() == near(strip.rpartition(" ")[2])
    mark = page.locator(".details .chart").last.locator(".median-mark title").text_content()
    assert heads["masked_median_double_ratio"].median() == near(mark.removeprefix("median "))
    curves = pd.read_csv(tables / "growth_curves_smollm2-135m.csv")
    own = curves.query("layer == 17 and head == 4").set_index("prefix")
    page.locator(".details summary").click()
    cells = [row.locator("td").all_inner_texts() for row in page.locator(".details details tbody tr").all()]
    assert [int(row[0]) for row in cells] == own.index.tolist()
    for length, texts, this, middle in cells:
        part = curves[curves["prefix"] == int(length)]
        assert int(texts) == own["masked_texts"][int(length)]
        assert own["masked_adjusted_ratio"][int(length)] == near(this)
        assert part["masked_adjusted_ratio"].median() == near(middle)


def test_the_curve_has_its_points_and_the_thick_line_its_exponent_through_their_middle(shown, tmp_path):
    tables = Path(shutil.copytree(REFERENCE / "embedded" / "tables", tmp_path / "tables"))
    path = tables / "growth_curves_smollm2-135m.csv"
    # Five texts are enough.
    pd.read_csv(path).replace({"masked_texts": {8: 5}}).to_csv(path, index=False)
    (tables / f"{path.name}.sha256").unlink(missing_ok=True)
    page = shown(tables, "#set=own&a=smollm2-135m~17~4")
    growth = pd.read_csv(tables / "growth_smollm2-135m.csv").query("layer == 17 and head == 4").iloc[0]
    curve = (
        pd.read_csv(tables / "growth_curves_smollm2-135m.csv").query("layer == 17 and head == 4").set_index("prefix")
    )
    dots = page.locator(".chart").first.locator("circle.own").all()
    x, y = (np.array([float(dot.get_attribute(name)) for dot in dots]) for name in ("cx", "cy"))
    c, n = curve["masked_adjusted_ratio"].to_numpy(), curve.index.to_numpy()
    # Both axes are logarithmic.
    (across, left), (up, bottom) = np.polyfit(np.log(n), x, 1), np.polyfit(np.log(c), y, 1)
    np.testing.assert_allclose(left + across * np.log(n), x, atol=0.1)
    np.testing.assert_allclose(bottom + up * np.log(c), y, atol=0.3)
    few = ["few" in dot.get_attribute("class").split() for dot in dots]
    assert few == (curve["masked_texts"] < 5).tolist()
    assert 5 in curve["masked_texts"].tolist()
    line = page.locator(".chart").first.locator("line.octave.own")
    x1, x2, y1, y2 = (float(line.get_attribute(name)) for name in ("x1", "x2", "y1", "y2"))
    ends = growth["masked_start"], growth["masked_length"]
    assert [x1, x2] == pytest.approx([left + across * np.log(end) for end in ends], abs=0.3)
    assert y2 - y1 == pytest.approx(up * growth["masked_exponent"] * np.log(ends[1] / ends[0]), abs=0.3)
    assert (y1 + y2) / 2 == pytest.approx(np.mean([bottom + up * np.log(c[n == end][0]) for end in ends]), abs=0.3)
    bound = page.locator(".chart").first.locator("line.bound")
    facts = json.loads((tables / "overview_smollm2-135m.json").read_text())
    for end in ("y1", "y2"):
        assert float(bound.get_attribute(end)) == pytest.approx(bottom + up * np.log(facts["paper_bound"]), abs=0.5)
    # Cells above the bound are outlined where the statistic is a c, and no others.
    heads = pd.read_csv(tables / "heads_smollm2-135m.csv")
    assert page.locator("#map-a .above").count() == (heads["masked_max_ratio"] > facts["paper_bound"]).sum()
    assert f"Outlined: above {facts['paper_bound']:g}." in page.locator(".frame .note").inner_text()
    # One scale of c for all models
    assert page.locator(".marks").inner_text().split() == ["0.1", "1", "10", "100"]
    page.select_option("#stat", "double")
    assert page.locator("#map-a .above").count() == 0
    page.select_option("#filter", "undecided")
    table = pd.read_csv(tables / "growth_smollm2-135m.csv")
    count = (table[["masked_size", "masked_trend"]] == "undecided").any(axis=1).sum()
    assert page.locator("#counted").inner_text() == f"{count} of 270 heads"
    assert "As printed, whatever the reading" not in page.locator(".details").inner_text()
    page.select_option("#reading", "sigma")
    assert "As printed, whatever the reading" in page.locator(".details").inner_text()


def test_numbers_are_written_to_three_digits_or_as_they_fit(shown):
    page = shown(REFERENCE / "embedded" / "tables")
    numbers = "[null, 0, 0.004, 0.0512, 0.996, 8.649, 57.76, 1234.5, 98765, -0.451, 1.7e308, Infinity, -Infinity]"
    assert page.evaluate(f"{numbers}.map(brief)") == [
        *("–", "0", "≈0", "0.05", "1.0", "8.6", "58", "1235", "1e5", "−0.45", "2e308", "∞", "−∞"),
    ]
    assert page.evaluate(f"{numbers}.map(shown)") == [
        *("–", "0", "0.004", "0.0512", "0.996", "8.65", "57.8", "1235", "98765", "−0.451", "1.7e308", "∞", "−∞"),
    ]
    assert page.evaluate("[[], [3, null, 1], [4, 1, 2, 8]].map(median)") == [None, 2, 3]
    for found in page.evaluate("Array.from({ length: 101 }, (_, i) => colour(i / 100))"):
        channels = np.array([int(part) for part in found["back"][4:-1].split()]) / 255
        light = float(channels**2.2 @ [0.2126, 0.7152, 0.0722]) + 0.05
        # WCAG's contrast of large letters, nearly
        assert (1.05 / light if found["ink"] == "#fff" else light / 0.05) > 2.9
