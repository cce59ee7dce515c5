"""Settings of a sweep from dictionaries, and the one line that a mistake gets."""

import json

import pytest

from approxkmv.errors import ConfigError
from approxkmv.sweep import SweepSettings

GOOD = {"workloads": [{"name": "glove-split", "lengths": [128, 256]}]}


def test_lists_become_tuples_and_defaults_hold():
    settings = SweepSettings.from_mapping({**GOOD, "targets": [0.1]})
    assert settings.targets == (0.1,)
    assert settings.workloads[0].lengths == (128, 256)
    assert settings.repeats >= 9
    assert len(settings.seeds) >= 10
    assert settings.as_dict()["workloads"][0]["name"] == "glove-split"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**GOOD, "target": [0.1]}, "did you mean 'targets'"),
        ({"workloads": [{"name": "glove-spilt", "lengths": [8]}]}, "did you mean 'glove-split'"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "colums": ["one"]}]}, "did you mean 'columns'"),
        ({"workloads": [{"name": "glove-split", "lengths": [0]}]}, "lengths is"),
        ({"workloads": [{"name": "glove-split"}]}, "lengths"),
        ({"workloads": [{"name": "model-qk", "lengths": [8]}]}, "path is missing"),
        ({"workloads": []}, "workloads is empty"),
        ({**GOOD, "seeds": [1, 1000]}, "overlap"),
        ({**GOOD, "dtype": "float16"}, "dtype is 'float16'"),
        ({**GOOD, "device": "gpu"}, "device is 'gpu'"),
        ({**GOOD, "seeds": []}, "seeds is"),
        ({**GOOD, "tuning_seeds": []}, "tuning_seeds is"),
        ({**GOOD, "threads": 0}, "threads is 0"),
        ({**GOOD, "repeats": 2.5}, "repeats is 2.5"),
        ({**GOOD, "targets": ["0.1"]}, "targets is"),
        ({**GOOD, "band": -1}, "band is -1"),
        ({**GOOD, "parameters": {"uniform": {"samples": 8}}}, "a list of parameter sets"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "batches": [0]}]}, "batches is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "columns": []}]}, "columns is"),
        ({"workloads": [{"name": "glove-split", "lengths": [8], "heads": [-1]}]}, "heads is"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SweepSettings.from_mapping(given)
    assert "\n" not in str(caught.value)


def test_a_record_does_not_overwrite_the_settings(tmp_path):
    from approxkmv.cli import sweep

    settings = tmp_path / "sweep.json"
    settings.write_text(json.dumps(GOOD))
    with pytest.raises(ConfigError, match="would overwrite its settings"):
        sweep(out=tmp_path / "sweep.csv", settings=settings)
    assert json.loads(settings.read_text()) == GOOD
