"""Figures: numbers in cells are short and right, any grid can be drawn, and no text overlaps another."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from approxkmv.errors import ConfigError, TableError
from approxkmv.figures import (
    catalogue,
    context_scaling,
    growth,
    growth_curves,
    length_scaling,
    max_ratios,
    order_ratios,
)
from approxkmv.figures.style import short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0.0, "0"), (0.001, "<.01"), (0.0123, "0.01"), (0.456, "0.46"), (0.996, "1.0"), (1.0, "1.0"), (4.6, "4.6")],
        *[(9.94, "9.9"), (9.96, "10"), (89.1, "89"), (9999.0, "9999"), (12345.0, "1e4"), (1.79e308, "2e308")],
        (float("nan"), "–"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text
    assert len(text) <= 5


def tables(folder, model: str, layers: int, heads: int, bound: float = 4.6) -> None:
    generator = np.random.default_rng(0)
    layer, head = (index.ravel() for index in np.indices((layers, heads)))
    pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "max_ratio": 10 ** generator.uniform(-3, 3, layers * heads),
            "median_next_ratio": 1 + generator.exponential(0.01, layers * heads),
            "median_double_ratio": 10 ** generator.uniform(0, 300, layers * heads),
        }
    ).to_csv(folder / f"heads_{model}.csv", index=False)
    prefix = np.array([50, 100, 200])
    pd.DataFrame(
        {"prefix": prefix, "contexts": [9, 5, 1], "mean": prefix / 10, "std": 1.0, "min": 4.0, "max": 30.0}
    ).to_csv(folder / f"context_scaling_{model}.csv", index=False)
    facts = {"label": f"model {model}", "texts_used": 9, "corpus": "a corpus", "paper_bound": bound}
    facts |= {"layers": layers, "heads": heads, "heads_within_bound": 1}
    (folder / f"overview_{model}.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (6, 12), (30, 9), (48, 40)])
def test_any_grid_is_drawn_and_no_cell_text_leaves_its_cell(tmp_path, monkeypatch, layers, heads):
    tables(tmp_path, "m", layers, heads)
    drawn = []

    def keep(figure, stem):
        drawn.append(figure)
        return []

    monkeypatch.setattr(max_ratios, "save", keep)
    monkeypatch.setattr(order_ratios, "save", keep)
    max_ratios.draw(tmp_path, "m", tmp_path / "x")
    order_ratios.draw(tmp_path, "m", tmp_path / "y")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for figure in drawn:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for axes in figure.axes:
            if len(axes.texts) != layers * heads:
                continue
            cell_width = abs(axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0])
            cell_height = abs(axes.transData.transform((0, 1))[1] - axes.transData.transform((0, 0))[1])
            for text in axes.texts:
                box = text.get_window_extent(canvas.get_renderer())
                assert box.width < cell_width
                assert box.height < cell_height
        # What stands outside the cells: titles and labels, none over another.
        outside = [a.title for a in figure.axes] + [a._left_title for a in figure.axes] + figure.texts
        boxes = [t.get_window_extent(canvas.get_renderer()) for t in outside if t.get_text()]
        for i, one in enumerate(boxes):
            for other in boxes[:i]:
                assert not one.overlaps(other)


def test_files_are_the_same_bytes_each_time(tmp_path):
    tables(tmp_path, "m", 2, 3)
    tables(tmp_path, "n", 2, 3, bound=5.0)
    for name, models in (("max_ratios", ["m"]), ("order_ratios", ["m"]), ("context_scaling", ["m", "n"])):
        first = [path.read_bytes() for path in catalogue.draw(name, tmp_path, models, tmp_path / "one")]
        second = [path.read_bytes() for path in catalogue.draw(name, tmp_path, models, tmp_path / "two")]
        assert first == second
        assert first[0].startswith(b"%PDF")
        assert first[1].startswith(b"\x89PNG")


def test_unknown_figures_and_missing_tables_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no figure 'max_ratio'"):
        catalogue.draw("max_ratio", tmp_path, ["m"], tmp_path / "x")
    with pytest.raises(ConfigError, match="give --model once"):
        catalogue.draw("max_ratios", tmp_path, ["m", "n"], tmp_path / "x")
    with pytest.raises(TableError, match=r"context_scaling_m\.csv is missing"):
        context_scaling.draw(tmp_path, ["m"], tmp_path / "x")


def growth_tables(folder, layers: int, heads: int, masked: bool) -> None:
    generator = np.random.default_rng(1)
    layer, head = (index.ravel() for index in np.indices((layers, heads)))
    growth, curves = {"layer": layer, "head": head}, []
    for before in ("", "masked_") if masked else ("",):
        growth |= {
            f"{before}exponent": generator.normal(0.4, 0.5, len(layer)),
            f"{before}coefficient": 10 ** generator.uniform(-3, 0, len(layer)),
            f"{before}verdict": generator.choice(["holds", "fails", "undecided", "grows slowly"], len(layer)),
        }
    for prefix in (50, 100, 200, 400):
        part = {"layer": layer, "head": head, "prefix": prefix}
        for before in ("", "masked_") if masked else ("",):
            part[f"{before}adjusted_ratio"] = growth[f"{before}coefficient"] * prefix ** growth[f"{before}exponent"]
        curves.append(pd.DataFrame(part))
    pd.DataFrame(growth).to_csv(folder / "growth_m.csv", index=False)
    pd.concat(curves).to_csv(folder / "growth_curves_m.csv", index=False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (6, 12), (30, 9)])
def test_growth_is_drawn_with_failing_heads_outlined_and_nothing_overlapping(
    tmp_path, monkeypatch, layers, heads, masked
):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    tables(tmp_path, "m", layers, heads)
    facts = json.loads((tmp_path / "overview_m.json").read_text()) | {"label": "all-MiniLM-L6-v2 (BERT, 6 × 12 heads)"}
    (tmp_path / "overview_m.json").write_text(json.dumps(facts))
    growth_tables(tmp_path, layers, heads, masked)
    drawn = []
    for module in (growth, growth_curves):
        monkeypatch.setattr(module, "save", lambda figure, stem: drawn.append(figure) or [])
        module.draw(tmp_path, "m", tmp_path / "x")
    fails = sum((pd.read_csv(tmp_path / "growth_m.csv").filter(like="verdict") == "fails").sum())
    assert sum(len(axes.patches) for axes in drawn[0].axes if axes.texts) == fails
    for figure in drawn:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        outside = [a._left_title for a in figure.axes] + figure.texts + ([figure._suptitle] if figure._suptitle else [])
        outside = list(dict.fromkeys(text for text in outside if text.get_text()))
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in outside]
        for i, one in enumerate(boxes):
            assert one.x0 >= 0
            assert one.x1 <= figure.bbox.width
            for other in boxes[:i]:
                assert not one.overlaps(other)


@pytest.mark.parametrize("masked", [False, True])
def test_long_texts_are_drawn(tmp_path, masked):
    generator = np.random.default_rng(2)
    index = pd.MultiIndex.from_product([[0, 1], [0, 1, 2], [64, 128, 256]], names=["layer", "head", "length"])
    table = index.to_frame(index=False)
    for before in ("", "masked_") if masked else ("",):
        for column, _ in length_scaling.PANELS:
            # One head far beyond the axes: it must not squeeze the others.
            table[f"{before}{column}"] = 10 ** generator.uniform(-5, 300, len(table))
    table.to_csv(tmp_path / "length_scaling_m.csv", index=False)
    facts = {"label": "model m", "texts_used": 1, "corpus": "a corpus", "layers": 2, "heads": 3}
    (tmp_path / "lengths_m.json").write_text(json.dumps(facts))
    first = [path.read_bytes() for path in catalogue.draw("length_scaling", tmp_path, ["m"], tmp_path / "one")]
    assert first == [path.read_bytes() for path in catalogue.draw("length_scaling", tmp_path, ["m"], tmp_path / "two")]
