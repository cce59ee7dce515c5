"""The configuration's keys are defined once; what is generated from them is up to date, agrees, and is in the wheel."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bad_inputs import configuration

from approxkmv.config import checked, corpus_of, entry_of, load_config, relocate, settings_file, study_of
from approxkmv.config.documents import document, json_schema, schema_text, sections
from approxkmv.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_schema_and_the_document_are_made_of_the_keys_as_they_are():
    assert (ROOT / "workflow/schemas/config.schema.yaml").read_text() == schema_text(), "approxkmv config schema"
    assert (ROOT / "docs/configuration.md").read_text() == document(), "approxkmv config document"


def test_every_key_is_explained():
    schema = json_schema()
    described = [schema, *schema["$defs"].values()]
    assert len(described) == len(list(sections()))
    for part in described:
        assert part["description"]
        for name, key in part["properties"].items():
            assert key.get("description"), f"{part['title']}.{name} has no text below it"


def is_taken(config: object) -> bool:
    try:
        checked(config)
    except ConfigError:
        return False
    return True


def test_the_schema_refuses_nothing_that_is_taken_and_knows_the_bounds():
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())
    validator.validate(yaml.safe_load((ROOT / "config.yaml").read_text()))
    validator.validate(configuration.good())
    refused = set()
    for name, place, value in configuration.CHANGES:
        config = part = configuration.good()
        *above, last = place.split(".")
        for key in above:
            part = part[int(key)] if isinstance(part, list) else part[key]
        part[int(last) if isinstance(part, list) else last] = copy.deepcopy(value)
        if not validator.is_valid(config):
            assert not is_taken(config), name
            refused.add(name)
    assert refused >= {
        *("an unknown key of a study", "an unknown key of a workload", "an unknown unit", "a seed of -1", "no seeds"),
        *("a thousand million threads", "a target that is 20", "a size twice", "two sizes", "a hash of other letters"),
        *("a name with an underscore", "a name of 300 letters", "a factor of 1", "a head with one number", "no cache"),
        *("perplexity without a method", "a method without parameter sets", "an empty source"),
    }


def test_a_wrong_key_in_a_study_that_is_called_as_a_key_is_named():
    config = configuration.good()
    config["studies"]["complexity"] = {"complexity": {"size": [1, 2, 3]}}
    with pytest.raises(ConfigError, match=r"studies.complexity.complexity has the unknown key 'size'; .* 'sizes'"):
        checked(config)


def test_a_study_of_lengths_needs_no_prefix():
    config = configuration.good()
    config["studies"]["tiny"] |= {"lengths": [16, 32], "max_tokens": 32, "min_tokens": 16, "min_prefix": 50}
    assert study_of(checked(config)).lengths == (16, 32)
    config["studies"]["tiny"]["max_tokens"] = 31
    with pytest.raises(ConfigError, match="the longest of lengths is above max_tokens"):
        checked(config)


def test_one_prefix_within_reach_is_enough_and_without_models_none_is_needed():
    for prefix in (10, 40):
        config = configuration.good()
        config["studies"]["tiny"] |= {"max_tokens": 40, "prefixes": [prefix]}
        assert study_of(checked(config)).prefixes == (prefix,)
    config["studies"]["tiny"] = {"complexity": {}, "max_tokens": 40, "min_tokens": 40, "min_prefix": 40}
    assert study_of(checked(config)).models == {}


@pytest.mark.parametrize(
    "user",
    [
        "studies.tiny.corpus",
        "studies.tiny.perplexity.corpus",
        "sweeps.s.capture.corpus",
        "sweeps.s.capture.tuning_corpus",
    ],
)
def test_a_source_without_a_revision_stops_the_studies_that_use_it_and_no_others(user):
    config = configuration.good()
    config["corpora"]["d"] = {"source": "hub:somebody/words"}
    config["studies"]["other"] = {"complexity": {}}
    part = config
    *above, last = user.split(".")
    for key in above:
        part = part[key]
    part[last] = "d"
    found = checked(config)
    other = study_of(found, "other")
    with pytest.raises(ConfigError, match="study other has no corpus"):
        corpus_of(other)
    with pytest.raises(ConfigError, match="study other is asked for the model 'm', which does not exist"):
        entry_of(other, "m")
    with pytest.raises(ConfigError, match=r"corpora.d.source: "):
        study_of(found)


def test_a_label_is_its_own_or_the_name():
    config = configuration.good()
    study = study_of(checked(config))
    assert (study.models["m"].label, study.corpus.label, study.sweep_name) == ("m", "c", "s")
    config["models"]["m"]["label"], config["corpora"]["c"]["label"] = "A model", "Words"
    study = study_of(checked(config))
    assert (study.models["m"].label, study.corpus.label, study.models["m"].name) == ("A model", "Words", "m")


def test_a_configuration_does_not_change_and_its_lengths_ascend():
    config = configuration.good()
    config["studies"]["tiny"] |= {"prefixes": [20, 10], "lengths": [32, 16]}
    study = study_of(checked(config))
    assert (study.prefixes, study.lengths) == ((10, 20), (16, 32))
    with pytest.raises(ValueError, match="frozen"):
        study.seed = 1
    with pytest.raises(ConfigError, match="study is '', which does not exist"):
        study_of(checked(config), "")


def test_whole_numbers_may_be_written_with_a_point():
    config = configuration.good()
    config["studies"]["tiny"]["seed"] = 3.0
    config["sweeps"]["s"]["workloads"][0]["lengths"] = [64.0]
    assert study_of(checked(config)).seed == 3
    assert study_of(checked(config)).sweep.workloads[0].lengths == (64,)


def test_what_the_workflow_writes_of_a_configuration_is_the_same_configuration(tmp_path):
    config = load_config(ROOT / "config.yaml")
    written = settings_file(config, tmp_path / "config.yaml")
    assert load_config(written) == config
    os.utime(written, (1, 1))
    settings_file(config, written)
    assert written.stat().st_mtime == 1, "the same content makes no step run again"
    other = config.model_copy(update={"study": "paper"})
    assert load_config(settings_file(other, written)) == other


def paths_of(sources: list[str], paths: list[str]) -> dict:
    """A part of a configuration with these sources of models, and these paths of workloads."""
    workloads = [{"path": path, "tuning_path": path, "label": "path:x"} for path in paths]
    models = {f"m{number}": {"source": source, "label": "path:x"} for number, source in enumerate(sources)}
    return {"study": "path:x", "models": models, "sweeps": {"s": {"workloads": workloads}}}


def test_paths_are_relative_to_the_file_that_names_them_and_of_two_files_to_the_later(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    kept = (["hub:o/n@r", "path:/m", "path:~/m"], ["~/v.npy", "/v.npy", "npm:p@1/v.json", ""])
    first = paths_of(["path:./m", "path:m", *kept[0]], ["v.npy", "c:v.npy", "npm", *kept[1]])
    moved = paths_of(["path:a/m", "path:a/m", *kept[0]], ["a/v.npy", "a/c:v.npy", "a/npm", *kept[1]])
    first["corpora"], moved["corpora"] = ({"c": {"source": path}} for path in ("path:c", "path:a/c"))
    Path("a/config.yaml").write_text(yaml.safe_dump(first))
    # What becomes the very words of the other file, and what it does not name.
    second = {"models": {"m1": {"source": "path:../m"}, "m5": {"source": "path:m"}}}
    Path("b/config.yaml").write_text(yaml.safe_dump(second))
    merged = copy.deepcopy(first)
    relocate(merged, [Path("a/config.yaml"), Path("none.yaml")])
    assert merged == moved
    merged = copy.deepcopy(first)
    merged["models"] |= copy.deepcopy(second["models"])
    merged["models"]["m0"]["source"], merged["corpora"] = "path:given", None
    merged["sweeps"]["s"]["workloads"] = merged["sweeps"]["s"]["workloads"][:1]
    merged["sweeps"]["s"]["workloads"][0]["tuning_path"] = None
    relocate(merged, [Path("a/config.yaml"), Path("b/config.yaml")])
    sources = {name: model["source"] for name, model in merged["models"].items()}
    assert sources == {
        **{f"m{number + 2}": source for number, source in enumerate(kept[0])},
        "m0": "path:given",
        "m1": "path:m",
        "m5": "path:b/m",
    }
    assert merged["sweeps"]["s"]["workloads"] == [{"path": "a/v.npy", "tuning_path": None, "label": "path:x"}]
    # In the file's own folder they stay as they are written.
    monkeypatch.chdir(tmp_path / "a")
    merged = copy.deepcopy(first)
    relocate(merged, [Path("config.yaml")])
    assert merged == first


def test_of_several_mistakes_the_outermost_is_named():
    config = configuration.good()
    config["sweeps"]["s"]["workloads"][0]["lengths"] = ["many"]
    config["studies"]["tiny"]["rotary_scaling"] = {"factor": "much"}
    config["models"]["m"]["colour"] = "red"
    with pytest.raises(ConfigError, match=r"models.m has the unknown key 'colour'"):
        checked(config)


@pytest.mark.parametrize(
    ("part", "name", "value", "line"),
    [
        (
            "models",
            "my_model",
            {"source": "path:model"},
            r"config: models has the name 'my_model': give a text of at most",
        ),
        ("studies", "tiny", {}, "config: studies.tiny: has nothing to do"),
        ("studies", "tiny", {"models": "m"}, "config: studies.tiny.models is 'm': it must be a valid array"),
    ],
)
def test_a_mistake_is_quoted_unless_it_is_a_whole_part(part, name, value, line):
    config = configuration.good()
    config[part][name] = value
    with pytest.raises(ConfigError, match=line):
        checked(config)


def test_a_sweep_that_no_study_names_is_checked_too():
    config = configuration.good()
    config["sweeps"]["other"] = copy.deepcopy(config["sweeps"]["s"])
    config["sweeps"]["other"]["capture"]["tuning_corpus"] = "d"
    with pytest.raises(ConfigError, match=r"sweeps.other.capture.tuning_corpus names the corpus 'd'"):
        checked(config)


def test_the_heads_of_a_capture_are_those_that_a_workload_names_or_all():
    config = configuration.good()
    config["sweeps"]["s"]["capture"]["heads"] = [[0, 1], [1, 0], [1, 1]]
    config["sweeps"]["s"]["workloads"][1:] = [
        {"name": "model-qk", "lengths": [64]},
        {"name": "model-qk", "lengths": [32], "heads": [2]},
        {"name": "model-qk", "lengths": [16], "path": "own.safetensors"},
    ]
    words, every, one, own = study_of(checked(config)).sweep.with_capture("a.safetensors", "b.safetensors").workloads
    assert words.path is None
    assert (every.heads, every.path, every.tuning_path) == ((0, 1, 2), "a.safetensors", "b.safetensors")
    assert (one.heads, one.path) == ((2,), "a.safetensors")
    assert (own.path, own.tuning_path) == ("own.safetensors", None)


@pytest.mark.slow
def test_an_installed_wheel_reads_its_configuration(tmp_path):
    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        copied = tmp_path / "project" / name
        copied.parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copied, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copied)
    build = "wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir"
    subprocess.run([sys.executable, "-m", "pip", *build.split(), tmp_path, tmp_path / "project"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    configuration.prepare(tmp_path)
    config = configuration.good()
    # The word vectors of its sweep are in a checkout alone.
    config["studies"]["tiny"]["sweep"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def check(*words):
        code = "import approxkmv.cli as cli; print(cli.__file__); cli.main()"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
        command = [sys.executable, "-c", code, "config", "check", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = check()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed"))
    done = check("--study", "tinny")
    assert done.returncode == 2
    assert "did you mean 'tiny'?" in done.stderr
