"""Figures: numbers in cells are short and correct, any grid can be drawn, and no texts overlap."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from approxkmv import files
from approxkmv.errors import ConfigError, TableError
from approxkmv.figures import catalogue, context_scaling, length_scaling, style
from approxkmv.figures.order_ratios import up_to_the_scale
from approxkmv.figures.style import COLOURS, near, short
from approxkmv.statistics.entries import CAUSAL, OWN_MASK

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that a test draws, in place of the files that they would be saved to."""
    from matplotlib.figure import Figure

    kept: list[Any] = []

    def keep(figure: Figure, path: Path, **options: Any) -> None:
        Path(path).touch()
        if figure not in kept:
            kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def drawn_texts(figure: Any) -> list[tuple[str, np.ndarray]]:
    """Every text that the figure shows, of titles, labels, ticks, legends, notes and cells, with its box in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    found: list[tuple[str, np.ndarray]] = []
    plain = Text.draw

    # What is drawn is what is seen: many ticks that there are stand outside the axes' limits.
    def draw(text: Text, renderer: Any) -> None:
        plain(text, renderer)
        if text.get_visible() and text.get_text().strip():
            found.append((text.get_text(), Text.get_window_extent(text, renderer).extents))

    figure.set_dpi(160)
    FigureCanvasAgg(figure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        figure.draw_without_rendering()
    return found


def misplaced_texts(figure: Any, found: list[tuple[str, np.ndarray]] | None = None) -> list[str]:
    """What a reader could not read: two texts of which one lies on the other, and texts cut by the figure's edge.

    `found` are the figure's drawn_texts, if they are known.
    """
    found = drawn_texts(figure) if found is None else found
    words, boxes = [word for word, _ in found], np.array([box for _, box in found])
    # Boxes include a little air: a pixel is no overlap.
    low, high = boxes[:, :2] + 1, boxes[:, 2:] - 1
    wrong = [
        f"{word!r} leaves the figure"
        for word, start, end in zip(words, low, high, strict=True)
        if (start < 0).any() or (end > figure.bbox.size).any()
    ]
    for i, word in enumerate(words):
        over = ((low[i] < high[:i]) & (low[:i] < high[i])).all(axis=1)
        wrong += [f"{word!r} lies on {words[j]!r}" for j in np.flatnonzero(over)]
    return wrong


def test_texts_that_overlap_or_are_cut_are_found():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.set_title("a title")
    axes.plot([0, 1], label="a line")
    axes.legend(loc="upper left")
    assert {"a title", "a line", "0.0", "1.0"} <= {word for word, _ in drawn_texts(figure)}
    assert misplaced_texts(figure) == []
    axes.annotate("a note", (0.06, 0.93), xycoords="axes fraction")
    axes.text(2.0, 0.5, "beyond", clip_on=False)
    axes.text(0.5, 0.5, "unseen").set_visible(False)
    axes.text(0.5, 0.5, "seen")
    wrong = misplaced_texts(figure)
    assert sum("lies on" in line for line in wrong) == 1
    assert "'beyond' leaves the figure" in wrong
    assert any("'a note'" in line and "'a line'" in line for line in wrong)


MODELS = ["minilm-l6", "smollm2-135m"]
SWEEPS = ("embedded", "long", "rows", "columns", "columns-long", "causal", "causal-long", "few", "figure5", "gpu")
SWEEPS += ("causal-articles", "causal-gemma")
OF_THE_REFERENCE = [
    *[("articles", name, [model]) for name in ("growth", "growth_curves") for model in MODELS],
    *[("embedded", name, [model]) for name in ("max_ratios", "order_ratios") for model in MODELS],
    *[("embedded", name, [model]) for name in ("growth", "growth_curves", "readings", "gauge") for model in MODELS],
    *[("lengths", name, ["smollm2-135m"]) for name in ("growth", "growth_curves")],
    ("embedded", "context_scaling", MODELS),
    *[(study, name, []) for study in SWEEPS for name in ("speedup", "error_vs_time", "crossover")],
    ("lengths", "length_scaling", ["smollm2-135m"]),
    ("complexity", "complexity", []),
    ("operator", "operator", []),
]


# Of the softmax, not of K
OF_THE_SOFTMAX = [("embedded", "attention_support", [model]) for model in MODELS]
FAMILIES = sorted(path.stem.removeprefix("overview_") for path in REFERENCE.glob("families/tables/overview_*.json"))
OF_FAMILIES = [
    ("families", "context_scaling", FAMILIES),
    *[("families", "gauge", [model]) for model in FAMILIES],
    *[("families", "attention_support", [model]) for model in FAMILIES],
]


@pytest.mark.slow
@pytest.mark.parametrize(("study", "name", "models"), [*OF_THE_REFERENCE, *OF_THE_SOFTMAX, *OF_FAMILIES])
def test_the_reference_figures_can_be_read(tmp_path, figures, study, name, models):
    catalogue.draw(name, REFERENCE / study / "tables", models, tmp_path / name)
    assert len(figures) == 1
    found = drawn_texts(figures[0])
    assert misplaced_texts(figures[0], found) == []
    assert unlike_formats(figures[0]) == []
    assert told_apart_by_colour_alone(figures[0]) == []
    assert without_words(figures[0]) == []
    assert joined_though_hollow(figures[0]) == []
    assert of_no_entry(figures[0]) == []
    # The picture beside the table is of today's code, as far as its title tells.
    kept = REFERENCE / study / "figures" / f"{'_'.join([name, *models] if len(models) == 1 else [name])}.png"
    if study != "families":
        assert Image.open(kept).text["Title"] == " ".join(figures[0].get_suptitle().split())
    if study == "few" and name != "crossover":
        # Few queries are named, and so is what does not count.
        labels = {axes.get_xlabel() for axes in figures[0].axes}
        assert name != "speedup" or labels == {f"n, keys (queries: {count})" for count in (1, 16, 256)}
        words = " ".join(" ".join(word for word, _ in found).split())
        assert "not counted where every score is computed: " in words


def test_every_reference_figure_is_looked_at():
    drawn = {
        f"{study}/{'_'.join([name, *models] if len(models) == 1 else [name])}"
        for study, name, models in (*OF_THE_REFERENCE, *OF_THE_SOFTMAX)
    }
    assert {f"{path.parts[-3]}/{path.stem}" for path in REFERENCE.glob("*/figures/*.png")} == drawn


def joined_though_hollow(figure: Any) -> list[tuple[float, float]]:
    """Hollow points, of too few texts or with too large an error, through which a line goes."""
    found = []
    for axes in figure.axes:
        lines = {line: set(zip(*np.asarray(line.get_data(), dtype=float).tolist(), strict=True)) for line in axes.lines}
        hollow = [
            points
            for line, points in lines.items()
            if line.get_markerfacecolor() == "white" and line.get_marker() != "None"
        ]
        joined = [points for line, points in lines.items() if line.get_linestyle() != "None" and len(points) > 1]
        found += [point for some in hollow for point in some if any(point in points for points in joined)]
    return found


def of_no_entry(figure: Any) -> list[str]:
    """Markers drawn that no entry of a legend has: on an edge, too, they must tell whose they are."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    known = {str(handle.get_marker()) for legend in legends for handle in legend.legend_handles}
    drawn = {str(line.get_marker()) for axes in figure.axes for line in axes.lines}
    return sorted(drawn - known - {"None", "|", "_"}) if known else []


def unlike_formats(figure: Any) -> list[list[str]]:
    """Axes of one name whose tick labels mix plain numbers with powers of ten, or are written as computers do."""
    named: dict[str, list[str]] = {}
    for number, axis in enumerate(axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels() if label.get_text()]
        named.setdefault(axis.get_label_text() or str(number), []).extend(labels)
    return [
        labels
        for labels in named.values()
        if len({r"^{" in label for label in labels if label[:1].isdigit() or label[:1] == "$"}) > 1
        or any("e+" in label or "e-0" in label or (label[:1] == "-" and label[1:2].isdigit()) for label in labels)
    ]


def told_apart_by_colour_alone(figure: Any) -> list[tuple[str, str]]:
    """Pairs of entries of a legend, or of lines in one panel, that differ in nothing but their colour."""
    found = []
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    for handles in [legend.legend_handles for legend in legends]:
        looks = [(handle.get_label(), _look(handle)) for handle in handles]
        found += [(one, two) for i, (one, look) in enumerate(looks) for two, other in looks[:i] if look == other]
    return found


def _look(handle: Any) -> tuple[Any, ...]:
    return (handle.get_marker(), handle.get_linestyle(), handle.get_linewidth(), handle.get_markersize())


def without_words(figure: Any) -> list[str]:
    """What has no words: the figure's title, or an axis of which no axes that share it has a label."""
    wrong = [] if figure.get_suptitle() else ["title"]
    for axes in figure.axes:
        y = axes.get_shared_y_axes().get_siblings(axes)
        if not any(other.get_ylabel() for other in y) and axes.get_yticklabels()[0].get_text()[:1].isdigit():
            wrong.append("y axis")
        x = axes.get_shared_x_axes().get_siblings(axes)
        if not any(other.get_xlabel() for other in x) and not hasattr(axes, "_colorbar"):
            wrong.append("x axis")
    return wrong


def as_seen_without_green(colour: str) -> np.ndarray:
    """CIELAB of a colour as a deuteranope sees it (Machado, Oliveira and Fernandes 2009, severity 1)."""
    from matplotlib.colors import to_rgb

    srgb = np.array(to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    deuteranopia = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(np.array(deuteranopia) @ linear, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_neighbouring_colours_differ_to_a_deuteranope():
    seen = [as_seen_without_green(colour) for colour in COLOURS]
    # 2.3 is a just noticeable difference; the palette has ten times that.
    assert all(np.linalg.norm(one - other) > 25 for one, other in zip(seen, [*seen[1:], seen[0]], strict=True))
    # The first three, which most figures use alone, in any pair.
    assert min(np.linalg.norm(one - other) for i, one in enumerate(seen[:3]) for other in seen[:i]) > 40
    # A check that can fail: red and green as printers have them.
    assert np.linalg.norm(as_seen_without_green("#009E73") - as_seen_without_green("#CC79A7")) < 25


def test_every_method_has_a_look_of_its_own():
    from approxkmv.figures.sweep_table import METHODS, looks

    frame = pd.DataFrame({"method": [*METHODS, "new"], "kind": "approximate"})
    found = list(looks(frame).values())
    # By shape alone: points that no line joins have nothing else.
    assert len({look["marker"] for look in found}) == len(found) == len(METHODS) + 1
    seen = [as_seen_without_green(look["color"]) for look in found]
    assert all(np.linalg.norm(one - other) > 25 for one, other in itertools.pairwise(seen))
    # A table with fewer methods draws them as one with all does.
    assert looks(frame[frame["method"] == "knn"])["knn"] == looks(frame)["knn"]


@pytest.mark.slow
def test_the_mask_and_what_is_not_in_the_kernel_stand_in_every_figure_of_a_model(tmp_path, figures):
    mask = f"{OWN_MASK}: windows of 512 and 1,024 keys in 25 of 30 layers"
    left_out = ["the logits' cap of 50 in 30 of 30 layers", "the learned sink in 30 of 30 layers"]
    for study, model, kind in (("embedded", MODELS[0], "overview"), ("embedded", MODELS[1], "overview")):
        shutil.copytree(REFERENCE / study / "tables", tmp_path / model)
        path = tmp_path / model / f"{kind}_{model}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mask": mask, "left_out": left_out}))
    shutil.copytree(REFERENCE / "lengths" / "tables", tmp_path / "lengths")
    path = tmp_path / "lengths" / f"lengths_{MODELS[1]}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask": mask, "left_out": left_out}))
    for study, name, models in OF_THE_REFERENCE:
        if not models:
            continue
        folder = "lengths" if study == "lengths" else models[-1]
        catalogue.draw(name, tmp_path / folder, models, tmp_path / name)
        figure = figures.pop()
        found = drawn_texts(figure)
        assert misplaced_texts(figure, found) == []
        words = " ".join(" ".join(word for word, _ in found).split())
        assert "not in K: the logits' cap of 50 in 30 of 30 layers, the learned sink in 30 of 30 layers" in words
        # MiniLM has no masked columns.
        assert ("windows of 512 and 1,024 keys" in words) == (models[-1] == MODELS[1])


def test_what_evaluates_every_pair_wins_nothing_in_a_title():
    """The oracle beats exact attention with few queries, and computes every score."""
    from approxkmv.figures.speedup import finding
    from approxkmv.figures.sweep_table import contenders, read_sweep, uncounted

    table = read_sweep(REFERENCE / "few" / "tables" / "sweep.csv")
    oracle = table[(table["method"] == "top-k") & (table["times_faster"] > 1)]
    assert len(oracle)
    assert contenders(oracle).empty
    assert "top-k" not in finding(table)
    assert uncounted(oracle.assign(times_faster=1.01)) == "; not counted where every score is computed: top-k"
    assert not uncounted(oracle.assign(times_faster=1.0))
    able = contenders(table)
    pairs = table["batch"] * table["n"] * table["queries"].fillna(table["n"])
    assert contenders(able.assign(kernel_evaluations=pairs)).empty
    assert len(contenders(able)) == len(able) > 0
    # All pairs of one are half of those of two.
    assert len(contenders(able.assign(kernel_evaluations=pairs, batch=2 * able["batch"]))) == len(able)
    seen = able["batch"] * able["n"] * (able["n"] + 1) // 2
    masked = able.assign(mask="causal", queries=np.nan, kernel_evaluations=seen)
    assert contenders(masked).empty
    assert len(contenders(masked.assign(mask="none"))) == len(able)
    # What evaluates some pairs twice is told by its error.
    assert contenders(able.assign(error_exact_p95=1e-6)).empty


@pytest.mark.parametrize(
    ("name", "models", "said"),
    [
        ("growth", ["a", "b"], "shows one model: give --model once"),
        ("context_scaling", [], "shows models: give --model at least once"),
        ("speedup", ["a"], "shows no model: leave out --model"),
    ],
)
def test_a_figure_takes_the_models_that_it_shows(tmp_path, name, models, said):
    with pytest.raises(ConfigError, match=f"the figure {name} {said}"):
        catalogue.draw(name, REFERENCE / "embedded" / "tables", models, tmp_path / "x")


def test_a_title_names_all_that_win_on_as_many_workloads_and_no_cell_is_empty(tmp_path, figures):
    table = pd.read_csv(REFERENCE / "columns" / "tables" / "sweep.csv")
    # Two methods that win on equally many workloads
    twin = table[table["method"] == "local-expansion"].assign(method="approxkmv")
    pd.concat([table[table["method"] != "approxkmv"], twin]).to_csv(tmp_path / "sweep.csv", index=False)
    catalogue.draw("crossover", tmp_path, [], tmp_path / "x")
    title = " ".join(figures[0].get_suptitle().split())
    assert "approxkmv and local-expansion become faster than exact attention on " in title
    catalogue.draw("crossover", REFERENCE / "figure5" / "tables", [], tmp_path / "x")
    catalogue.draw("crossover", REFERENCE / "few" / "tables", [], tmp_path / "x")
    for figure in figures:
        cells = [text.get_text() for text in figure.axes[0].texts]
        assert len(cells) == len(figure.axes[0].get_xticks()) * len(figure.axes[0].get_yticks())
        assert all(cells)
        assert "nan" not in cells
    # What computes every score reaches the error, and does not miss it.
    words = " ".join(" ".join(word for word, _ in drawn_texts(figures[2])).split())
    assert "every pair: reached by computing every score" in words


@pytest.mark.parametrize(
    ("column", "value", "said"), [("error_v_p95", 1.0, "missed"), ("seconds_q3", 1e3, "as fast"), ("", 0, "≤")]
)
def test_what_misses_the_error_or_is_within_the_noise_at_the_longest_n_overtakes_nothing(
    tmp_path, figures, column, value, said
):
    table = pd.read_csv(REFERENCE / "figure5" / "tables" / "sweep.csv")
    last = (table["method"] == "local-expansion") & (table["n"] == table["n"].max())
    assert last.any()
    if column:
        table.loc[last, column] = value
    table.to_csv(tmp_path / "sweep.csv", index=False)
    catalogue.draw("crossover", tmp_path, [], tmp_path / "x")
    axes = figures[0].axes[0]
    row = [label.get_text() for label in axes.get_yticklabels()].index("local-expansion")
    (cell,) = [text.get_text() for text in axes.texts if text.get_position() == (0, row)]
    assert cell.startswith(said)


@pytest.mark.parametrize("study", ["rows", "few", "columns"])
def test_two_figures_of_a_sweep_name_the_same_winner_on_as_many_workloads(study):
    """By the rows that are tuned to the error of the title, in both."""
    titles = [Image.open(REFERENCE / study / "figures" / f"{name}.png").text["Title"] for name in WINNERS]
    found = [re.search(pattern, title) for pattern, title in zip(WINNERS.values(), titles, strict=True)]
    assert found[0].groups() == found[1].groups()


def made_sweep(folder: Path) -> None:
    """Workloads where exact attention takes n / 1000 seconds and methods so many times less.

    On a, `approxkmv` misses the error at the longest n; `hnsw` is the fastest there but within the noise on b and c.
    """
    from approxkmv.sweep.table import COLUMNS

    rows = []

    def add(workload: str, n: int, method: str, kind: str, gain: float, error: float, **more: Any) -> None:
        seconds = n / 1000 / gain
        row = {"workload": workload, "n": n, "batch": 1, "columns": "all", "device": "cpu", "dtype": "float32"}
        row |= {"mask": "none", "queries": n, "method": method, "kind": kind, "status": "ok", "parameters": f"{gain}"}
        row |= {"seconds_q1": seconds * 0.9, "seconds": seconds, "seconds_q3": seconds * 1.2, "recomputed_share": 0.0}
        row |= {"kernel_evaluations": n, "relative_to": "answer" if kind != "exact" else None}
        row |= {"target": 0.1 if kind != "exact" else np.nan}
        row |= {f"error_exact_{name}": error * part for name, part in (("mean", 0.6), ("median", 0.5), ("p95", 1.0))}
        row |= {f"error_v_{name}": error for name in ("mean", "median", "p95")}
        rows.append(dict.fromkeys(COLUMNS) | row | more)

    gains = {"a": {1000: (0.5, 0.25), 2000: (2.0, 0.5), 4000: (9.0, 4.0)}}
    gains["b"] = {1000: (0.5, 0.5), 2000: (0.8, 2.0), 4000: (1.1, 3.0)}
    gains["c"] = {4000: (1.1, 0.5)}
    for workload, of in gains.items():
        for n, (graph, blocks) in of.items():
            add(workload, n, "exact-sdpa", "exact", 1.0, 1e-7)
            add(workload, n, "exact-naive", "exact", 0.4, 1e-7)
            add(workload, n, "hnsw", "approximate", graph, 0.08)
            add(workload, n, "clustered", "approximate", 50.0, 0.4, target=0.5)
            add(workload, n, "clustered", "approximate", blocks, 0.09)
            if workload != "c":
                add(workload, n, "approxkmv", "approximate", 20.0, 0.3 if (workload, n) == ("a", 4000) else 0.05)
        add(workload, 4000, "mean", "trivial", 100.0, 0.05 if workload == "b" else 0.7)
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(folder / "sweep.csv", index=False)


def panel(figure: Any, workload: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(workload))


def test_a_sweep_s_errors_and_times_are_those_of_the_longest_n_with_their_bars(tmp_path, figures):
    made_sweep(tmp_path)
    catalogue.draw("error_vs_time", tmp_path, [], tmp_path / "x")
    axes = panel(figures[0], "a")
    assert axes.get_title(loc="left") == "a, batch 1, all columns\nn = 4,000"
    found = series(axes)
    # Exact ones at the floor, and of two settings the fast one first.
    assert found["exact-sdpa"] == [[4.0, 1e-3]]
    assert found["hnsw"] == [[pytest.approx(4 / 9), pytest.approx(0.04)]]
    assert found["clustered"] == [[pytest.approx(0.08), pytest.approx(0.2)], [1.0, pytest.approx(0.045)]]
    # What misses its target is hollow, and no line goes through it.
    hollow = [line.get_xydata().tolist() for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [points for points in hollow if points] == [
        [[pytest.approx(0.2), pytest.approx(0.15)]],
        [[pytest.approx(0.04), pytest.approx(0.35)]],
    ]
    bars = {tuple(np.round(np.ravel(segment), 4)) for lines in axes.collections for segment in lines.get_segments()}
    times = [round(4 / 9 * part, 4) for part in (0.9, 1.2)]
    assert (times[0], 0.04, times[1], 0.04) in bars
    assert (round(4 / 9, 4), 0.04, round(4 / 9, 4), 0.08) in bars
    grey = {line.get_ydata()[0] for line in axes.lines if line.get_color() == "0.75"}
    assert grey == {0.1, 0.5}
    # On b approxkmv is the fastest of those within 0.1.
    assert title(figures[0]) == (
        "At an error of 0.1 of the answer, hnsw is the fastest approximate method, and faster than exact attention, on "
        "1 of 3 workloads"
    )


def test_a_sweep_s_lines_are_times_faster_and_the_paper_s_own_bands(tmp_path, figures):
    made_sweep(tmp_path)
    catalogue.draw("speedup", tmp_path, [], tmp_path / "x")
    axes = panel(figures[0], "a")
    lines = {line.get_marker(): line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) > 1}
    from approxkmv.figures.sweep_table import looks

    look = looks(pd.read_csv(tmp_path / "sweep.csv"))
    assert lines[look["hnsw"]["marker"]] == [[1000, 0.5], [2000, 2.0], [4000, 9.0]]
    assert lines[look["clustered"]["marker"]] == [[1000, 0.25], [2000, 0.5], [4000, 4.0]]
    np.testing.assert_allclose(lines[look["approxkmv"]["marker"]], [[1000, 20.0], [2000, 20.0], [4000, np.nan]])
    hollow = [line.get_xydata().tolist() for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [points for points in hollow if points] == [[[4000, 20.0]]]
    # By the first and third quartiles of both times
    paths = [path for of in axes.collections for path in of.get_paths()]
    band = {tuple(np.round(point, 4)) for path in paths for point in path.vertices}
    assert {(4000, round(9.0 * 0.9 / 1.2, 4)), (4000, round(9.0 * 1.2 / 0.9, 4))} <= band
    # mean misses the error on a, and is not there.
    names = {text.get_text(): tuple(text.xy) for text in axes.texts}
    assert names == {"hnsw": (4000, 9.0), "clustered": (4000, 4.0), "approxkmv": (4000, 20.0)}
    assert title(figures[0]) == (
        "Figure 5: at an error of 0.1 of the answer the best approximate method is faster than the fastest exact one "
        "on 2 of 3 workloads at the longest n, 9.0 to 20 times; it is hnsw on 1 of 3 workloads; a trivial method "
        "reaches the error too on 1 of 3 workloads, and is faster still on 1 of 3 workloads"
    )


def test_a_sweep_s_slower_lines_are_counted_and_a_slower_trivial_method_wins_nothing(tmp_path, figures, monkeypatch):
    from approxkmv.figures import speedup
    from approxkmv.figures.sweep_table import count_of, read_sweep

    made_sweep(tmp_path)
    monkeypatch.setattr(speedup, "MOST", 2)
    catalogue.draw("speedup", tmp_path, [], tmp_path / "x")
    names = {workload: {text.get_text() for text in panel(figures[0], workload).texts} for workload in "abc"}
    assert names == {"a": {"approxkmv", "hnsw"}, "b": {"mean", "approxkmv"}, "c": {"hnsw", "clustered"}}
    words = " ".join(" ".join(word for word, _ in drawn_texts(figures[0])).split())
    assert "at most 2 in a panel; 3 slower lines in the table only. " in words
    table = pd.read_csv(tmp_path / "sweep.csv")
    times = [name for name in table if name.startswith("seconds")]
    table.loc[table["method"] == "mean", times] *= 10
    table.to_csv(tmp_path / "sweep.csv", index=False)
    # Ten times as fast as exact attention, but approxkmv is twenty times.
    words = speedup.finding(read_sweep(tmp_path / "sweep.csv"))
    assert words.endswith("; a trivial method reaches the error too on 1 of 3 workloads")
    said = [count_of(*counts, "workload") for counts in ((1, 1), (0, 1), (2, 3))]
    assert said == ["the one workload", "not the one workload", "2 of 3 workloads"]


def test_a_gain_within_the_noise_hides_no_clear_one_from_a_title(tmp_path, figures):
    made_sweep(tmp_path)
    table = pd.read_csv(tmp_path / "sweep.csv")
    # The fastest on a, and now no more than that
    table.loc[table["workload"].eq("a") & table["method"].eq("hnsw"), "seconds_q3"] *= 20
    table.to_csv(tmp_path / "sweep.csv", index=False)
    for name in ("speedup", "error_vs_time"):
        catalogue.draw(name, tmp_path, [], tmp_path / name)
    assert (
        "an approximate method is clearly faster than the fastest exact one on 2 of 3 workloads at the longest n, "
        "4.0 to 20 times; the fastest such is clustered on 1 of 3"
    ) in title(figures[0])
    assert title(figures[1]).endswith(
        "clustered is the fastest approximate method that is clearly faster than exact attention, on 1 of 3 workloads"
    )


def test_a_sweep_s_crossings_are_between_the_lengths_where_times_cross(tmp_path, figures):
    made_sweep(tmp_path)
    catalogue.draw("crossover", tmp_path, [], tmp_path / "x")
    axes = figures[0].axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    found = {}
    for text in axes.texts:
        column, row = text.get_position()
        found[rows[int(row)], columns[int(column)]] = text.get_text()
    # hnsw from 0.5 to 2 is 1 half of the way, clustered from 0.5 to 4 a third of it.
    assert found == {
        ("approxkmv", "a"): "missed",
        ("approxkmv", "b"): "≤ 1,000",
        ("hnsw", "a"): f"{1000 * 2**0.5:,.0f}",
        ("hnsw", "b"): "as fast",
        ("clustered", "a"): f"{2000 * 2 ** (1 / 3):,.0f}",
        ("clustered", "b"): f"{1000 * 2**0.5:,.0f}",
        ("mean", "a"): "missed",
        ("mean", "b"): "≤ 4,000",
        ("approxkmv", "c"): "missed",
        ("hnsw", "c"): "as fast",
        ("clustered", "c"): "slower",
        ("mean", "c"): "missed",
    }
    assert title(figures[0]) == (
        "At an error of 0.1 of the answer, with n up to 4,000, clustered becomes faster than exact attention on 2 of 3 "
        "workloads, no other approximate method on as many"
    )


@pytest.mark.parametrize(
    ("ratios", "n", "how"),
    [
        ([0.25, 0.5, 1.0, 2.0], 4000, "measured"),
        ([2.0, 0.5, 2.0, 2.0], 2000 * 2**0.5, "measured"),
        ([2.0, 3.0, 4.0, 5.0], 1000, "below"),
        # The last three lengths rise, whatever the first did.
        ([0.9, 0.125, 0.25, 0.5], 16000, "extrapolated"),
        # As fast is not faster.
        ([0.5, 0.5, 0.5, 1.0], 4000 * 2 ** (4 / 3), "extrapolated"),
        ([0.5, 0.5, 0.5, 0.5], None, "never"),
        ([0.1, 0.100001, 0.100002, 0.100003], None, "never"),
        ([4.0, 2.0, 1.0, 0.5], None, "never"),
    ],
)
def test_where_ratios_cross(ratios, n, how):
    from approxkmv.figures.crossover import crossover

    found, said = crossover(np.array([1000, 2000, 4000, 8000]), np.array(ratios))
    assert said == how
    assert np.isnan(found) if n is None else found == pytest.approx(n)


WINNERS = {
    "speedup": r"it is (\S+) on (\d+ of \d+) workloads",
    "error_vs_time": r", (\S+) is the fastest approximate method, .* on (\d+ of \d+) workloads",
}


def test_a_sweep_without_the_usual_error_compares_at_the_nearest_that_was_asked_for(tmp_path):
    from approxkmv.figures.speedup import finding
    from approxkmv.figures.sweep_table import read_sweep, select

    frame = pd.read_csv(REFERENCE / "rows" / "tables" / "sweep.csv")
    files.write_csv(tmp_path / "sweep.csv", frame[frame["target"].isna() | (frame["target"] < 0.1)])
    assert finding(read_sweep(tmp_path / "sweep.csv")).startswith("at an error of 0.05 of the answer")
    # The smaller of two that are as near
    files.write_csv(tmp_path / "sweep.csv", frame.assign(target=frame["target"].replace(0.1, 0.15)))
    found = read_sweep(tmp_path / "sweep.csv")
    assert found.attrs["target"] == 0.05
    assert {*select(found, "approxkmv", 0.05)["target"]} == {0.05}


def test_a_title_says_where_a_trivial_method_reaches_the_error():
    from approxkmv.figures.speedup import finding
    from approxkmv.figures.sweep_table import read_sweep

    of_uniform = finding(read_sweep(REFERENCE / "causal-articles" / "tables" / "sweep.csv"))
    assert of_uniform.endswith("; a trivial method reaches the error too on 1 of 5 workloads")
    of_mean = finding(read_sweep(REFERENCE / "figure5" / "tables" / "sweep.csv"))
    assert of_mean.endswith("; a trivial method reaches the error too, and is faster still")
    assert "trivial" not in finding(read_sweep(REFERENCE / "causal-gemma" / "tables" / "sweep.csv"))


@pytest.mark.parametrize(
    ("study", "said"),
    [("causal-gemma", "bars: quartiles"), ("figure5", "bands: quartiles"), ("causal", "bands and bars: quartiles")],
)
def test_quartiles_are_named_as_they_are_drawn(study, said, tmp_path, figures):
    catalogue.draw("speedup", REFERENCE / study / "tables", [], tmp_path / "x")
    words = " ".join(" ".join(word for word, _ in drawn_texts(figures[0])).split())
    assert f"; {said} of the times" in words


def test_what_recomputes_its_rows_is_not_the_fastest_in_a_title(tmp_path, figures):
    table = pd.read_csv(REFERENCE / "figure5" / "tables" / "sweep.csv")
    methods = ["local-expansion", "exact-fused", "exact-sdpa-bf16"]
    for share, wins in ((0.0, True), (0.5, False)):
        table[table["method"].isin(methods)].assign(recomputed_share=share).to_csv(tmp_path / "sweep.csv", index=False)
        catalogue.draw("error_vs_time", tmp_path, [], tmp_path / "x")
        assert ("local-expansion is the fastest" in " ".join(figures[-1].get_suptitle().split())) is wins


def test_a_ratio_beyond_the_axis_is_marked_and_said(tmp_path, figures):
    catalogue.draw("readings", REFERENCE / "embedded" / "tables", MODELS[1:], tmp_path / "x")
    axes = figures[0].axes[0]
    (beyond,) = [line for line in axes.lines if not line.get_clip_on()]
    (entry,) = [line for line in axes.lines if line.get_label().startswith("unscaled")]
    assert (beyond.get_marker(), beyond.get_color()) == (entry.get_marker(), entry.get_color())
    assert entry.get_ydata()[0] > axes.get_ylim()[1]
    assert "points on the edge: beyond it" in figures[0].get_suptitle()


def test_the_reference_figures_are_all_figures():
    names = {*catalogue.PER_MODEL, *catalogue.PER_STUDY, *catalogue.PER_TABLE}
    assert {name for _, name, _ in [*OF_THE_REFERENCE, *OF_THE_SOFTMAX, *OF_FAMILIES]} == names


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0.0, "0"), (0.001, "<.01"), (0.0123, "0.01"), (0.456, "0.46"), (0.996, "1.0"), (1.0, "1.0"), (4.6, "4.6")],
        *[(9.94, "9.9"), (9.96, "10"), (89.1, "89"), (9999.0, "9999"), (12345.0, "1e4"), (1.79e308, "2e308")],
        *[(float("nan"), "–"), (float("inf"), "∞"), (float("-inf"), "-∞")],
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
    facts |= {"layers": layers, "heads": heads, "heads_within_bound": 1, "mask": CAUSAL, "left_out": []}
    (folder / f"overview_{model}.json").write_text(json.dumps(facts))


# Layers and heads.
SHAPES = [(1, 1), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((6, 12), (30, 9)))]


@pytest.mark.parametrize(("layers", "heads"), [*SHAPES, pytest.param(48, 40, marks=pytest.mark.slow)])
def test_any_grid_is_drawn_and_no_cell_text_leaves_its_cell(tmp_path, figures, layers, heads):
    tables(tmp_path, "m", layers, heads)
    for name in ("max_ratios", "order_ratios"):
        catalogue.draw(name, tmp_path, ["m"], tmp_path / name)
    for figure in figures:
        assert misplaced_texts(figure) == []
        grids = [axes for axes in figure.axes if len(axes.texts) == layers * heads]
        assert grids
        for axes in grids:
            cell = np.abs(axes.transData.transform((1, 1)) - axes.transData.transform((0, 0)))
            for text in axes.texts:
                box = text.get_window_extent(figure.canvas.get_renderer())
                assert box.width < cell[0]
                assert box.height < cell[1]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_scaling_of_any_number_of_models_is_drawn(tmp_path, figures, count):
    names = [f"m{i}" for i in range(count)]
    for i, name in enumerate(names):
        tables(tmp_path, name, 2, 3, bound=4.6 + i)
    catalogue.draw("context_scaling", tmp_path, names, tmp_path / "x")
    assert misplaced_texts(figures[0]) == []


def test_the_bound_is_within_the_axes_when_c_is_far_below_it(tmp_path, figures):
    tables(tmp_path, "m", 2, 3, bound=1000.0)
    catalogue.draw("context_scaling", tmp_path, ["m"], tmp_path / "x")
    top = figures[0].axes[0]
    (words,) = [text for text in top.texts if "bound" in text.get_text()]
    renderer = figures[0].canvas.get_renderer()
    assert top.get_window_extent(renderer).y1 >= words.get_window_extent(renderer).y1


@pytest.mark.slow
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
            f"{before}size": generator.choice(["small", "large", "undecided"], len(layer)),
            f"{before}trend": generator.choice(["flat", "grows", "undecided"], len(layer)),
            **{f"{before}{name}": value for name, value in (("texts", 8), ("length", 200), ("start", 100))},
        }
    for prefix, texts in ((50, 9), (100, 9), (200, 8), (400, 4)):
        part = {"layer": layer, "head": head, "prefix": prefix}
        for before in ("", "masked_") if masked else ("",):
            part[f"{before}texts"] = texts
            part[f"{before}adjusted_ratio"] = 0.1 * prefix ** growth[f"{before}exponent"]
        curves.append(pd.DataFrame(part))
    pd.DataFrame(growth).to_csv(folder / "growth_m.csv", index=False)
    pd.concat(curves).to_csv(folder / "growth_curves_m.csv", index=False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("layers", "heads"), SHAPES)
def test_growth_is_drawn_with_its_verdicts_and_nothing_overlapping(tmp_path, figures, layers, heads, masked):
    tables(tmp_path, "m", layers, heads)
    facts = json.loads((tmp_path / "overview_m.json").read_text()) | {"label": "all-MiniLM-L6-v2 (BERT, 6 × 12 heads)"}
    (tmp_path / "overview_m.json").write_text(json.dumps(facts))
    growth_tables(tmp_path, layers, heads, masked)
    for name in ("growth", "growth_curves"):
        catalogue.draw(name, tmp_path, ["m"], tmp_path / name)
    table = pd.read_csv(tmp_path / "growth_m.csv")
    prefixes = ("", "masked_")[: 1 + masked]
    panels = [axes for axes in figures[0].axes if axes.texts]
    for axes, before in zip(panels, prefixes, strict=True):
        # Each outline is black on white, dashed where the size is undecided.
        lines = [patch.get_linestyle() for patch in axes.patches if patch.get_edgecolor()[:3] == (0, 0, 0)]
        solid = [line for line in lines if line in ("-", "solid")]
        assert len(solid) == (table[f"{before}size"] == "large").sum()
        assert len(lines) - len(solid) == (table[f"{before}size"] == "undecided").sum()
        marks = [text.get_text()[0] for text in axes.texts]
        assert marks == table[f"{before}trend"].map({"grows": "↑", "flat": "→", "undecided": "?"}).tolist()
    # A length of four texts is hollow, the others are not.
    hollow = [line for axes in figures[1].axes for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert len(hollow) == sum(len(axes.get_legend().get_texts()) for axes in figures[1].axes)
    assert all(list(line.get_xdata()) == [400] for line in hollow)
    assert all("hollow: fewer than 5 texts" in axes.get_xlabel() for axes in figures[1].axes)
    for figure in figures:
        assert misplaced_texts(figure) == []


def title(figure: Any) -> str:
    return " ".join(figure.get_suptitle().split())


def test_one_length_and_one_head_are_no_range(tmp_path, figures):
    tables(tmp_path, "m", 1, 1)
    growth_tables(tmp_path, 1, 1, masked=False)
    path = tmp_path / "context_scaling_m.csv"
    pd.read_csv(path).assign(contexts=[9, 4, 1]).to_csv(path, index=False)
    for name in ("context_scaling", "growth_curves"):
        catalogue.draw(name, tmp_path, ["m"], tmp_path / "x")
    pd.read_csv(path).assign(contexts=[9, 5, 1]).to_csv(path, index=False)
    catalogue.draw("context_scaling", tmp_path, ["m"], tmp_path / "x")
    pd.read_csv(path).assign(contexts=[4, 4, 1]).to_csv(path, index=False)
    catalogue.draw("context_scaling", tmp_path, ["m"], tmp_path / "x")
    exponent = pd.read_csv(tmp_path / "growth_m.csv")["exponent"][0]
    largest = "Figure 4: the largest c over layers and heads"
    assert title(figures[0]).startswith(f"{largest} is 5.0 at 50 tokens (model m) Mean")
    assert title(figures[1]).startswith(f"model m: c(n) of typical heads goes as n to the power {exponent:.2f} One")
    assert title(figures[2]).startswith(f"{largest} goes from 5.0 at 50 tokens to 10 at 100 (model m) Mean")
    assert title(figures[3]).startswith(f"{largest} of too few texts to say Mean")


def test_titles_of_growth_say_where_texts_or_lengths_are_too_few_for_it(tmp_path, figures):
    tables(tmp_path, "m", 2, 3)
    growth_tables(tmp_path, 2, 3, masked=False)
    path = tmp_path / "growth_m.csv"
    words = dict.fromkeys(("size", "trend"), "undecided")
    pd.read_csv(path).assign(texts=4, start=0, exponent=np.nan, **words).to_csv(path, index=False)
    for name in ("growth", "growth_curves"):
        catalogue.draw(name, tmp_path, ["m"], tmp_path / name)
    for figure in figures:
        assert title(figure).startswith("model m: too few texts or lengths to tell how c(n) grows ")
        assert misplaced_texts(figure) == []


def test_a_title_of_many_models_counts_those_whose_c_is_larger_at_the_end(tmp_path, figures):
    for i, name in enumerate("abc"):
        tables(tmp_path, name, 2, 3)
        path = tmp_path / f"context_scaling_{name}.csv"
        pd.read_csv(path).assign(mean=[2.0 + i, 7.0 - 2 * i, 900.0]).to_csv(path, index=False)
    catalogue.draw("context_scaling", tmp_path, list("abc"), tmp_path / "x")
    assert title(figures[0]) == (
        "Figure 4: the largest c over layers and heads is larger at the longest prefix than at the shortest in 2 of 3 "
        "models 2.0 to 4.0 at the shortest prefix, 3.0 to 7.0 at the longest that 5 texts reach Mean and standard "
        "deviation over texts"
    )


def test_a_mean_c_of_nothing_is_on_the_axis_and_said(tmp_path, figures):
    tables(tmp_path, "m", 2, 3)
    path = tmp_path / "context_scaling_m.csv"
    pd.read_csv(path).assign(mean=[0.0, 1e-9, 0.5], std=0.0, min=0.0).to_csv(path, index=False)
    catalogue.draw("context_scaling", tmp_path, ["m"], tmp_path / "x")
    assert misplaced_texts(figures[0]) == []
    edge = [list(line.get_xdata()) for line in figures[0].axes[0].lines if not line.get_clip_on()]
    assert edge == [[50, 100]]
    assert title(figures[0]).endswith("; points on the axis: smaller c")
    assert 1e-5 < figures[0].axes[0].get_ylim()[0] < 1


def reading_tables(folder: Path) -> pd.DataFrame:
    """Of a model without a mask: c of nothing, both in the paper's range, one beyond it, and one of 0/0."""
    tables(folder, "m", 2, 3)
    table = pd.DataFrame({"reading": ["printed", "sigma", "unscaled", "float32"], "entries": "all", "heads": 6})
    table["texts"] = 1
    table = table.assign(largest_ratio=[4.7, 4.6, 0.0, 9.0], median_double=[3.0, 20.0, 1e9, np.nan])
    table = table.assign(heads_within_bound=[5, 6, 6, 2])
    table.to_csv(folder / "readings_m.csv", index=False)
    table.assign(power=[1.0, 0.5, 0.0, 0.25]).to_csv(folder / "readings_path_m.csv", index=False)
    return table


def test_readings_are_where_their_numbers_are_and_none_is_lost(tmp_path, figures):
    table = reading_tables(tmp_path)
    catalogue.draw("readings", tmp_path, ["m"], tmp_path / "x")
    axes = figures[0].axes[0]
    assert misplaced_texts(figures[0]) == []
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["printed (5 of 6)", "sigma (6 of 6)", "unscaled (6 of 6)", "float32 (2 of 6), ratio 0/0"]
    places = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.lines[1:5]}
    assert places[names[0]] == (4.7, 3.0)
    assert places[names[1]] == (4.6, 20.0)
    # On the edges at the left and above, since neither axis reaches as far.
    edges = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if not line.get_clip_on()]
    assert (axes.get_xlim()[0], axes.get_ylim()[1]) in edges
    assert title(figures[0]) == (
        "model m: the paper's numbers (c at most 4.6, the ratio at most 20) come out under sigma (every query with "
        "every key) Readings of the definition on 1 text; line: scales up to 1; hatched: the paper's numbers; points "
        "on the edge: beyond it"
    )
    # What the paper's numbers allow is hatched.
    (box,) = axes.patches
    assert (box.get_x() + box.get_width(), box.get_y() + box.get_height()) == pytest.approx((4.6, 20.0))
    masked = table.assign(texts=[3, 3, 4, 3], entries="masked", largest_ratio=[4.0, 5.0, 6.0, 7.0], median_double=9.0)
    pd.concat([masked, table]).to_csv(tmp_path / "readings_m.csv", index=False)
    catalogue.draw("readings", tmp_path, ["m"], tmp_path / "x")
    assert "on 1 to 4 texts; " in title(figures[1])
    assert f"come out under sigma (every query with every key); under printed ({CAUSAL}) R" in title(figures[1])
    drawn = [
        {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.lines} for axes in figures[1].axes
    ]
    assert [one["sigma (6 of 6)"] for one in drawn] == [(4.6, 20.0), (5.0, 9.0)]
    assert [len(axes.get_legend().get_texts()) for axes in figures[1].axes] == [4, 4]


def test_kernel_products_are_those_of_the_longest_n_and_the_title_has_the_largest_epsilon(tmp_path, figures):
    row = {"n": 2048, "seconds": 0.5, "error": 0.2}
    own = row | {"method": "KernelOperator"}
    rows = [
        *(
            row | {"x": x, "method": "exact, float32", "error": 1e-7, "times_best_exact": 1.0}
            for x in ("ones", "signs")
        ),
        own | {"x": "ones", "epsilon": 0.3, "times_best_exact": 7.0, "seconds": 0.1},
        own | {"x": "ones", "epsilon": 0.1, "times_best_exact": 2.0, "error": 0.05},
        own | {"x": "signs", "epsilon": 0.3, "times_best_exact": 3.0},
        own | {"x": "signs", "epsilon": 0.3, "times_best_exact": 99.0, "n": 1024},
        row | {"x": "ones", "method": "mean", "error": 0.4, "seconds": 0.0},
        row | {"x": "ones", "method": "zero", "error": 1.0, "seconds": 0.0},
    ]
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path / "operator.csv", index=False)
    catalogue.draw("operator", tmp_path, [], tmp_path / "x")
    wanted = "At the largest epsilon products after the first are 3 to 7 times as fast as the fastest exact one"
    assert title(figures[0]) == wanted
    assert misplaced_texts(figures[0]) == []
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["x = 1, n = 2,048", "x = ±1, n = 2,048"]
    lines = {line.get_label(): np.transpose(line.get_data()).tolist() for line in figures[0].axes[0].lines}
    assert lines["KernelOperator"] == [[0.5, 0.05], [0.1, 0.2]]
    assert lines["exact, float32"] == [[0.5, 1e-3]]
    assert [point[1] for point in lines["mean of the answer"]] == [0.4, 0.4]
    assert not any("zero" in name for name in lines)
    for name in ("epsilon", "times_best_exact"):
        table.drop(columns=name).to_csv(tmp_path / "operator.csv", index=False)
        with pytest.raises(TableError, match=name):
            catalogue.draw("operator", tmp_path, [], tmp_path / "x")


def attention_tables(folder: Path, layers: int, heads: int, masked: bool) -> None:
    generator = np.random.default_rng(3)
    layer, head = (index.ravel() for index in np.indices((layers, heads)))
    table = {"layer": layer, "head": head}
    for before in ("", "masked_") if masked else ("",):
        table |= {f"{before}support": 10 ** generator.uniform(0, 2.7, len(layer))}
        table |= {f"{before}first_mass": generator.uniform(0, 1, len(layer))}
    pd.DataFrame(table).to_csv(folder / "attention_m.csv", index=False)


@pytest.mark.parametrize("left_out", [[], ["the logits' cap of 50 in 30 of 30 layers"]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("layers", "heads"), SHAPES)
def test_rows_of_the_softmax_are_drawn_with_nothing_overlapping(tmp_path, figures, layers, heads, masked, left_out):
    tables(tmp_path, "m", layers, heads)
    facts = json.loads((tmp_path / "overview_m.json").read_text()) | {"label": "all-MiniLM-L6-v2 (BERT, 6 × 12 heads)"}
    (tmp_path / "overview_m.json").write_text(json.dumps(facts | {"mask": CAUSAL, "left_out": left_out}))
    attention_tables(tmp_path, layers, heads, masked)
    catalogue.draw("attention_support", tmp_path, ["m"], tmp_path / "x")
    assert len([axes for axes in figures[0].axes if axes.texts]) == (4 if masked else 2)
    found = drawn_texts(figures[0])
    assert misplaced_texts(figures[0], found) == []
    shown = " ".join(word for word, _ in found)
    assert ("the logits' cap of 50" in shown) == bool(left_out)
    assert ("what is named below" in shown.replace("\n", " ")) == (masked and bool(left_out))


def long_tables(folder: Path, masked: bool) -> None:
    generator = np.random.default_rng(2)
    index = pd.MultiIndex.from_product([[0, 1], [0, 1, 2], [64, 128, 256]], names=["layer", "head", "length"])
    table = index.to_frame(index=False)
    for before in ("", "masked_") if masked else ("",):
        for column, _ in length_scaling.PANELS:
            # One head far beyond the axes: it must not squeeze the others.
            table[f"{before}{column}"] = 10 ** generator.uniform(-5, 300, len(table))
    table.assign(texts=8).to_csv(folder / "length_scaling_m.csv", index=False)
    facts = {"label": "model m", "texts_used": 1, "corpus": "a corpus", "layers": 2, "heads": 3}
    facts |= {"mask": CAUSAL, "left_out": []}
    (folder / "lengths_m.json").write_text(json.dumps(facts))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_long_texts_are_drawn(tmp_path, masked):
    long_tables(tmp_path, masked)
    first = [path.read_bytes() for path in catalogue.draw("length_scaling", tmp_path, ["m"], tmp_path / "one")]
    assert first == [path.read_bytes() for path in catalogue.draw("length_scaling", tmp_path, ["m"], tmp_path / "two")]


@pytest.mark.parametrize("masked", [False, True])
def test_no_text_of_long_texts_lies_on_another(tmp_path, figures, masked):
    long_tables(tmp_path, masked)
    catalogue.draw("length_scaling", tmp_path, ["m"], tmp_path / "x")
    assert misplaced_texts(figures[0]) == []


MASK = f"{OWN_MASK}: windows of 512 keys"


def two_masks(folder: Path) -> dict[str, pd.DataFrame]:
    """Tables of 2 layers x 3 heads with both masks, all values different, rows in no order; their bound of c is 5."""
    generator = np.random.default_rng(4)
    columns = {
        "heads": {"max_ratio": 5.0, "median_next_ratio": 1.05, "median_double_ratio": 20.0},
        "attention": {"support": 50.0, "first_mass": 0.5},
        "growth": {"exponent": 0.5},
    }
    made = {}
    for kind, middles in columns.items():
        table = pd.MultiIndex.from_product([range(2), range(3)], names=["layer", "head"]).to_frame(index=False)
        for before, above in (("", 2), ("masked_", 4)):
            for name, middle in middles.items():
                # The bound itself, then so many above it.
                values = middle * np.r_[1.0, np.linspace(1.02, 1.9, above), np.linspace(0.96, 0.3, 5 - above)]
                table[f"{before}{name}"] = generator.permutation(np.maximum(values, 1.0) if "next" in name else values)
        made[kind] = table
    words = {"size": ["small", "large", "large", "undecided", "small", "large"]}
    words |= {"trend": ["flat", "grows", "flat", "grows", "grows", "undecided"]}
    words |= {"masked_size": ["small"] * 5 + ["large"], "masked_trend": ["grows"] * 4 + ["flat"] * 2}
    words |= {f"{before}{name}": n for before in ("", "masked_") for name, n in (("texts", 8), ("length", 1200))}
    made["growth"] = made["growth"].assign(**words, start=600, masked_start=600)
    for kind, table in made.items():
        table.sample(frac=1, random_state=0).to_csv(folder / f"{kind}_m.csv", index=False)
    facts = {"label": "model m", "texts_used": 9, "corpus": "a corpus", "paper_bound": 5.0, "layers": 2, "heads": 3}
    facts |= {"mask": MASK, "left_out": ["the learned sink in 2 of 2 layers"]}
    (folder / "overview_m.json").write_text(json.dumps(facts))
    return made


def cells(axes: Any) -> dict[tuple[int, int], str]:
    """What stands in each cell of a heat map, by layer and head."""
    return {(int(layer), int(head)): text.get_text() for text in axes.texts for head, layer in [text.get_position()]}


def outlined(axes: Any) -> set[tuple[int, int]]:
    """Layers and heads of the outlined cells."""
    return {(round(patch.get_y() + 0.43), round(patch.get_x() + 0.45)) for patch in axes.patches}


def written(table: pd.DataFrame, column: str, write: Any) -> dict[tuple[int, int], str]:
    return {(row["layer"], row["head"]): write(row[column]) for row in table.to_dict("records")}


@pytest.mark.parametrize("windows", ["512 keys in 5 of 6 layers", "1,024 and 8,192 keys in 20 of 24 layers"])
@pytest.mark.parametrize("name", ["max_ratios", "order_ratios", "attention_support", "growth"])
def test_a_mask_of_many_words_and_other_layers_lie_on_nothing(tmp_path, figures, name, windows):
    two_masks(tmp_path)
    others = f"18 layers without softmax attention (the model's layers {', '.join(map(str, range(3, 93, 4)))} and 95)"
    facts = json.loads((tmp_path / "overview_m.json").read_text()) | {"left_out": [others]}
    facts["mask"] = f"{OWN_MASK}: windows of {windows}"
    (tmp_path / "overview_m.json").write_text(json.dumps(facts))
    catalogue.draw(name, tmp_path, ["m"], tmp_path / "x")
    found = drawn_texts(figures[0])
    assert misplaced_texts(figures[0], found) == []
    assert "18 layers without softmax attention" in " ".join(word for word, _ in found)
    # They are no part of a row of the softmax.
    assert not [word for word, _ in found if "named below" in word]


def test_each_cell_has_the_number_of_its_head_and_titles_count_the_cells(tmp_path, figures):
    made = two_masks(tmp_path)
    heads, attention, growth = made["heads"], made["attention"], made["growth"]
    for name in ("max_ratios", "order_ratios", "attention_support", "growth"):
        catalogue.draw(name, tmp_path, ["m"], tmp_path / "x")
    panels = [[axes for axes in figure.axes if axes.texts] for figure in figures]
    every = "every query with every key"

    def above(column: str, bound: float, table: pd.DataFrame = heads) -> set[tuple[int, int]]:
        return {(row["layer"], row["head"]) for row in table.to_dict("records") if row[column] > bound}

    for axes, before, count in zip(panels[0], ("", "masked_"), (2, 4), strict=True):
        assert cells(axes) == written(heads, f"{before}max_ratio", near(5.0))
        assert outlined(axes) == above(f"{before}max_ratio", 5.0)
        assert axes.get_title(loc="left") == f"{MASK if before else every}: {count} heads above 5"
    worst = heads.loc[heads["max_ratio"].idxmax()]
    place = f"(layer {worst['layer']:.0f}, head {worst['head']:.0f})"
    assert title(figures[0]).startswith(f"model m: c exceeds 5 in 2 of 6 heads; the largest is 9.5 {place}")
    assert "over prefixes and 9 texts of a corpus; outlined: above the paper's bound 5" in title(figures[0])

    for axes, before, count in zip(panels[1], ("", "masked_"), (2, 4), strict=True):
        assert cells(axes) == written(heads, f"{before}median_double_ratio", up_to_the_scale)
        assert outlined(axes) == above(f"{before}median_double_ratio", 20.0)
        words = axes.get_title(loc="left").split("\n")
        assert words[0] == (MASK if before else every)
        assert [line.rpartition("$ is at most ")[2] for line in words[1:]] == [
            f"20 in {6 - count} heads",
            f"1.05 in {6 - count} heads",
        ]
    assert title(figures[1]).startswith("model m: $K_{(n)}\\,/\\,K_{(2n)}$ is at most 20 in 4 of 6 heads")

    for i, (before, column) in enumerate(itertools.product(("", "masked_"), ("support", "first_mass"))):
        assert cells(panels[2][i]) == written(attention, f"{before}{column}", short)
        over = f"{MASK}, and what is named below" if before else every
        what = "effective support" if column == "support" else "weight on the first token"
        assert panels[2][i].get_title(loc="left") == f"{what}\n{over}"
    middle = short(attention["support"].median())
    assert title(figures[2]).startswith(f"model m: a row of the median head attends to {middle} keys; the first token")
    assert "has more than half of the weight in 2 of 6 heads" in title(figures[2])

    marks = {"grows": "↑", "flat": "→", "undecided": "?"}
    for axes, before in zip(panels[3], ("", "masked_"), strict=True):
        shown = growth.assign(
            cell=growth[f"{before}trend"].map(marks) + growth[f"{before}exponent"].map("\u2009{:.2f}".format)
        )
        assert cells(axes) == written(shown, "cell", str)
        sizes = growth[f"{before}size"]
        chosen = growth[sizes != "small"]
        assert outlined(axes) == set(zip(chosen["layer"], chosen["head"], strict=True))
        counts = "size: small 5, large 1\ntrend: flat 2, grows 4"
        counts = counts if before else "size: small 2, large 3, undecided 1\ntrend: flat 2, grows 3, undecided 1"
        assert axes.get_title(loc="left") == f"{MASK if before else every}\n{counts}"
    assert title(figures[3]) == (
        "model m: c(n) grows in 3 of 6 heads and is above 5 in 1 of them, by 95 % intervals Exponent of c(n) from n/2 "
        "to n = 1,200 on 8 texts; → flat, ↑ grows, ? undecided; outlined: c(n) above 5 (dashed: undecided)"
    )


@pytest.mark.parametrize("linear", [False, True])
def test_numbers_stand_out_from_the_colour_of_their_cell(linear):
    from approxkmv.figures.heatmap import Scale, draw_heatmap

    figure = style.new_figure(20, 3)
    axes = figure.subplots()
    values = np.r_[np.geomspace(0.01, 1000.0, 60), np.nan].reshape(1, -1)
    draw_heatmap(figure, axes, values, Scale(0.05, 100.0, (0.1, 1, 10), "c", linear=linear))
    (image,) = axes.images
    assert len(axes.texts) == 60
    for text, colour in zip(axes.texts, image.to_rgba(image.get_array())[0, :60], strict=True):
        linear_rgb = np.where(colour[:3] <= 0.04045, colour[:3] / 12.92, ((colour[:3] + 0.055) / 1.055) ** 2.4)
        light = float(linear_rgb @ [0.2126, 0.7152, 0.0722]) + 0.05
        # WCAG's contrast of large letters, nearly
        assert (1.05 / light if text.get_color() == "white" else light / 0.05) > 2.9


def test_a_panel_of_neighbours_has_their_ratio_and_no_outline(tmp_path, figures):
    heads = two_masks(tmp_path)["heads"]
    heads = heads[[name for name in heads if "masked" not in name]].assign(
        median_next_ratio=[1.0, 1.05, 1.5, 12, 25, 1e9]
    )
    heads.to_csv(tmp_path / "heads_m.csv", index=False)
    catalogue.draw("order_ratios", tmp_path, ["m"], tmp_path / "x")
    axes = next(axes for axes in figures[0].axes if axes.texts)
    assert list(cells(axes).values()) == ["1.000", "1.050", "1.500", "12", "25", ">1,000"]
    assert not outlined(axes)
    assert axes.get_title(loc="left").endswith("$ is at most 1.05 in 2 heads")


def test_exponents_are_written_with_a_true_minus_and_the_colours_hold_all_but_a_few_of_them():
    from approxkmv.figures.growth import _limits, two_decimals

    assert [two_decimals(value) for value in (-0.451, -0.001, 0.725, 9.99, -12.3)] == [
        *("−0.45", "0.00", "0.72", "9.99", "−12"),
    ]
    assert _limits(np.r_[np.full(98, 0.3), -7.0, 9.0]) == (0.0, 1.0)
    assert _limits(np.r_[np.linspace(-0.9, 1.6, 99), np.nan]) == (-1.0, 2.0)
    assert _limits(np.full(3, np.nan)) == (0.0, 1.0)


def series(axes: Any) -> dict[str, list[list[float]]]:
    """Points of the lines of axes that a legend names."""
    return {
        line.get_label(): np.transpose(line.get_data()).tolist() for line in axes.lines if line.get_label()[0] != "_"
    }


def test_curves_are_those_of_their_heads_and_lines_go_through_the_middle_of_the_octave(tmp_path, figures):
    made = two_masks(tmp_path)
    growth = made["growth"]
    along = pd.MultiIndex.from_product([range(2), range(3), [300, 600, 1200]], names=["layer", "head", "prefix"])
    curves = along.to_frame(index=False).assign(texts=8, masked_texts=8)
    generator = np.random.default_rng(6)
    for before in ("", "masked_"):
        curves[f"{before}adjusted_ratio"] = generator.uniform(0.5, 20.0, len(curves))
    curves.sample(frac=1, random_state=0).sort_values("prefix", kind="stable").to_csv(
        tmp_path / "growth_curves_m.csv", index=False
    )
    catalogue.draw("growth_curves", tmp_path, ["m"], tmp_path / "x")
    exponents = []
    for axes, before in zip(figures[0].axes, ("", "masked_"), strict=True):
        # Of each size and trend the head in the middle of its exponents, the upper of two.
        chosen = {}
        for row in growth.sort_values(f"{before}exponent").to_dict("records"):
            chosen.setdefault((row[f"{before}size"], row[f"{before}trend"]), []).append(row)
        chosen = [rows[len(rows) // 2] for _, rows in sorted(chosen.items())]
        expected = {}
        for row in chosen:
            exponent = row[f"{before}exponent"]
            exponents.append(exponent)
            own = curves[(curves["layer"] == row["layer"]) & (curves["head"] == row["head"])].set_index("prefix")
            name = f"layer {row['layer']}, head {row['head']}: {row[f'{before}size']}, {row[f'{before}trend']}, "
            c = own[f"{before}adjusted_ratio"]
            expected[f"{name}exponent {exponent:.2f}"] = [[float(n), c[n]] for n in (300, 600, 1200)]
            middle = np.sqrt(c[600] * c[1200])
            ends = [middle / 2 ** (exponent / 2), middle * 2 ** (exponent / 2)]
            assert any(
                np.allclose(line.get_ydata(), ends) for line in axes.lines if list(line.get_xdata()) == [600, 1200]
            )
        assert {name: np.array(points).tolist() for name, points in series(axes).items()} == expected
        assert axes.get_title(loc="left") == f"{MASK if before else 'every query with every key'} (dotted: c = 5)"
    ends = f"{min(exponents):.2f} to {max(exponents):.2f}"
    assert title(figures[0]).startswith(
        f"model m: c(n) of typical heads goes as n to the power {ends} One head of each"
    )


def test_lines_of_long_texts_are_quantiles_over_heads_of_what_their_axis_names(tmp_path, figures):
    long_tables(tmp_path, masked=True)
    table = pd.read_csv(tmp_path / "length_scaling_m.csv")
    generator = np.random.default_rng(7)
    columns = {"c(n) of K": "ratio", "c(n) of the softmax matrix": "softmax_ratio"}
    columns |= {"$K_{(n)}\\,/\\,K_{(2n)}$": "double_ratio", "keys that hold 90 % of a row's mass": "keys_90_mean"}
    for before, name in itertools.product(("", "masked_"), columns.values()):
        table[f"{before}{name}"] = generator.uniform(1.5, 40.0, len(table))
    texts = table["length"].map({64: 8, 128: 5, 256: 4})
    table.assign(texts=texts).sample(frac=1, random_state=0).to_csv(tmp_path / "length_scaling_m.csv", index=False)
    facts = json.loads((tmp_path / "lengths_m.json").read_text()) | {"texts_used": 8}
    (tmp_path / "lengths_m.json").write_text(json.dumps(facts))
    catalogue.draw("length_scaling", tmp_path, ["m"], tmp_path / "x")
    shares = {"median head": 0.5, "90th percentile of heads": 0.9, "largest head": 1.0}
    for axes in figures[0].axes[:4]:
        expected = {}
        for before, (name, share) in itertools.product(("", "masked_"), shares.items()):
            of = table.groupby("length")[f"{before}{columns[axes.get_ylabel()]}"].quantile(share)
            expected[name + f", {CAUSAL}" * bool(before)] = [[64, of[64]], [128, of[128]], [256, np.nan]]
        found = series(axes)
        assert found.keys() == expected.keys()
        for name, points in expected.items():
            np.testing.assert_allclose(found[name], points)
    c = table.groupby("length")["ratio"]
    # 256 is what too few texts reach.
    ends = [f"{short(of[64])} to {short(of[128])}" for of in (c.median(), c.max())]
    assert title(figures[0]) == (
        f"model m: from n = 64 to 128 c(n) goes from {ends[0]} in the median head, from {ends[1]} in the largest "
        "6 heads on 8 long texts (medians) of a corpus"
    )
    table[table["length"] == 64].assign(texts=3).to_csv(tmp_path / "length_scaling_m.csv", index=False)
    catalogue.draw("length_scaling", tmp_path, ["m"], tmp_path / "x")
    ends = [short(value) for value in (c.median()[64], c.max()[64])]
    assert title(figures[1]).startswith(
        f"model m: at n = 64 c(n) is {ends[0]} in the median head, {ends[1]} in the largest 6 heads"
    )


@pytest.mark.parametrize("entries", ["all", "causal"])
def test_the_gauge_shows_quantiles_over_heads_at_each_t_and_counts_the_heads_that_bear_enough(
    tmp_path, figures, entries
):
    tables(tmp_path, "m", 2, 3, bound=5.0)
    along = pd.MultiIndex.from_product([range(2), range(3), [0.0, 0.5, 1.0, 2.0]], names=["layer", "head", "t"])
    table = along.to_frame(index=False).assign(tokens=1000, entries=entries)
    generator = np.random.default_rng(8)
    for name in ("ratio", "participation", "log10_largest_row", "log10_norm"):
        table[name] = generator.uniform(1.0, 90.0, len(table))
    # An error of 1000^-0.055 is needed: two heads of six bear it at some t.
    table["log10_bound"] = -0.166 - generator.uniform(0.0, 9.0, len(table))
    table.loc[[2, 13], "log10_bound"] = -0.164
    table.loc[table["t"] == 0, ["log10_largest_row", "log10_norm", "log10_bound"]] = np.nan
    table.sample(frac=1, random_state=0).to_csv(tmp_path / "gauge_m.csv", index=False)
    catalogue.draw("gauge", tmp_path, ["m"], tmp_path / "x")
    shares = {"median head": 0.5, "90th percentile of heads": 0.9, "largest head": 1.0}
    for axes, column in zip(figures[0].axes, ("ratio", "participation", "log10_norm", "log10_bound"), strict=True):
        of = {name: table.groupby("t")[column].quantile(share) for name, share in shares.items()}
        assert series(axes).keys() == of.keys()
        for name, points in series(axes).items():
            np.testing.assert_allclose(points, [[t, of[name][t]] for t in (0.5, 1.0, 2.0)])
        # The limit stands apart, where there is one.
        limits = sorted(line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0.25])
        assert limits == pytest.approx(sorted(values[0.0] for values in of.values()) if "log10" not in column else [])
        dotted = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        needed = {"ratio": [5.0], "log10_bound": [-0.165]}
        assert dotted == pytest.approx(needed.get(column, []))
    over = "all entries" if entries == "all" else CAUSAL
    assert title(figures[0]).startswith(
        "model m: 2 of 6 heads have a t at which attention tolerates the error that a cost below n² needs One text of "
        f"1,000 tokens, {over}; dotted: c = 5 and the error needed; "
    )


def test_the_scaling_shows_the_means_their_deviations_and_the_texts(tmp_path, figures):
    tables(tmp_path, "m", 2, 3, bound=5.0)
    table = pd.DataFrame({"prefix": [50, 100, 200, 400], "contexts": [9, 8, 5, 4], "mean": [2.0, 3.0, 5.0, 8.0]})
    table = table.assign(std=[0.5, 2.0, 1.0, 1.0], min=[1.0, 2.5, 3.0, 4.0], max=30.0)
    for name in ("mean", "std", "min", "max"):
        table[f"masked_{name}"] = table[name] / 4
    table.to_csv(tmp_path / "context_scaling_m.csv", index=False)
    catalogue.draw("context_scaling", tmp_path, ["m"], tmp_path / "x")
    top, bottom = figures[0].axes[:2]
    assert series(top)["model m"][:3] == [[50, 2.0], [100, 3.0], [200, 5.0]]
    dashed = [
        list(line.get_ydata())[:3] for line in top.lines if line.get_linestyle() == "--" and len(line.get_xdata())
    ]
    assert dashed == [[0.5, 0.75, 1.25]]
    assert list(bottom.lines[0].get_ydata()) == [9, 8, 5, 4]
    # A band is no wider than the texts: below 2.5 there is none at 100.
    band = {tuple(point) for point in top.collections[0].get_paths()[0].vertices.tolist()}
    assert {(50, 1.5), (50, 2.5), (100, 2.5), (100, 5.0), (200, 4.0), (400, 9.0)} <= band
    (words,) = [text.get_text() for text in top.texts if "bound" in text.get_text()]
    assert words == "the paper's bound 5"
    names = {text.get_text(): text.xy for text in top.texts if "bound" not in text.get_text()}
    assert names == {"model m": (400, 8.0), "model m, masked": (400, 2.0)}
    assert bottom.get_xlabel() == "prefix length i in tokens (hollow: fewer than 5 texts)"
    table.assign(contexts=5).to_csv(tmp_path / "context_scaling_m.csv", index=False)
    catalogue.draw("context_scaling", tmp_path, ["m"], tmp_path / "x")
    assert figures.pop().axes[1].get_xlabel() == "prefix length i in tokens"
    tables(tmp_path, "n", 2, 3, bound=4.6)
    catalogue.draw("context_scaling", tmp_path, ["m", "n"], tmp_path / "x")
    (words,) = [text.get_text() for text in figures[1].axes[0].texts if "bound" in text.get_text()]
    assert words == "the paper's bounds 4.6 to 5"


LABELS = ["$x_1$ at $5", "one $ alone", r"a \$ and a \ too", "_underscore", "{braces} %s &amp; <b>x</b>", "Модель ελ 1"]


def draw_all(folder: Path, label: str) -> None:
    """Draw every figure of models, of which the tables say this label and corpus."""
    tables(folder, "m", 2, 3)
    growth_tables(folder, 2, 3, masked=False)
    facts = json.loads((folder / "overview_m.json").read_text()) | {"label": label, "corpus": label}
    (folder / "overview_m.json").write_text(json.dumps(facts))
    long_tables(folder, masked=False)
    (folder / "lengths_m.json").write_text(json.dumps(facts | {"texts_used": 1}))
    attention_tables(folder, 2, 3, masked=False)
    every = ("max_ratios", "order_ratios", "growth", "growth_curves", "attention_support", "context_scaling")
    for name in (*every, "length_scaling"):
        catalogue.draw(name, folder, ["m"], folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("label", LABELS)
def test_a_label_is_drawn_as_it_is_written_and_is_no_mathematics(tmp_path, figures, label, caplog):
    from matplotlib.text import Text

    with caplog.at_level("INFO", logger="approxkmv"):
        draw_all(tmp_path, label)
    assert len(figures) == 7
    for figure in figures:
        shown = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]
        # Beside mathematics of the figure's own the dollars of a label are escaped until they are drawn.
        assert any(label in (words.replace(r"\$", "$") if math else words) for words, math in shown)
        assert not [words for words, math in shown if math and words.count("$") - words.count(r"\$") > 4]
        assert misplaced_texts(figure) == []
    assert not caplog.messages


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("label", ["W" * 60, "MIXTURE-OF-EXPERTS " * 3, r"$" * 60, "模" * 60])
def test_wide_letters_leave_no_figure(tmp_path, figures, label):
    draw_all(tmp_path, label)
    assert [line for figure in figures for line in misplaced_texts(figure)] == []
    # The axes keep their room beside a long name.
    scaling = next(figure for figure in figures if figure.get_suptitle().startswith("Figure 4"))
    assert scaling.axes[0].get_window_extent().width > 0.4 * scaling.bbox.width


def test_a_long_name_is_its_beginning_and_its_end():
    assert [style.abridged("abcdefgh", most) for most in (8, 7, 6)] == ["abcdefgh", "abc…fgh", "abc…gh"]


@pytest.mark.slow
def test_characters_that_the_font_does_not_have_are_named(tmp_path, caplog, recwarn):
    tables(tmp_path, "m", 2, 3)
    facts = json.loads((tmp_path / "overview_m.json").read_text()) | {"label": "模型 at $5\ue000"}
    (tmp_path / "overview_m.json").write_text(json.dumps(facts))
    with caplog.at_level("INFO", logger="approxkmv"):
        catalogue.draw("max_ratios", tmp_path, ["m"], tmp_path / "max_ratios")
    assert [message.split()[:2] for message in caplog.messages] == [["max_ratios:", "型"]]
    assert "模 U+E000 drawn as boxes" in caplog.text
    # What a file says of itself is no text of a figure, in which a dollar would begin mathematics.
    with Image.open(tmp_path / "max_ratios.png") as image:
        assert image.info["Title"].startswith("模型 at $5\ue000: c exceeds")

    figure = style.new_figure(4, 3)
    style.label_ends(figure, [(figure.add_subplot(), [(0.5, 0.5, "模型", "k")])])
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_cell_near_the_bound_says_on_which_side_it_is():
    assert [near(4.6)(value) for value in (4.5, 4.58, 4.62, 57.8, 0.001)] == ["4.50", "4.58", "4.62", "58", "<.01"]
    # 4.60 alone would be the bound.
    assert [near(4.6)(value) for value in (4.6, 4.604, 4.60004, 4.599)] == ["4.60", "4.604", "4.60", "4.60"]
    assert [near(4.6)(value) for value in (float("nan"), float("inf"))] == ["–", "∞"]
    assert [up_to_the_scale(value) for value in (1.92, 20.3, 1e9)] == ["1.9", "20.30", ">1,000"]


def test_points_on_an_edge_are_hollow_where_few_texts_are_behind_them():
    figure = style.new_figure(3, 3)
    axes = figure.subplots()
    axes.set_ylim(1, 10)
    x, y, solid = np.arange(4), np.array([0.5, 0.2, 5.0, 20.0]), np.array([True, False, True, False])
    assert style.mark_beyond(axes, x, y, solid, color="red", marker="o")
    drawn = {(*line.get_xdata(), *line.get_ydata()): line.get_markerfacecolor() for line in axes.get_lines()}
    assert drawn == {(0, 0.0): "red", (1, 0.0): "white", (3, 1.0): "white"}
