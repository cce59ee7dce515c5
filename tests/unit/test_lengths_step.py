"""The step that measures long texts: its log, its table, its device."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from models_support import captured_of, save_activations

from approxkmv.config import Study, load_config, study_of
from approxkmv.errors import ConfigError
from approxkmv.progress import Times
from approxkmv.statistics.entries import CAUSAL
from approxkmv.statistics.streaming import length_statistics
from approxkmv.steps import lengths
from approxkmv.steps.lengths import measure_lengths


def two_layers(folder: Path) -> Study:
    """Activations of one text of 60 tokens, 2 layers and 3 heads, and a study whose lengths it reaches in part."""
    generator = torch.Generator().manual_seed(9)
    q, k = (torch.randn(2, 3, 60, 8, generator=generator) for _ in range(2))
    save_activations(folder / "qk.safetensors", {0: captured_of(q, k, 0.3, 0.4)}, causal=True)
    taken = {"context": [0], "tokens": 60, "cut": 0, "used": True, "causal": True, "mask": CAUSAL, "left_out": ""}
    pd.DataFrame(taken).to_csv(folder / "contexts.csv", index=False)
    study = study_of(load_config(Path(__file__).parents[2] / "config.yaml"), "lengths")
    return study.model_copy(update={"lengths": (20, 60, 90), "device": "cpu"})


def test_the_step_says_how_long_each_length_took_and_writes_the_same_bytes_again(tmp_path):
    study, times = two_layers(tmp_path), Times()
    arguments = (study, "m", tmp_path / "qk.safetensors", tmp_path / "contexts.csv")
    assert len(measure_lengths(*arguments, tmp_path / "one.parquet", times)) == 1
    assert list(times.seconds) == ["20 tokens", "60 tokens"]
    assert min(times.seconds.values()) > 0
    measure_lengths(*arguments, tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_the_step_computes_on_the_studys_device(tmp_path, monkeypatch):
    seen = []

    def watched(q, k, scale, *, causal, spans):
        assert spans is None
        seen.append((q.device.type, k.device.type, tuple(q.shape)))
        return length_statistics(torch.zeros(q.shape), torch.zeros(k.shape), scale, causal=causal)

    monkeypatch.setattr(lengths, "length_statistics", watched)
    # A device that is everywhere; it holds no numbers.
    study = two_layers(tmp_path).model_copy(update={"device": "meta"})
    measure_lengths(study, "m", tmp_path / "qk.safetensors", tmp_path / "contexts.csv", tmp_path / "out.parquet")
    assert seen == [("meta", "meta", (3, n, 8)) for n in (20, 20, 60, 60)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_line(tmp_path):
    study = two_layers(tmp_path).model_copy(update={"device": "cuda"})
    with pytest.raises(ConfigError, match="asks for device cuda, but there is none here: set device to cpu"):
        measure_lengths(study, "m", tmp_path / "qk.safetensors", tmp_path / "contexts.csv", tmp_path / "out.parquet")
