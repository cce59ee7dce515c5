"""A perplexity study through Snakemake, and the errors of its command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_project import ROOT, WORDS, Project, kill_when, save_tokenizer

from approxkmv.errors import InputError
from approxkmv.models import ModelLocation
from approxkmv.perplexity.model import CausalModel


@pytest.fixture
def speaker(project: Project) -> Project:
    """A project whose catalogue has a small random language model with its head, and a study of its perplexity."""
    import transformers

    torch.manual_seed(0)
    settings = {"vocab_size": len(WORDS) + 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"intermediate_size": 32, "max_position_embeddings": 512, "initializer_range": 0.3}
    folder = project.folder / "speaker"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).save_pretrained(folder)
    save_tokenizer(folder)
    asked = {"model": "speaker", "corpus": "words", "tokens": [40, 300], "layers": "1"}
    asked |= {"methods": {"window": [{"window": window, "products": "float32"} for window in (16, 300)]}}
    config = project.read()
    config["models"]["speaker"] = {"source": f"path:{folder}"}
    config["studies"]["tiny"] = {"perplexity": asked}
    project.write(config)
    return project


@pytest.mark.slow
def test_the_study_through_snakemake_writes_its_table(speaker: Project):
    code, output = speaker.snakemake()
    assert code == 0, output
    table = pd.read_csv(speaker.results / "tables" / "perplexity.csv")
    assert table["tokens"].tolist() == [40, 40, 300, 300]
    assert table["layers"].tolist() == [1] * 4
    assert [json.loads(words)["window"] for words in table["parameters"]] == [16, 300, 16, 300]
    # A window of the whole text: the model's own perplexity up to rounding.
    assert table["ratio"][[1, 3]].tolist() == pytest.approx([1.0] * 2, rel=1e-5)
    assert abs(table["ratio"][2] - 1) > 1e-3
    assert (table[["seconds", "exact_seconds", "attention_seconds", "exact_attention_seconds"]] > 0).all(axis=None)
    record = json.loads((speaker.results / "tables" / "perplexity.json").read_text())
    assert record["settings"]["tokens"] == [40, 300]
    for known in (ROOT / "results" / "reference").glob("**/perplexity.csv"):
        assert pd.read_csv(known, nrows=0).columns.equals(table.columns), known
        assert json.loads(known.with_suffix(".json").read_text()).keys() == record.keys(), known
    assert record["versions"]["torch"]


@pytest.mark.slow
def test_a_killed_run_goes_on_after_its_last_whole_length(speaker: Project):
    table, part = (speaker.results / "tables" / f"perplexity.csv{end}" for end in ("", ".part"))
    config = speaker.read()
    config["studies"]["tiny"]["perplexity"]["tokens"] = list(range(40, 320, 10))
    speaker.write(config)
    kill_when(speaker, part.is_file)
    assert not table.exists()
    kept = json.loads(part.read_text().splitlines()[1])["rows"]
    code, output = speaker.snakemake()
    assert code == 0, output
    assert "resumes after the" in output
    assert not part.exists()
    found = pd.read_csv(table)
    assert len(found) == 2 * 28
    assert found["seconds"][: len(kept)].tolist() == [row["seconds"] for row in kept]
    assert 40 in json.loads((speaker.results / "tables" / "perplexity.json").read_text())["tokens_of_earlier_runs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "own-key"], "method own-key has no causal form"),
        (["--method", "approxkmv", "--model", "bert"], "BertConfig is not that of a causal language model"),
        (["--method", "approxkmv", "--tokens", "1000"], "the text has"),
        (["--method", "approxkmv", "--tokens", "40,1"], "options: tokens.1 is 1: give a whole number of at least 2"),
        (["--method", "approxkmv", "--seed", "-1"], "options: seed is -1: give a whole number from 0 to"),
        (["--method", "approxkmv", "--seed", str(2**64)], "options.seed is a number of 65 bits"),
        (["--method", "approxkmv", "--tokens", "40", "--layers", "2"], "the model has layers 0 to 1"),
        (["--method", "approxkmv", "--parameters", "{near: 3}"], "parameters is '{near: 3}', which is not JSON"),
        (["--method", "approxkmv", "--model", "speeker"], "did you mean 'speaker'"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(speaker: Project, words, message):
    given = ["perplexity", "--model", "speaker", "--corpus", "words", "--out", "perplexity.csv", *words]
    code, output = speaker.approxkmv(*given)
    lines = [line for line in output.splitlines() if line.startswith("approxkmv: ")]
    assert code == 2, output
    assert len(lines) == 1, output
    assert message in lines[0]
    assert not (speaker.folder / "perplexity.csv").exists()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["perplexity", "--model", "bert"], "--method"),
        (["perplexity", "--tokens", "40"], "--method"),
        (["perplexity", "--seed", "0", "--study", "tiny"], "--method"),
        (["plan", "--target", "0.2"], "--model"),
    ],
)
def test_options_that_a_study_would_leave_without_effect_are_refused(speaker: Project, words, option):
    code, output = speaker.approxkmv(*words, "--out", "out.json")
    said = f"{words[1]} goes with {option}: the study has its own"
    assert (code, output) == (2, f"approxkmv: {said}\n")


def test_the_model_is_fetched_and_runs_as_the_configuration_says(speaker: Project, monkeypatch):
    config = speaker.read()
    config["studies"]["tiny"]["perplexity"] |= {"dtype": "bfloat16", "device": "cuda"}
    config["models"]["speaker"] |= {"sha256": "1" * 64, "files": {"config.json": "2" * 64}}
    config["cache"] = "elsewhere"
    speaker.write(config)
    given = {}

    def fetch(source: object, destination: Path, **hashes: object) -> ModelLocation:
        given.update(hashes, destination=destination)
        return ModelLocation(speaker.folder / "speaker")

    def load(location: ModelLocation, **options: object) -> None:
        given.update(options)
        raise InputError("that is enough")

    monkeypatch.setattr("approxkmv.models.fetch", fetch)
    monkeypatch.setattr(CausalModel, "load", load)
    code, output = speaker.approxkmv("perplexity", "--out", "out.csv")
    assert code == 2
    assert "that is enough" in output
    hashes = {"sha256": "1" * 64, "files": {"config.json": "2" * 64}}
    place = {"destination": Path("elsewhere/models/speaker")}
    assert given == hashes | place | {"dtype": "bfloat16", "device": "cuda"}


def test_a_method_that_cannot_run_is_an_error_by_name_and_a_row_of_a_study(speaker: Project, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    config = speaker.read()
    config["studies"]["tiny"]["perplexity"] |= {"methods": {"knn": [{}]}, "tokens": [40]}
    speaker.write(config)
    code, output = speaker.approxkmv("perplexity", "--out", "study.csv")
    assert code == 0, output
    assert "needs faiss" in pd.read_csv(speaker.folder / "study.csv")["unavailable"][0]
    given = ("--model", "speaker", "--corpus", "words", "--tokens", "40")
    code, output = speaker.approxkmv("perplexity", "--method", "knn", *given, "--out", "one.csv")
    assert code == 2
    assert "needs faiss" in output.splitlines()[-1]


@pytest.mark.slow
def test_a_plan_is_made_and_measured_as_options_say(speaker: Project, monkeypatch):
    config = speaker.read()
    config["studies"]["tiny"] = {"complexity": {}}
    texts = speaker.folder / "words.jsonl"
    config["corpora"]["others"] = {"source": f"path:{texts}"}
    speaker.write(config)
    of_texts = ("--model", "speaker", "--corpus", "others", "--tokens", "60")
    given = ("plan", *of_texts, "--target", "0.2", "--out", "plan.json")
    code, output = speaker.approxkmv("fetch", "--model", "bert", "--out", "bert.json")
    assert code == 0, output
    code, output = speaker.approxkmv(*given, "--location", "bert.json")
    assert (code, "says where the model bert is, not speaker" in output) == (2, True), output
    config["corpora"]["others"]["sha256"] = "0" * 64
    speaker.write(config)
    code, output = speaker.approxkmv(*given)
    assert code == 2
    assert "words.jsonl has SHA-256" in output
    config["corpora"]["others"].pop("sha256")
    speaker.write(config)
    read, own = [], CausalModel.tokens
    monkeypatch.setattr(
        CausalModel, "tokens", lambda self, texts, n: read.append((texts := [*texts], n)) or own(self, texts, n)
    )
    code, output = speaker.approxkmv(*given)
    assert code == 0, output
    plan = json.loads((speaker.folder / "plan.json").read_text())
    assert (plan["target"], plan["tokens"], plan["provenance"]["settings"]["plan"]["target"]) == (0.2, 60, 0.2)
    code, output = speaker.approxkmv(
        *("perplexity", *of_texts, "--plan", "plan.json", "--layers", "1", "--seed", "3", "--out", "out.csv")
    )
    assert code == 0, output
    # A plan is made on the last documents, and measured on the first.
    contexts = [json.loads(line)["context"] for line in texts.read_text().splitlines()]
    assert read == [(contexts[::-1], 60), (contexts, 60)]
    table = pd.read_csv(speaker.folder / "out.csv")
    assert table["method"].tolist() == ["exact-sdpa", "exact-sdpa-bf16", "exact-tiles-bf16", "plan"]
    assert {*zip(table["corpus"], table["tokens"], table["layers"], table["seed"], strict=True)} == {
        ("others", 60, 1, 3)
    }
    assert json.loads((speaker.folder / "out.json").read_text())["settings"]["seed"] == 3
    # Its record would have the name of the plan.
    code, output = speaker.approxkmv("perplexity", *of_texts, "--plan", "plan.json", "--out", "plan.csv")
    assert (code, "the run reads this file" in output) == (2, True), output
    assert json.loads((speaker.folder / "plan.json").read_text()) == plan


def test_a_study_without_perplexity_says_what_to_give(project: Project):
    code, output = project.approxkmv("perplexity", "--out", "perplexity.csv")
    assert code == 2
    assert "study tiny has no perplexity: give --method" in output
