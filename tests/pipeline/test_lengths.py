"""A study of long texts: its output, its agreement with the ordinary statistics, and lengths that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_project import ROOT, Project

VALUES = ["ratio", "log_double", "softmax_ratio", "tail_exponent"]


def long_study(project: Project, **changes) -> None:
    project.configure(**{"lengths": [20, 40, 60], "models": ["llama"], "max_tokens": 60, "contexts": None} | changes)


def prepared(project: Project, model: str = "llama", shard: str = "0") -> None:
    """Everything before the lengths step, in this process."""
    for arguments in (
        ("fetch", "--model", model, "--out", "location.json"),
        ("texts", "--out", "texts.parquet"),
        (
            *("extract", "--model", model, "--location", "location.json", "--texts", "texts.parquet"),
            *("--shard", shard, "--out", "out.safetensors", "--contexts-out", "0000.contexts.csv"),
        ),
    ):
        code, output = project.approxkmv(*arguments)
        assert code == 0, output


def lengths(project: Project, model: str = "llama") -> tuple[int, str]:
    return project.approxkmv(
        *("lengths", "--model", model, "--activations", "out.safetensors"),
        *("--contexts", "0000.contexts.csv", "--out", "0000.lengths.parquet"),
    )


@pytest.mark.slow
def test_the_study_through_snakemake_writes_its_table_and_figure(project: Project):
    long_study(project, contexts=3, shard_contexts=2)
    code, output = project.snakemake()
    assert code == 0, output
    table = pd.read_csv(project.results / "tables" / "length_scaling_llama.csv")
    assert set(table["length"]) <= {20, 40, 60}
    assert (table.groupby("length").size() == 8).all()
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    assert (table["keys_90_mean"] <= table["keys_99_mean"]).all()
    assert (table["masked_keys_99_largest"] <= table["length"]).all()
    facts = json.loads((project.results / "tables" / "lengths_llama.json").read_text())
    assert facts["causal"]
    assert facts["provenance"]["versions"]["torch"]
    known = ROOT / "results" / "reference" / "lengths" / "tables"
    assert pd.read_csv(known / "length_scaling_smollm2-135m.csv", nrows=0).columns.equals(table.columns)
    assert json.loads((known / "lengths_smollm2-135m.json").read_text()).keys() == facts.keys()
    assert (project.results / "figures" / "length_scaling_llama.png").read_bytes().startswith(b"\x89PNG")
    assert "a Llama: n = 20 to" in output


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_each_length_equals_the_ordinary_statistics_of_that_many_tokens(project: Project, model):
    long_study(project, models=[model])
    # Of its texts two are of 60 tokens, the longest length: their statistics per head are of a length too.
    prepared(project, model, shard="1")
    code, output = lengths(project, model)
    assert code == 0, output
    code, output = project.approxkmv(
        *("statistics", "--model", model, "--activations", "out.safetensors"),
        *("--heads-out", "heads.parquet", "--prefixes-out", "prefixes.parquet"),
    )
    assert code == 0, output
    found = pd.read_parquet(project.folder / "0000.lengths.parquet")
    prefixes = pd.read_parquet(project.folder / "prefixes.parquet").rename(columns={"prefix": "length"})
    both = found.merge(prefixes, on=["context", "layer", "head", "length"], suffixes=("", "_ordinary"))
    assert len(both) == len(found) > 0
    for column in ("ratio", "masked_ratio") if model == "llama" else ("ratio",):
        np.testing.assert_allclose(both[column], both[f"{column}_ordinary"], rtol=1e-6)
    heads = pd.read_parquet(project.folder / "heads.parquet").rename(columns={"tokens": "length"})
    both = found.merge(heads, on=["context", "layer", "head", "length"], suffixes=("", "_ordinary"))
    assert set(both["context"]) == {3, 5}
    for column in VALUES[1:]:
        np.testing.assert_allclose(both[column], both[f"{column}_ordinary"], rtol=1e-6, atol=1e-12)
    assert ("masked_ratio" in found) == (model == "llama")


def test_lengths_that_a_text_does_not_reach_are_named_and_the_others_run(project: Project):
    long_study(project, lengths=[20, 40, 50])
    prepared(project)
    code, output = lengths(project)
    assert code == 0, output
    # Text 0 has 30 tokens, text 1 has 45, text 2 is shorter than min_tokens.
    assert "text 0: no 40, 50, it has 30 tokens" in output
    assert "text 1: no 50, it has 45 tokens" in output
    found = pd.read_parquet(project.folder / "0000.lengths.parquet")
    assert found.groupby("context")["length"].unique().map(list).to_dict() == {0: [20], 1: [20, 40]}


def short_model(project: Project, folder: Path) -> dict[str, Any]:
    """The project's configuration, with a Llama of 25 positions."""
    from small_project import save_tokenizer
    from transformers import LlamaConfig, LlamaModel

    shared = {"vocab_size": 62, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    shared |= {"intermediate_size": 32, "max_position_embeddings": 25}
    LlamaModel(LlamaConfig(**shared)).save_pretrained(folder)
    save_tokenizer(folder)
    config = project.read()
    config["models"]["llama"]["source"] = f"path:{folder}"
    project.write(config)
    return config


def test_the_gauge_is_of_the_model_as_the_study_scales_it(project: Project, tmp_path):
    project.configure()
    config = short_model(project, tmp_path / "short")
    for scaling, tokens in ((None, 25), ({"method": "linear", "factor": 2}, 50)):
        config["studies"]["tiny"]["rotary_scaling"] = scaling
        project.write(config)
        for command in (
            ("fetch", "--model", "llama", "--out", "location.json"),
            ("texts", "--out", "texts.parquet"),
            ("gauge", "--model", "llama", "--location", "location.json", "--texts", "texts.parquet", "--tables", "."),
        ):
            code, output = project.approxkmv(*command)
            assert code == 0, output
        table = pd.read_csv(project.folder / "gauge_llama.csv")
        # As the model reads them: the first of `tokens` queries sees one key.
        assert (set(table["tokens"]), set(table["entries"])) == ({tokens}, {"causal"})


def test_a_model_whose_positions_end_earlier_is_named(project: Project, tmp_path):
    long_study(project)
    config = short_model(project, tmp_path / "short")
    prepared(project)
    code, output = lengths(project)
    assert code == 0, output
    assert "text 1: no 40, 60, the model's positions or max_tokens end at 25" in output
    # With its rotary embedding scaled the same model reads on.
    config["studies"]["tiny"]["rotary_scaling"] = {"method": "linear", "factor": 1.7}
    project.write(config)
    prepared(project)
    code, output = lengths(project)
    assert code == 0, output
    assert "text 1: no 60, the model's positions or max_tokens end at 42" in output
    found = pd.read_parquet(project.folder / "0000.lengths.parquet")
    assert set(found["length"]) == {20, 40}


def test_a_model_without_rotary_embeddings_is_not_scaled(project: Project):
    long_study(project, models=["bert"], rotary_scaling={"factor": 2})
    code, output = project.approxkmv("fetch", "--model", "bert", "--out", "location.json")
    assert code == 0, output
    code, output = project.approxkmv("texts", "--out", "texts.parquet")
    assert code == 0, output
    code, output = project.approxkmv(
        *("extract", "--model", "bert", "--location", "location.json", "--texts", "texts.parquet"),
        *("--shard", "0", "--out", "out.safetensors", "--contexts-out", "0000.contexts.csv"),
    )
    assert code == 2
    assert "no single rotary embedding" in output


def test_no_text_reaches_any_length(project: Project):
    long_study(project, lengths=[59, 60], contexts=1, shard_contexts=1)
    prepared(project)
    code, output = lengths(project)
    assert code == 0, output
    code, output = project.approxkmv(
        *("length-scaling", "--model", "llama", "--statistics", ".", "--texts", "texts.parquet", "--out", "tables")
    )
    assert code == 2
    assert "no text reaches the shortest length, 59 tokens" in output


def test_lengths_beyond_max_tokens_are_refused(project: Project):
    long_study(project, lengths=[20, 61])
    code, output = project.approxkmv("config", "check")
    assert code == 2
    assert "lengths is above max_tokens" in output


def test_activations_that_overflow_their_type_are_named(project: Project):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    long_study(project)
    prepared(project)
    tensors = load_file(project.folder / "out.safetensors")
    with safe_open(project.folder / "out.safetensors", "pt") as handle:
        metadata = handle.metadata()
    tensors["0000001.queries"][1, 2, 3, 4] = 1e30
    tensors["0000001.queries"] = tensors["0000001.queries"].half()
    save_file(tensors, project.folder / "out.safetensors", metadata=metadata)
    code, output = lengths(project)
    assert code == 2
    assert "model llama, context 1, layer 1" in output
    assert "Traceback" not in output
