"""A sweep through Snakemake and the command line: model heads and word vectors in, table and figures out."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_project import Project, kill_when

SWEEP = {"methods": ["exact-fused", "mean", "local-expansion"], "targets": [0.2], "repeats": 2, "warmups": 0}
FIGURES = ["speedup", "error_vs_time", "crossover"]


@pytest.fixture
def sweeper(project: Project) -> Project:
    """A project with a study that is a sweep over word vectors and two heads of the small Llama."""
    np.save(project.folder / "vectors.npy", np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32))
    config = project.read()
    config["sweeps"] = {
        "little": SWEEP
        | {
            "capture": {"model": "llama", "corpus": "words", "tokens": 30, "heads": [[0, 1], [1, 3]]},
            "workloads": [
                {"name": "glove-split", "lengths": [64, 96], "path": str(project.folder / "vectors.npy")},
                {"name": "model-qk", "lengths": [20]},
            ],
        }
    }
    config["studies"]["tiny"] = {"sweep": "little"}
    project.write(config)
    return project


@pytest.mark.slow
def test_the_study_through_snakemake_writes_table_and_figures(sweeper: Project):
    scaling = {"method": "linear", "factor": 2.0}
    config = sweeper.read()
    config["studies"]["tiny"]["rotary_scaling"] = scaling
    sweeper.write(config)
    code, output = sweeper.snakemake()
    assert code == 0, output
    heads = load_file(sweeper.results / "sweep" / "heads.safetensors")
    assert heads["q"].shape == heads["k"].shape == (2, 30, 8)
    with safe_open(sweeper.results / "sweep" / "heads.safetensors", "pt") as file:
        assert {name: file.metadata()[name] for name in ("model", "heads")} == {"model": "llama", "heads": "0.1 1.3"}
    tuning = load_file(sweeper.results / "sweep" / "heads_tuning.safetensors")
    assert not torch.equal(heads["q"], tuning["q"])
    table = pd.read_csv(sweeper.results / "tables" / "sweep.csv")
    assert set(table["workload"]) == {"glove-split", "model-qk-0", "model-qk-1"}
    assert (table.loc[table["method"] == "exact-fused", "status"] == "ok").all()
    assert len(table) == 3 * 4
    record = json.loads((sweeper.results / "tables" / "sweep.json").read_text())
    assert record["provenance"]["versions"]["torch"]
    assert record["provenance"]["settings"] == {"rotary_scaling": scaling}
    assert (sweeper.results / "tables" / "sweep_exponents.csv").is_file()
    for name in FIGURES:
        assert (sweeper.results / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    code, output = sweeper.snakemake("-n", "--quiet", "host")
    assert code == 0
    assert "Nothing to be done" in output
    # Other vectors under the same name
    np.save(sweeper.folder / "vectors.npy", np.ones((400, 6), np.float32))
    code, output = sweeper.snakemake("-n", "--quiet", "host")
    assert code == 0
    assert "rule sweep:" in output


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"model": "bert", "heads": "0.1 1.3"}, "heads.safetensors has the model 'bert', the sweep 'llama'"),
        ({"model": "llama", "heads": "0.1 1.2"}, "heads.safetensors has the heads '0.1 1.2', the sweep '0.1 1.3'"),
        ({"model": "llama", "heads": "0.1 1.3"}, None),
        ({}, None),
    ],
)
def test_heads_of_another_model_or_other_heads_are_refused(sweeper: Project, named: dict[str, str], says: str | None):
    config = sweeper.read()
    config["sweeps"]["little"] |= {"methods": ["mean"], "workloads": [{"name": "model-qk", "lengths": [8]}]}
    sweeper.write(config)
    for name, metadata in (("heads", named), ("plain", {})):
        tensors = {part: torch.randn(2, 30, 4) for part in "qkv"}
        save_file(tensors, sweeper.folder / f"{name}.safetensors", metadata=metadata)
    for option, other in (("--capture", "--tuning-capture"), ("--tuning-capture", "--capture")):
        given = (option, f"{sweeper.folder}/heads.safetensors", other, f"{sweeper.folder}/plain.safetensors")
        code, output = sweeper.approxkmv("sweep", *given, "--out", "sweep.csv")
        assert (code, says is None or says in output) == (2 if says else 0, True), output


def test_heads_are_those_of_the_model_as_the_study_scales_it(sweeper: Project):
    for name in ("llama", "bert"):
        code, output = sweeper.approxkmv("fetch", "--model", name, "--out", f"{name}.json")
        assert code == 0, output
    given = ("model-heads", "--out", "q.safetensors", "--tuning-out", "t.safetensors", "--location")
    found = []
    for scaling in (None, {"method": "linear", "factor": 2}):
        config = sweeper.read()
        config["studies"]["tiny"]["rotary_scaling"] = scaling
        sweeper.write(config)
        code, output = sweeper.approxkmv(*given, "llama.json")
        assert code == 0, output
        found.append(load_file(sweeper.folder / "q.safetensors")["q"])
    plain, scaled = found
    torch.testing.assert_close(plain[:, 0], scaled[:, 0])
    assert not torch.allclose(plain[:, 9], scaled[:, 9], atol=0.1)
    code, output = sweeper.approxkmv(*given, "bert.json")
    assert (code, "says where the model bert is, not llama" in output) == (2, True), output


def test_a_sweep_measures_one_capture_and_tunes_on_the_other(sweeper: Project, monkeypatch):
    config = sweeper.read()
    config["cache"] = "elsewhere"
    sweeper.write(config)
    for name in ("one", "other"):
        tensors = {part: torch.randn(2, 30, 4) for part in "qkv"}
        save_file(tensors, sweeper.folder / name, metadata={"model": "llama", "heads": "0.1 1.3"})
    given = []
    monkeypatch.setattr("approxkmv.sweep.run_sweep", lambda chosen, *rest, **more: given.append(chosen))
    code, output = sweeper.approxkmv("sweep", "--capture", "one", "--tuning-capture", "other", "--out", "sweep.csv")
    assert code == 0, output
    (chosen,) = given
    assert [(w.path, w.tuning_path) for w in chosen.workloads if w.name == "model-qk"] == [("one", "other")]
    assert chosen.cache == "elsewhere"


@pytest.mark.slow
def test_a_study_of_causal_attention_and_of_few_queries(sweeper: Project):
    config = sweeper.read()
    words, heads = config["sweeps"]["little"]["workloads"]
    heads |= {"columns": ["all"]}
    config["sweeps"]["little"] |= {
        "relative_to": ["values", "answer"],
        "methods": [*SWEEP["methods"], "exact-sdpa-bf16"],
        "workloads": [heads | {"causal": True}, heads | {"queries": [1, 16]}, words | {"lengths": [64, 80, 96]}],
    }
    config["corpora"]["others"] = {"source": "path:others.txt"}
    config["sweeps"]["little"]["capture"]["tuning_corpus"] = "others"
    (sweeper.folder / "others.txt").write_text("\n\n".join([" ".join(["w3"] * 40), " ".join(["w4"] * 40)]))
    sweeper.write(config)
    code, output = sweeper.snakemake()
    assert code == 0, output
    measured, tuned = (load_file(sweeper.results / "sweep" / f"heads{end}.safetensors")["v"] for end in ("", "_tuning"))
    # Tuning sees one word thirty times, and so the same values but for rounding.
    assert torch.allclose(tuned, tuned[:, :1].expand_as(tuned), atol=1e-5)
    assert not torch.allclose(measured, measured[:, :1].expand_as(measured), atol=0.1)
    table = pd.read_csv(sweeper.results / "tables" / "sweep.csv", keep_default_na=False)
    causal = table[table["mask"] == "causal"]
    assert set(causal["workload"]) == {"model-qk-0-causal", "model-qk-1-causal"}
    assert set(causal.loc[causal["method"] == "mean", "status"]) <= {"ok", "unreached"}
    assert set(table["queries"]) == {1, 16, 20, 64, 80, 96}
    timed = table[(table["kind"] != "exact") & (table["seconds"] != "")]
    assert set(timed["relative_to"]) == {"values", "answer"}
    assert set(timed["fastest_exact"]) <= {"exact-fused", "exact-sdpa-bf16"}
    assert (timed["mean_error_exact"].astype(float) > 0).all()
    for name in FIGURES:
        assert (sweeper.results / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_after_its_last_whole_case(sweeper: Project):
    table, part = (sweeper.results / "tables" / f"sweep.csv{end}" for end in ("", ".part"))
    config = sweeper.read()
    config["sweeps"]["little"]["workloads"][0]["lengths"] = list(range(60, 100, 4))
    sweeper.write(config)
    kill_when(sweeper, part.is_file)
    assert not table.exists()
    kept = json.loads(part.read_text().splitlines()[1])["rows"]
    code, output = sweeper.snakemake()
    assert code == 0, output
    assert "resumes after the" in output
    assert not part.exists()
    found = pd.read_csv(table)
    assert len(found) == 3 * 12
    assert found["seconds"][: len(kept)].tolist() == [row["seconds"] for row in kept]
    assert json.loads((sweeper.results / "tables" / "sweep.json").read_text())["cases_of_earlier_runs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["exact-fussed"]}, "did you mean 'exact-fused'"),
        ({"workloads": [{"name": "glove-spilt", "lengths": [8]}]}, "did you mean 'glove-split'"),
        ({"workloads": [{"name": "glove-split", "lengths": [64, 300]}]}, "needs 600 word vectors, but there are 400"),
        ({"workloads": [{"name": "model-qk", "lengths": [8], "path": "nan.safetensors"}]}, "holds a NaN"),
        ({"workloads": [{"name": "model-qk", "lengths": [8], "path": "none.safetensors"}]}, "no capture"),
        ({"device": "cuda"}, "finds no CUDA device"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(sweeper: Project, changes, message):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    tensors = {name: torch.randn(1, 50, 4) for name in "qkv"}
    tensors["k"][0, 3, 2] = torch.nan
    save_file(tensors, sweeper.folder / "nan.safetensors")
    given = {**SWEEP, "workloads": [{"name": "glove-split", "lengths": [64]}], **changes}
    for workload in given["workloads"]:
        if workload["name"] == "glove-split":
            workload["path"] = "vectors.npy"
    (sweeper.folder / "settings.json").write_text(json.dumps(given))
    code, output = sweeper.approxkmv("sweep", "--settings", "settings.json", "--out", "out.csv")
    assert code == 2, output
    lines = [line for line in output.splitlines() if line.startswith("approxkmv: ")]
    assert len(lines) == 1, output
    assert message in lines[0]
    assert "Traceback" not in output
    assert not (sweeper.folder / "out.csv").exists()


def test_a_study_without_a_sweep_says_so(project: Project):
    code, output = project.approxkmv("sweep", "--out", "out.csv")
    assert code == 2
    assert "study tiny has no sweep" in output


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_study_for_a_gpu_stops_before_its_first_job_without_one(sweeper: Project):
    config = sweeper.read()
    config["sweeps"]["little"]["device"] = "cuda"
    sweeper.write(config)
    code, output = sweeper.snakemake()
    assert code == 2
    said = [line for line in output.splitlines() if line.startswith("approxkmv: ")]
    assert said == ["approxkmv: study tiny asks for device cuda, but there is none here: set device to cpu"]
    # Nothing was fetched or captured.
    assert not (sweeper.results / "logs").exists()
    # A dry run starts nothing.
    assert sweeper.snakemake("-n", "--quiet", "host")[0] == 0
