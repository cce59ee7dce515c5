"""Scripts of benchmarks/ from their command line down, on small inputs: what they write is right.

Columns, settings and names are those of the committed reference tables; so are numbers where the inputs are the same.
"""

from __future__ import annotations

import importlib
import json
import lzma
import math
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pipeline.small_project import save_model
from unit.models_support import write_gguf

from approxkmv import attention_statistics, reduce_attention
from approxkmv.files import file_sha256
from approxkmv.kmv.density import ExactDensity
from approxkmv.kmv.spectral_attention import density_levels, spectral_attention
from approxkmv.models import CapturableModel, ModelLocation
from approxkmv.provenance import processor
from approxkmv.search.doubling_dimension import doubling_dimension
from approxkmv.search.indexes import HNSWIndex
from approxkmv.search.vamana import build, build_exhaustively
from approxkmv.statistics import head_statistics
from approxkmv.sweep.word_vectors import word_vectors

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "results" / "reference"


@pytest.fixture
def run(monkeypatch, tmp_path, one_thread):
    """Runs the main of a script in an empty folder, some constants changed: its table, the reference's and settings."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    monkeypatch.chdir(tmp_path)

    def made(script, known, constants, name=None, threads=2):
        module = importlib.import_module(script)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / f"{script}.py")])
        # Two as for the reference tables; scripts that time one thread set it.
        torch.set_num_threads(threads)
        module.main()
        out, known = tmp_path / "results" / "benchmarks" / f"{name or script}.csv", REFERENCE / known
        record, of_the_known = (json.loads(path.with_suffix(".json").read_text()) for path in (out, known))
        assert record["command"] == f"python benchmarks/{script}.py"
        assert (record["machine"]["processor"], record["versions"]["torch"]) == (processor(), version("torch"))
        assert record["machine"]["threads"] == min(threads, of_the_known["machine"]["threads"])
        assert record.keys() == of_the_known.keys()
        assert record["settings"].keys() == of_the_known["settings"].keys()
        table, right = pd.read_csv(out), pd.read_csv(known)
        assert list(table.columns) == list(right.columns)
        return table, right, record["settings"]

    return made


def test_a_script_writes_where_it_is_told_to(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from writing import out_of

    monkeypatch.setattr(sys, "argv", ["one.py", "--out", str(tmp_path / "other.csv")])
    assert out_of("What it does: how", "one") == tmp_path / "other.csv"


def test_the_constants_of_the_scripts_are_those_of_the_reference_tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import attention_statistics
    import density
    import exact_peers
    import graph_search
    import statistics_speed

    def known(name):
        path = REFERENCE / f"{name}.csv"
        return pd.read_csv(path), json.loads(path.with_suffix(".json").read_text())["settings"]

    table, settings = known("benchmarks/density")
    assert (settings["points"], settings["sigma"]) == (density.POINTS, density.SIGMA)
    assert settings["repeats"] == density.REPEATS
    assert tuple(table["queries"].unique()) == density.QUERIES
    asked = table["method"].str.extract(r"epsilon (\S+)")[0].dropna().unique()
    assert tuple(map(float, asked)) == density.EPSILONS
    table, settings = known("graph_search/graph_search")
    heads, sizes = [list(head) for head in graph_search.HEADS], (graph_search.NEAR, graph_search.BREADTH)
    assert (settings["heads"], settings["alphas"]) == (heads, graph_search.ALPHAS)
    assert (settings["n"], settings["near"], settings["breadth"]) == (graph_search.N, *sizes)
    table, settings = known("benchmarks/statistics")
    assert (settings["rounds"], settings["heads"]) == (statistics_speed.ROUNDS, statistics_speed.AT_ONCE)
    assert set(table[["n", "d"]].iloc[:-1].itertuples(index=False, name=None)) == set(statistics_speed.SIZES)
    assert f" contexts x {statistics_speed.N_HEADS} heads" in table["what"].iloc[-1]
    table, settings = known("benchmarks/attention_statistics")
    assert settings["rounds"] == attention_statistics.ROUNDS
    assert tuple(table["n"].unique()) == (*attention_statistics.LENGTHS, attention_statistics.WHOLE)
    table, settings = known("benchmarks/exact_peers")
    assert (settings["rounds"], settings["d"]) == (exact_peers.ROUNDS, exact_peers.D)
    assert tuple(table["n"].unique()) == exact_peers.LENGTHS
    told = {*table["what"], *(name.split(", n = ")[0] for name in settings["left_out"])}
    assert told == set(exact_peers.PEERS)


@pytest.mark.slow
def test_spectral_errors_are_those_of_the_reference_and_below_their_bound(run):
    table, right, settings = run(
        "spectral_error",
        "benchmarks/spectral_error.csv",
        {"DENSITIES": {"exact": lambda seed: ExactDensity(1.0)}, "SAMPLES": (32, 128)},
        threads=1,
    )
    right = right[(right["densities"] == "exact") & (right["samples"] <= 128)].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, right, rtol=1e-9)
    assert settings == {"n": 512, "d_v": 16, "seeds": 5}
    words = np.random.default_rng(0).permutation(word_vectors(None)[:4096]).astype(np.float64)
    q, k, v = (torch.from_numpy(words[512 * part : 512 * (part + 1)]) for part in range(3))
    for name, scale in (("1/sqrt(d)", 0.1), ("1/sqrt(10)", 10**-0.5)):
        sizes = [torch.linalg.svdvals(matrix) for matrix in ((scale * q @ k.T).softmax(1), v[:, :16])]
        ranks = [float(size.square().sum() / size[0] ** 2) for size in sizes]
        bounds = table.loc[table["scale"] == name, "bound"]
        assert bounds.tolist() == pytest.approx([math.sqrt(math.prod(ranks) / m) for m in (32, 128)])


def test_spectral_errors_with_estimated_densities_are_means_over_seeds(run):
    n, seeds = 48, range(2)
    small = {"N": n, "SAMPLES": (32,), "SEEDS": seeds}
    table, right, settings = run("spectral_error", "benchmarks/spectral_error.csv", small, threads=1)
    assert settings == {"n": n, "d_v": 16, "seeds": 2}
    names = ["scale", "densities"]
    assert table[names].equals(right.loc[right["samples"] == 32, names].reset_index(drop=True))
    words = np.random.default_rng(0).permutation(word_vectors(None)[:4096]).astype(np.float64)
    q, k, v = words[:n], words[n : 2 * n], words[2 * n : 3 * n, :16]
    p = (torch.from_numpy(q @ k.T) / 10).softmax(1).numpy()
    found = [spectral_attention(q, k, v, 32, scale=0.1, seed=seed, density=density_levels) for seed in seeds]
    size = np.linalg.svd(p)[1][0] * np.linalg.svd(v)[1][0]
    gaps = [np.linalg.svd(one.output - p @ v)[1][0] / size for one in found]
    row = table.iloc[1]
    assert row["spectral_error"] == pytest.approx(sum(gaps) / 2)
    assert row["largest"] == pytest.approx(max(gaps))
    assert row["kernel_evaluations_per_pair"] == sum(one.kernel_evaluations for one in found) / 2 / n**2
    # Row sums and column norms
    assert row["sums_made_exactly"] == sum(one.exact_rows for one in found) / 2 / (2 * n)
    assert 0 < row["sums_made_exactly"] < 1


@pytest.mark.slow
def test_training_follows_the_losses_of_the_reference(run):
    import knn_training as script

    every, whole = script.GRADIENTS, script.SETTINGS
    few = {name: every[name] for name in ("exact", "Markov chain, 16 samples")}
    changed = {"GRADIENTS": few, "SETTINGS": whole | {"steps": 5}}
    table, right, settings = run("knn_training", "knn_training/knn_training.csv", changed)
    right = right[(right["step"] <= 5) & right["gradients"].isin(few)].reset_index(drop=True)
    # Products in float32 round otherwise on other processors.
    pd.testing.assert_frame_equal(table, right, rtol=1e-4)
    known = json.loads((REFERENCE / "knn_training" / "knn_training.json").read_text())["settings"]
    assert known == whole | {"gradients": every}
    assert known | {"steps": 5, "gradients": few} == settings


def test_training_descends_the_exact_gradient_and_is_told_every_few_steps(run):
    import knn_training as script

    sizes = {"n": 24, "d": 4, "d_v": 2, "steps": 6, "every": 3, "rates": {"convex": 2.0, "non-convex": 1.0}}
    table, _, _ = run("knn_training", "knn_training/knn_training.csv", {"SETTINGS": sizes})
    assert table["step"].unique().tolist() == [0, 3, 6]
    runs = table.groupby(["problem", "gradients"], sort=False)["seed"].nunique()
    assert runs.to_dict() == {
        (problem, name): 1 if name == "exact" else 3 for problem in sizes["rates"] for name in script.GRADIENTS
    }
    begun = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    q, k, v, *others = (
        (1.5 * torch.randn(1, 24, width, generator=one)).double() for one in begun for width in (4, 4, 2)
    )
    wanted = (others[0] @ others[1].mT / 2).softmax(-1) @ others[2]
    p, losses = (q @ k.mT / 2).softmax(-1), []
    for _ in range(7):
        losses.append(float((p @ v - wanted).square().mean()))
        # d/dv of the mean of 48 squares
        v = v - 2.0 * 2 / 48 * p.mT @ (p @ v - wanted)
    exact = table[(table["problem"] == "convex") & (table["gradients"] == "exact")]
    assert exact["loss"].tolist() == pytest.approx(losses[::3], rel=1e-5)
    ends = table[table["step"] == 6].set_index(["problem", "gradients"])["loss"]
    assert (ends < losses[0]).all()
    # Of all weights, not of V alone
    assert ends["non-convex", "exact"] != ends["convex", "exact"]


def taken(known, clock, checks):
    """In place of `times`: the seconds that are known of each call by the clock; the call is made and checked once."""

    def made(calls, *asked):
        assert asked == (3, clock)
        for name, call in calls.items():
            checks(name, call())
        return {name: known[name] for name in calls}

    return made


def test_the_speed_of_the_statistics_is_told_per_head_and_round_by_round(run, monkeypatch, tmp_path):
    import statistics_speed as script

    texts = tmp_path / "data" / "squad" / "dev-v1.1.jsonl.xz"
    texts.parent.mkdir(parents=True)
    # 1.3 tokens a word: at most 512, at least 50
    contexts = [{"title": "", "context": " ".join(["word"] * count), "questions": []} for count in (10, 100, 1000)]
    texts.write_bytes(lzma.compress("\n".join(map(json.dumps, contexts)).encode()))
    now, drawn, shapes = [0.0], [], []

    def heads(kind, n, d, generator):
        drawn.append(right_heads(kind, n, d, generator))
        return drawn[-1]

    def statistics(q, k, first):
        shapes.append((*q.shape, first, torch.get_num_threads()))
        now[0] += 2.0
        return head_statistics(q[:, :60], k[:, :60], first)

    def products(q, k, out):
        made = []
        with monkeypatch.context() as patched:
            patched.setattr(
                torch, "mm", lambda one, other, out: made.append(right_product(one, other, out=out).clone())
            )
            right_products(q, k, out)
        assert torch.allclose(torch.stack(made), torch.stack([q.double() @ k.double().mT for q, k in drawn[-2:]]))
        assert out.dtype == torch.float64

    def check(name, result):
        assert torch.get_num_threads() == 1
        pair = drawn[-2:]
        each = [script.topk_of_every_prefix(q, k, torch.float64) for q, k in pair]
        if name in ("a call each", "one call"):
            assert torch.allclose(torch.stack(list(result)), torch.stack(each), rtol=1e-9)
        elif name == "product":
            assert result is None
        else:
            assert str(result.dtype) == f"torch.{name}"
            assert torch.allclose(result.double(), each[0], rtol=1e-3)

    right_heads, right_products, right_product = script.heads, script.products, torch.mm
    seconds = {"a call each": [0.2, 0.4, 0.2], "one call": [0.1, 0.1, 0.4], "product": [0.02, 0.02, 0.06]}
    seconds |= {"float64": [1.0, 2.0, 4.0], "float32": [0.5, 0.5, 0.5]}
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    table, right, settings = run(
        "statistics_speed",
        "benchmarks/statistics.csv",
        {"SIZES": ((52, 4), (51, 3)), "AT_ONCE": 2, "ROUNDS": 3, "N_HEADS": 2, "heads": heads, "products": products}
        | {"times": taken(seconds, script.time.perf_counter, check), "head_statistics": statistics},
        "statistics",
    )
    assert settings == {"rounds": 3, "heads": 2, "threads_of_the_last_row": 2}
    names = ["what", "against"]
    assert table.loc[:23, names].equals(right.loc[:23, names])
    assert table.loc[:23, ["n", "d"]].drop_duplicates().to_numpy().tolist() == [[52, 4], [51, 3]]
    told = ["ours_ms", "other_ms", "product_ms", "times_faster", "lowest", "highest"]
    for start in range(0, 24, 4):
        # Two heads in 0.2 s against one in 1 s; medians and ratios of each round
        assert table.loc[start : start + 3, told].to_numpy().tolist() == pytest.approx(
            np.array(
                [
                    [100, 2000, 10, 10, 10, 40],
                    [100, 500, 10, 5, 2.5, 5],
                    [50, 2000, 10, 20, 20, 40],
                    [50, 500, 10, 10, 2.5, 10],
                ]
            )
        )
    gaps = table.loc[:23, "relative_difference"]
    assert gaps[1::2].isna().all()
    assert gaps[::2].between(0, 1e-9).all()
    assert (gaps[::2] > 0).any()
    # The last row: 144 heads of every context on all threads
    assert shapes == [(2, n, 64, 50, 2) for n in (50, 130, 512)]
    assert table.iloc[-1].dropna().to_dict() == {
        "what": "3 contexts x 2 heads, all cores",
        "n": 130,
        "d": 64,
        "ours_ms": 6000.0,
    }


def test_the_heads_that_are_timed_are_as_diffuse_as_they_are_called(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from statistics_speed import heads

    for kind, spread in (("diffuse", 0.6), ("ordinary", 1.2), ("sharp", 2.0)):
        q, k = heads(kind, 300, 64, torch.Generator().manual_seed(0))
        assert q.shape == k.shape == (300, 64)
        # Of logits
        assert float((q @ k.mT / 8).std()) == pytest.approx(spread**2, rel=0.02)


def test_the_speed_of_attention_statistics_is_relative_to_the_attention_of_the_same_mask(run):
    import attention_statistics as script

    lengths, seen = [], []

    def right(n, name):
        q, k = script.head(n, 64, 12.0)
        p = q.double() @ k.double().mT / 8
        if "causal" in name:
            p = p.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
        return q, k, p.softmax(-1)

    def check(name, result):
        if name == "sdpa":
            lengths.append(result.shape[2])
        seen.append(name)
        q, k, p = right(lengths[-1], name)
        if "sdpa" in name:
            assert torch.allclose(result[0, 0].double(), p @ k.double(), rtol=1e-3, atol=1e-4)
        elif "first pass" in name:
            largest, rounding = (result.largest_weight, 1e-9) if "float64" in name else (result[2], 1e-3)
            assert torch.allclose(largest, p.amax(-1), rtol=rounding)
        else:
            whole = attention_statistics(q, k)
            here = {"with keys_per_share": "keys_per_share", "with c and order ratios": "log_double"}
            assert np.array_equal(result, getattr(whole, here.get(name, "stable_rank")))

    further = ("with keys_per_share", "with c and order ratios", "with stable_rank")
    seconds = {name: [0.5, 0.5, 0.5] for name in further}
    seconds |= {"sdpa": [0.1, 0.2, 0.4], "sdpa, causal": [0.1, 0.1, 0.1], "first pass": [0.4, 0.2, 0.4]}
    seconds |= {"first pass, causal": [0.3, 0.2, 0.7], "first pass, float64": [0.6, 0.9, 0.4]}
    table, known, settings = run(
        "attention_statistics",
        "benchmarks/attention_statistics.csv",
        {"LENGTHS": (40, 70), "WHOLE": 64, "ROUNDS": 3, "times": taken(seconds, time.process_time, check)}
        | {"attention_statistics": off_by(script.attention_statistics)},
    )
    assert settings == {"rounds": 3, "d": 64, "threads": 1, "clock": "cpu"}
    assert table["what"].equals(known["what"])
    assert lengths == [40, 70]
    assert table["n"].tolist() == [40] * 8 + [70] * 8 + [64] * 6
    told = table.set_index("what").iloc[:8][["median_ms", "least_ms", "times_sdpa", "times_sdpa_least"]]
    assert told.loc["first pass"].tolist() == pytest.approx([400, 200, 1, 2])
    assert told.loc["first pass, causal"].tolist() == pytest.approx([300, 200, 3, 2])
    assert told.loc["first pass, float64"].tolist() == pytest.approx([600, 400, 4.5, 4])
    assert told.loc["with stable_rank"].tolist() == pytest.approx([500, 500, 2.5, 5])
    assert told.loc["sdpa, causal"].tolist() == pytest.approx([100, 100, 1, 1])
    # As far off as they were made
    off = table["relative_difference"].iloc[16:]
    assert off.tolist() == pytest.approx([1e-3, 2e-3, 3e-3] * 2, rel=0.1)


def test_exact_attention_of_other_libraries_is_beside_ours_with_its_error(run):
    import exact_peers as script

    def absent(n, causal):
        raise ImportError("not here")

    def doubled(n, causal):
        return lambda q, k, v: 2 * script.ours("exact-sdpa", n, causal)(q, k, v)

    calls = []

    def check(name, result):
        calls.append((name, result.shape))

    peers = {name: script.PEERS[name] for name in script.OURS} | {"absent": absent, "doubled": doubled}
    seconds = {"exact-sdpa": [0.2, 0.3, 0.4], "exact-fused": [0.9] * 3, "exact-sdpa-bf16": [0.2, 0.2, 0.6]}
    seconds |= {"exact-tiles-bf16": [0.9] * 3, "doubled": [0.1, 0.1, 0.3]}
    table, _, settings = run(
        "exact_peers",
        "benchmarks/exact_peers.csv",
        {"LENGTHS": (70, 300), "PEERS": peers, "ROUNDS": 3, "times": taken(seconds, time.process_time, check)},
    )
    names = [*script.OURS, "doubled"]
    assert table["what"].tolist() == names * 4
    assert table["ours"].tolist() == (["yes"] * 4 + ["no"]) * 4
    assert table["n"].tolist() == [70] * 10 + [300] * 10
    assert table["causal"].tolist() == (["no"] * 5 + ["yes"] * 5) * 2
    assert {shape for _, shape in calls} == {(70, 64), (300, 64)}
    assert set(settings["left_out"].values()) == {"ImportError: not here"}
    assert len(settings["left_out"]) == 4
    told = table.set_index("what").iloc[:5]
    assert told["ms"].tolist() == pytest.approx([300, 900, 200, 900, 100])
    assert told.loc["exact-sdpa", ["ms_q1", "ms_q3"]].tolist() == pytest.approx([250, 350])
    assert told["times_our_fastest"].tolist() == pytest.approx([1.5, 4.5, 1, 4.5, 0.5])
    # float32 at logits of 12; bfloat16 has 8 bits, of which logits of 12 leave 4 or 5 behind the point.
    errors = table.groupby("what")["error"]
    assert errors.max()[["exact-sdpa", "exact-fused"]].max() < 1e-5
    assert errors.min()["exact-sdpa-bf16"] > 1e-4
    assert errors.max()[["exact-sdpa-bf16", "exact-tiles-bf16"]].max() < 0.03
    assert errors.max()["doubled"] == pytest.approx(1, abs=1e-5)
    assert errors.min()["doubled"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("peer", ["OpenVINO, float32", "ONNX Runtime, float32", "JAX, float32"])
def test_a_library_that_is_installed_computes_the_same_attention(monkeypatch, peer, causal):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import exact_peers as script

    q, k, v = (torch.randn(90, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    try:
        call = script.PEERS[peer](90, causal)
    except ImportError as error:
        pytest.skip(f"pip install {error.name}")
    assert script.error(call(q, k, v), q, k, v, causal) < 1e-5


def off_by(right):
    """The statistics with errors of 0.1, 0.2 and 0.3 % where the n x n matrix is told from them, at n = 64."""

    def made(q, k, **options):
        found = right(q, k, **options)
        if len(q) != 64:
            return found
        parts = {"entropy": 1.001, "support": 0.998, "largest_weight": 1.003}
        return SimpleNamespace(**{name: factor * getattr(found, name) for name, factor in parts.items()})

    return made


@pytest.mark.slow
def test_densities_are_timed_from_the_second_product_and_told_with_their_error(run, monkeypatch, tmp_path):
    sklearn = pytest.importorskip("sklearn.neighbors")
    import density as script

    shutil.copy(ROOT / "config.yaml", tmp_path)
    settings = yaml.safe_load((ROOT / "config.yaml").read_text())["studies"]["operator"]["operator"]
    package, version = settings["path"].removeprefix("npm:").split("/")[0].split("@")
    vectors = tmp_path / "cache" / "vectors" / f"{package}-{version}-{settings['sha256'][:12]}.npy"
    vectors.parent.mkdir(parents=True)
    words = word_vectors(None)[:400]
    np.save(vectors, words)
    vectors.with_suffix(".sha256").write_text(file_sha256(vectors))
    now = [0.0]

    def slowly(seconds, call):
        def made(*words, **options):
            now[0] += seconds
            return call(*words, **options)

        return made

    operator = script.KernelOperator
    slow = type("Slow", (operator,), {"__init__": slowly(10, operator.__init__)})
    slow.__matmul__ = slowly(1, operator.__matmul__)
    trees = sklearn.KernelDensity
    slow_trees = type("SlowTrees", (trees,), {"score_samples": slowly(1000, trees.score_samples)})
    # Of the script alone, which reads it through the module
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    table, right, settings = run(
        "density",
        "benchmarks/density.csv",
        {"POINTS": 300, "QUERIES": (20, 50), "blocked": slowly(100, script.blocked)}
        | {"KernelOperator": slow, "KernelDensity": slow_trees},
    )
    assert settings == {"points": 300, "sigma": 1.778, "repeats": 3, "threads": 1}
    assert table["method"].equals(right["method"])
    assert table["queries"].tolist() == [20] * 4 + [50] * 3
    assert table["seconds"].tolist() == [100, 1, 1, 1000, 100, 1, 1]
    of_operator = table["method"].str.startswith("KernelOperator")
    assert table["times_faster"].tolist() == [1, 100, 100, 0.1, 1, 100, 100]
    assert table.loc[of_operator, "seconds_first"].tolist() == [11] * 4
    assert table["times_faster_first"].fillna(0).tolist() == pytest.approx(100 / 11 * of_operator)
    words = np.random.default_rng(0).permutation(words)[:350].astype(np.float64)
    squares = ((words[300:, None] - words[None, :300]) ** 2).sum(2)
    sums = np.exp(-squares / (2 * 1.778**2)).sum(1)
    for place, row in table.iterrows():
        truth = sums[: row["queries"]]
        if not of_operator[place]:
            assert row[["bound", "way", "evaluated"]].isna().all()
            continue
        given = words[300 : 300 + row["queries"]].astype(np.float32), words[:300].astype(np.float32)
        made = operator(*given, 1.778, float(row["method"].split()[-1]), seed=0)
        # The first and three that are timed
        *_, found = (made @ np.ones(300, np.float32) for _ in range(4))
        # Of exact products: the rounding of sums in float32, whose order may change from one run to the next
        assert row["error"] == pytest.approx(np.linalg.norm(found - truth) / np.linalg.norm(truth), rel=0.5)
        assert made.last is not None
        assert row["bound"] == pytest.approx(made.last.bound, rel=0.5)
        assert row["way"] == made.last.method
        assert row["evaluated"] == made.last.kernel_evaluations / (300 * row["queries"])
    # Of torch, with which the others are compared, and of scikit-learn, which is given 0.05
    assert table["error"][[0, 4]].tolist() == [0, 0]
    assert 0 < table["error"][3] < 0.05


@pytest.mark.slow
def test_graphs_are_searched_among_the_keys_of_each_head_and_of_word_vectors(run, tmp_path):
    pytest.importorskip("faiss")
    n, near, beam = 40, 4, 5
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "words.jsonl").write_text(json.dumps({"title": "", "context": "ABCADBEAFGH " * 20, "questions": []}))
    config = {"models": {"smollm2-135m": {"source": "path:tiny.gguf"}}, "study": "one"}
    config |= {"corpora": {"moby-dick": {"source": "path:words.jsonl"}}, "studies": {"one": {"operator": {}}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    table, right, settings = run(
        "graph_search",
        "graph_search/graph_search.csv",
        {"HEADS": [(0, 2), (1, 1)], "N": n, "NEAR": near, "BREADTH": beam},
    )
    assert settings == {"heads": [[0, 2], [1, 1]], "n": n, "alphas": [1.2, 1.5, 2.0], "near": near, "breadth": beam}
    assert table["kernel"].unique().tolist() == ["smollm2-135m 0.2", "smollm2-135m 1.1", "glove-split"]
    assert table[["graph", "alpha"]].equals(right.loc[right.index < 18, ["graph", "alpha"]])
    model = CapturableModel.load(ModelLocation(tmp_path, "tiny.gguf"))
    captured = model.capture([model.tokenize("ABCADBEAFGH " * 20, n)])[0]
    words = torch.as_tensor(word_vectors(None))
    kernels = [(captured.queries[0, 2], captured.keys[0, 2]), (captured.queries[1, 1], captured.keys[1, 1])]
    kernels += [(words[: 2 * n : 2], words[1 : 2 * n : 2])]
    for place, (q, k) in enumerate(kernels):
        rows = table.iloc[6 * place : 6 * place + 6].to_dict("records")
        expected = searched(q, k, near, beam)
        for row, facts in zip(rows, expected, strict=True):
            assert (row["n"], row["d"]) == tuple(k.shape)
            empty = {name for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
            seconds = {"build_seconds"} | ({"search_seconds"} if row["graph"] != "exhaustive" else set())
            assert row.keys() - empty == facts.keys() | seconds | {"kernel", "graph", "n", "d"}
            assert {name: row[name] for name in facts} == pytest.approx(facts, rel=1e-5)
            assert all(row[name] > 0 for name in seconds)
    assert (table["largest_ratio"] <= table["guarantee"] * (1 + 1e-6)).sum() == 9
    assert table["recall"].min() < table["recall"].max() <= 1


def searched(q, k, near, beam):
    """What each row of a kernel says but for its times, from q and k, whose keys are moved to their mean."""
    reduced = reduce_attention(q, k - k.mean(0))
    queries, keys = torch.as_tensor(reduced.queries), torch.as_tensor(reduced.keys)
    nearest = (queries[:, None].double() - keys.double()).norm(dim=2)
    heaviest = [set(row) for row in nearest.argsort(1)[:, :near].tolist()]

    def recall(found):
        return sum(len(set(row) & right) for row, right in zip(found.tolist(), heaviest, strict=True)) / near / len(q)

    generator = torch.Generator().manual_seed(0)
    dimension = doubling_dimension(keys, generator=generator)
    facts = {"doubling_dimension_at_least": dimension.lower, "greedy_cover_log2": dimension.upper}
    facts |= {"aspect_ratio": dimension.aspect_ratio}
    rows = []
    for alpha, guarantee in ((1.2, 11.0), (1.5, 5.0), (2.0, 3.0)):
        graph = build_exhaustively(keys, alpha=alpha)
        found = graph.search(queries, 1, 1)
        ratios = nearest[range(len(q)), found.keys[:, 0]] / nearest.amin(1)
        rows.append({"alpha": alpha, "guarantee": guarantee, "largest_ratio": max(ratios.tolist())})
        rows[-1] |= {"median_ratio": float(ratios.median()), "mean_degree": sum(graph.degrees) / len(k)}
        rows[-1] |= {"largest_degree": max(graph.degrees), "mean_steps": sum(found.steps.tolist()) / len(q)}
        rows[-1] |= {"largest_steps": int(found.steps.max())}
        rows[-1] |= {"mean_evaluations": sum(found.evaluations.tolist()) / len(q)}
    for alpha in (1.05, 1.2):
        graph = build(keys, alpha=alpha, degree=24, beam=32, generator=generator)
        found = graph.search(queries, near, beam)
        rows.append({"alpha": alpha, "mean_degree": sum(graph.degrees) / len(k), "recall": recall(found.keys)})
        rows[-1] |= {"mean_evaluations": sum(found.evaluations.tolist()) / len(q)}
    index = HNSWIndex(k - k.mean(0), 12, 32, beam)
    index.add(0, len(k))
    return [facts | row for row in (*rows, {"recall": recall(index.search(q, near)[0])})]


@pytest.mark.slow
def test_what_squad_costs_is_measured_on_the_jobs_of_a_study(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    whole_squad = importlib.import_module("whole_squad")
    # In place of one of BERT-base's shape.
    monkeypatch.setattr(whole_squad, "random_bert", lambda folder: save_model(folder, "bert"))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "whole_squad.py"), "--contexts", "3"])
    monkeypatch.chdir(tmp_path)
    whole_squad.main()
    out, known = tmp_path / whole_squad.OUT, REFERENCE / "benchmarks" / "whole_squad.csv"
    table, of_the_known = pd.read_csv(out), pd.read_csv(known)
    assert list(table.columns) == list(of_the_known.columns)
    assert table["step"].tolist() == of_the_known["step"].tolist()
    assert table["jobs"].tolist() == [1] * 4
    # Seconds of imports alone, at least.
    assert table["processor"].between(0.5, 60).all()
    record, of_the_known = (json.loads(path.with_suffix(".json").read_text()) for path in (out, known))
    assert record["command"] == "python benchmarks/whole_squad.py --contexts 3"
    assert record["settings"] == of_the_known["settings"] | {"contexts": 3}
    found = record["measured"]
    assert found.keys() == of_the_known["measured"].keys()
    assert found["seconds"] > table["processor"].sum()
    assert 0.1 < found["memory_of_the_largest_process_gb"] < found["memory_of_all_processes_gb"] < 10
    # Queries and keys of 3 texts of at most 128 tokens: 2 layers of 4 heads of 8 numbers.
    assert 0 < found["activations_gb"] < 3 * 128 * 2 * 2 * 4 * 8 * 4 * 1.2 / 1e9
