"""Settings of a sweep from dictionaries, and the one-line error for each mistake."""

import json
from pathlib import Path
from typing import Annotated

import pytest

from approxkmv.errors import ConfigError
from approxkmv.sweep import SweepSettings
from approxkmv.sweep.settings_file import read_settings
from approxkmv.typed import above, between, fits, shown

GOOD = {"workloads": [{"name": "glove-split", "lengths": [128, 256]}]}
CAPTURE = {"model": "m", "corpus": "c", "tokens": 16, "heads": [[0, 1], [1, 0]]}
QK = {"name": "model-qk", "lengths": [16]}


def test_lists_become_tuples_and_defaults_hold():
    settings = SweepSettings.from_mapping({**GOOD, "targets": [0.1]})
    assert settings.targets == (0.1,)
    assert settings.workloads[0].lengths == (128, 256)
    assert settings.repeats >= 9
    assert len(settings.seeds) >= 10
    assert settings.as_dict()["workloads"][0]["name"] == "glove-split"


def test_targets_by_what_they_are_relative_to():
    assert SweepSettings.from_mapping(GOOD).aims() == {"values": (0.15, 0.10, 0.05)}
    answer = {**GOOD, "relative_to": "answer"}
    assert SweepSettings.from_mapping(answer).aims() == {"answer": (0.10, 0.05, 0.02)}
    both = {**GOOD, "relative_to": ["values", "answer"], "targets": [0.1]}
    assert SweepSettings.from_mapping(both).aims() == {"values": (0.1,), "answer": (0.1,)}


def test_a_workload_may_be_causal_beside_the_same_that_is_not():
    workloads = [{"name": "glove-split", "lengths": [8], "causal": causal} for causal in (False, True)]
    assert len(SweepSettings.from_mapping({"workloads": workloads}).workloads) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**GOOD, "target": [0.1]}, "did you mean 'targets'"),
        ({"workloads": [{"name": "glove-spilt", "lengths": [8]}]}, "did you mean 'glove-split'"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "colums": ["one"]}]}, "did you mean 'columns'"),
        ({"workloads": [{"name": "glove-split", "lengths": [0]}]}, "lengths is"),
        ({"workloads": [{"name": "glove-split"}]}, "lengths"),
        ({"workloads": [{"name": "model-qk", "lengths": [8]}]}, "neither a path nor a capture"),
        ({"workloads": [QK | {"lengths": [8, 17]}], "capture": CAPTURE}, "needs 17 tokens, but the capture has 16"),
        ({"workloads": [QK | {"batches": [2]}], "capture": CAPTURE}, "needs 32 tokens, but the capture has 16"),
        ({"workloads": [QK | {"heads": [0, 2]}], "capture": CAPTURE}, "needs 3 heads, but the capture has 2"),
        ({"workloads": [QK | {"sha256": "0" * 64}], "capture": CAPTURE}, "sha256 is of a file"),
        ({"workloads": []}, "workloads is \\(\\); give a list"),
        ({**GOOD, "seeds": [1, 1000]}, "overlap"),
        ({**GOOD, "dtype": "float16"}, "dtype is 'float16'"),
        ({**GOOD, "device": "gpu"}, "device is 'gpu'"),
        ({**GOOD, "seeds": []}, "seeds is"),
        ({**GOOD, "tuning_seeds": []}, "tuning_seeds is"),
        ({**GOOD, "threads": 0}, "threads is 0"),
        ({**GOOD, "repeats": 2.5}, "repeats is 2.5"),
        ({**GOOD, "targets": ["0.1"]}, "targets is"),
        ({**GOOD, "band": -1}, "band is -1"),
        ({**GOOD, "parameters": {"uniform": {"samples": 8}}}, "lists of mappings of parameters"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "batches": [0]}]}, "batches is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "columns": []}]}, "columns is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "heads": [-1]}]}, "heads is"),
        ({**GOOD, "threads": 10**9}, "threads is 1000000000; give a whole number from 1 to 1024"),
        ({**GOOD, "threads": True}, "threads is True"),
        ({**GOOD, "repeats": 0}, "repeats is 0"),
        ({**GOOD, "repeats": 10**9}, "repeats is 1000000000"),
        ({**GOOD, "seeds": [2**64]}, "seeds is"),
        ({**GOOD, "seeds": 3}, "seeds is 3"),
        ({**GOOD, "seeds": [1, 1]}, "each once"),
        ({**GOOD, "targets": []}, "targets is"),
        ({**GOOD, "targets": 0.1}, "targets is 0.1"),
        ({**GOOD, "targets": [float("nan")]}, "targets is"),
        ({**GOOD, "targets": [0]}, "targets is"),
        ({**GOOD, "targets": [-0.1]}, "targets is"),
        ({**GOOD, "targets": [True]}, "targets is"),
        ({**GOOD, "band": float("inf")}, "band is inf"),
        ({**GOOD, "methods": "knn"}, "methods is 'knn'"),
        ({**GOOD, "methods": [["knn"]]}, "methods is"),
        ({**GOOD, "methods": ["knn", "knn"]}, "each once"),
        ({**GOOD, "methods": None}, "methods is None"),
        ({**GOOD, "device": 3}, "device is 3"),
        ({**GOOD, "device": "cuda:0\n"}, "device is"),
        ({**GOOD, "dtype": []}, "dtype is"),
        ({**GOOD, "cache": 3}, "cache is 3"),
        ({**GOOD, "parameters": {3: [{}]}}, "lists of mappings of parameters"),
        ({**GOOD, "parameters": [1]}, "lists of mappings of parameters"),
        ({"workloads": GOOD["workloads"] * 2}, "two workloads share a case"),
        ({"workloads": [{"name": 5, "lengths": [8]}]}, "name is 5; there are: glove-paper"),
        ({"workloads": [{"name": "glove-split", "lengths": 8}]}, "lengths is 8"),
        ({"workloads": [{"name": "glove-split", "lengths": [[8]]}]}, "lengths is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8, 8]}]}, "each once"),
        ({"workloads": [{"name": "glove-split", "lengths": [8.0]}]}, "lengths is"),
        ({"workloads": [{"name": "glove-split", "lengths": ["8" * 500]}]}, "lengths is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "batches": [True]}]}, "batches is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "rows": 1e9}]}, "rows is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "path": 8}]}, "path is 8"),
        ({"workloads": [3]}, "a list of mappings"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "causal": 1}]}, "causal is 1; give true or false"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "queries": [0]}]}, "queries is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "queries": []}]}, "queries is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "queries": [9]}]}, "more than the 8 keys"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "queries": [1], "causal": True}]}, "a query for each"),
        ({**GOOD, "relative_to": "v"}, "relative_to is 'v'"),
        ({**GOOD, "relative_to": []}, "relative_to is"),
        ({**GOOD, "relative_to": ["answer", "answer"]}, "relative_to is"),
        ({"workloads": None}, "a list of mappings"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SweepSettings.from_mapping(given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"repeats": ' + b"9" * 6000 + b"}",
        b'{"targets": [NaN]}',
        b"null",
        b" " * 2**18 + b"{}",
    ],
)
def test_a_file_that_holds_no_settings_is_one_line(content, tmp_path):
    path = tmp_path / "sweep.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_settings(path, tmp_path / "out.csv")
    assert "\n" not in str(caught.value)


def test_a_record_does_not_overwrite_the_settings(tmp_path):
    from typer.testing import CliRunner

    from approxkmv.cli import app

    settings = tmp_path / "sweep.json"
    settings.write_text(json.dumps(GOOD))
    result = CliRunner().invoke(app, ["sweep", "--out", str(tmp_path / "sweep.csv"), "--settings", str(settings)])
    with pytest.raises(ConfigError, match="would overwrite its settings"):
        raise result.exception
    assert json.loads(settings.read_text()) == GOOD


def test_a_home_folder_is_found_wherever_a_path_is_read(monkeypatch, tmp_path):
    from approxkmv.config.reading import checked
    from approxkmv.yaml_text import read_yaml

    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"name": "glove-split", "lengths": [64], "path": "~/v.npy", "tuning_path": None}
    settings = SweepSettings.from_mapping({"workloads": [given]})
    assert settings.workloads[0].path == str(tmp_path / "v.npy")
    config = read_yaml(Path(__file__).parents[2] / "config.yaml") | {"cache": "~/cache"}
    assert checked(config).cache == str(tmp_path / "cache")


def test_what_fits_at_the_ends_of_a_range():
    within = Annotated[float, above(0, below=1)]
    assert all(fits(value, Annotated[int, between(1, 4)]) for value in (1, 4))
    assert not any(fits(value, Annotated[int, between(1, 4)]) for value in (0, 5, 2.0, True))
    assert fits(0.5, within)
    assert fits(3, float), "a whole number is a number"
    assert not any(fits(value, within) for value in (0, 0.0, 1, 1.0, float("nan"), True, "0.5"))
    assert not fits(float("inf"), Annotated[float, above(0)])


def test_a_value_is_quoted_in_at_most_a_hundred_letters():
    assert shown("x" * 98) == f"'{98 * 'x'}'"
    assert shown("x" * 99) == f"'{96 * 'x'}..."
