"""Read config.yaml, check it against its schema, and hand out what a step needs."""

from __future__ import annotations

import copy
import difflib
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.attention import check_name
from approxkmv.errors import ApproxKMVError, ConfigError
from approxkmv.yaml_text import read_yaml, refuse_what_is_not_plain

if TYPE_CHECKING:
    from approxkmv.sweep.settings import SweepSettings

SCHEMA = Path(__file__).resolve().parents[2] / "workflow" / "schemas" / "config.schema.yaml"


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue."""

    name: str
    source: str
    sha256: str | None
    files: Mapping[str, str]
    label: str
    paper_bound: float


@dataclass(frozen=True)
class CorpusEntry:
    """One corpus."""

    name: str
    source: str
    sha256: str | None
    label: str


@dataclass(frozen=True)
class Study:
    """A study with everything it needs; fields as in the schema."""

    name: str
    models: Mapping[str, ModelEntry]
    corpus: CorpusEntry | None
    complexity: Mapping[str, Any] | None
    sweep: Mapping[str, Any] | None
    sweep_name: str | None
    perplexity: Mapping[str, Any] | None
    unit: str
    contexts: int | None
    seed: int
    min_tokens: int
    max_tokens: int
    min_prefix: int
    prefixes: tuple[int, ...]
    dtype: str
    device: str
    batch_tokens: int
    shard_contexts: int
    rotary_scaling: Mapping[str, Any] | None
    lengths: tuple[int, ...]


def load_config(path: Path) -> dict[str, Any]:
    """The configuration in a YAML file, checked, with defaults filled in. Raises ConfigError in one line."""
    return checked(read_yaml(path))


def checked(value: Any) -> dict[str, Any]:
    """A copy with defaults filled in. Raises ConfigError, which names the wrong key and the nearest right one."""
    import jsonschema
    import yaml

    refuse_what_is_not_plain(value)
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    config = copy.deepcopy(value)
    validator = jsonschema.Draft202012Validator(schema)
    for error in sorted(validator.iter_errors(config), key=lambda e: (len(e.absolute_path), str(e.absolute_path))):
        raise ConfigError(_one_line(error))
    _fill(config, schema)
    config = _whole_numbers(config)
    for name, study in config["studies"].items():
        for model in study["models"]:
            _known(model, config["models"], f"studies.{name}.models names the model")
        if study["models"] and study["corpus"] is None:
            raise ConfigError(f"studies.{name} names models but no corpus: add one of {', '.join(config['corpora'])}")
        if study["corpus"] is not None:
            _known(study["corpus"], config["corpora"], f"studies.{name}.corpus names the corpus")
        if study["sweep"] is not None:
            _known(study["sweep"], config["sweeps"], f"studies.{name}.sweep names the sweep")
        if study["perplexity"] is not None:
            _check_perplexity(name, study["perplexity"], config)
        if not study["models"] and all(study[part] is None for part in ("complexity", "sweep", "perplexity")):
            raise ConfigError(
                f"studies.{name} has nothing to do: give it models and a corpus, a sweep, perplexity or complexity"
            )
        if study["min_tokens"] > study["max_tokens"]:
            raise ConfigError(f"studies.{name}: min_tokens is above max_tokens")
        if study["lengths"] and max(study["lengths"]) > study["max_tokens"]:
            raise ConfigError(f"studies.{name}: the longest of lengths is above max_tokens, to which texts are cut")
        if study["min_prefix"] > study["min_tokens"]:
            raise ConfigError(f"studies.{name}: min_prefix is above min_tokens, so some texts would have no prefix")
        low, high = study["min_prefix"], study["max_tokens"]
        if study["models"] and not any(low <= prefix <= high for prefix in study["prefixes"]):
            raise ConfigError(f"studies.{name}: none of prefixes is between min_prefix {low} and max_tokens {high}")
    _known(config["study"], config["studies"], "study is")
    for name, sweep in config["sweeps"].items():
        _check_sweep(name, sweep, config)
    return config


def study_of(config: Mapping[str, Any], name: str | None = None) -> Study:
    """The study of a checked configuration, by name or the one it selects. Raises ConfigError for an unknown name."""
    name = config["study"] if name is None else name
    _known(name, config["studies"], "study is")
    entry = dict(config["studies"][name])
    if entry["perplexity"] is not None:
        # Only of the study that runs: it takes torch.
        from approxkmv.perplexity.settings import chosen_methods

        with _naming(f"studies.{name}.perplexity.methods"):
            chosen_methods(entry["perplexity"]["methods"])
    if entry["corpus"] is not None:
        entry["corpus"] = corpus_entry(config, entry["corpus"])
    entry["models"] = {key: model_of(config, key) for key in entry["models"]}
    entry["sweep_name"] = entry["sweep"]
    entry["sweep"] = None if entry["sweep"] is None else config["sweeps"][entry["sweep"]]
    for user in (entry["perplexity"], (entry["sweep"] or {}).get("capture")):
        if user is not None:
            model_of(config, user["model"])
            corpus_entry(config, user["corpus"])
    for key in ("prefixes", "lengths"):
        entry[key] = tuple(sorted(entry[key]))
    return Study(name=name, **entry)


def model_of(config: Mapping[str, Any], name: str) -> ModelEntry:
    """A model of a checked configuration's catalogue. Raises ConfigError for an unknown name or a bad source.

    Here and not in `checked`: a source that is not pinned stops those studies alone that use it.
    """
    from approxkmv.models.sources import parse_source

    _known(name, config["models"], "the model asked for is")
    model = config["models"][name]
    with _naming(f"models.{name}.source"):
        parse_source(model["source"])
    label = model["label"] or name
    return ModelEntry(name, model["source"], model["sha256"], model["files"], label, model["paper_bound"])


def corpus_entry(config: Mapping[str, Any], name: str) -> CorpusEntry:
    """A corpus of a checked configuration. Raises ConfigError for an unknown name or a bad source."""
    from approxkmv.corpora.sources import parse_corpus

    _known(name, config["corpora"], "the corpus asked for is")
    corpus = config["corpora"][name]
    # Here and not in `checked`: a source that is not pinned stops those studies alone that use it.
    with _naming(f"corpora.{name}.source"):
        parse_corpus(corpus["source"])
    return CorpusEntry(name, corpus["source"], corpus["sha256"], corpus["label"] or name)


def entry_of(study: Study, model: str) -> ModelEntry:
    """A model of a study. Raises ConfigError for an unknown name."""
    _known(model, study.models, f"the model asked of study {study.name} is")
    return study.models[model]


def corpus_of(study: Study) -> CorpusEntry:
    """The corpus of a study that has models. Raises ConfigError when it has none."""
    if study.corpus is None:
        raise ConfigError(f"study {study.name} has no corpus: it measures no model")
    return study.corpus


def sweep_settings(
    sweep: Mapping[str, Any], capture: str | None = None, tuning_capture: str | None = None
) -> SweepSettings:
    """A sweep of a checked configuration as run_sweep takes it; captures are the files of the workload model-qk."""
    from approxkmv.sweep.settings import SweepSettings

    given = {key: value for key, value in sweep.items() if key != "capture"}
    workloads = []
    for workload in sweep["workloads"]:
        filled = dict(workload)
        if filled["heads"] is None:
            filled["heads"] = list(range(len(sweep["capture"]["heads"]))) if sweep["capture"] else [0]
        if filled["name"] == "model-qk":
            filled |= {"path": capture or filled["path"], "tuning_path": tuning_capture}
        workloads.append(filled)
    return SweepSettings.from_mapping(given | {"workloads": workloads})


def _check_sweep(name: str, sweep: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    captured = sweep["capture"]
    if captured is not None:
        _known(captured["model"], config["models"], f"sweeps.{name}.capture names the model")
        _known(captured["corpus"], config["corpora"], f"sweeps.{name}.capture names the corpus")
    for workload in sweep["workloads"]:
        if workload["name"] == "model-qk" and captured is None and workload["path"] is None:
            raise ConfigError(f"sweeps.{name} has the workload model-qk and no capture: say which heads of which model")
    settings = sweep_settings(sweep, "capture")
    with _naming(f"sweeps.{name}"):
        for method in settings.methods:
            check_name(method)
        if settings.parameters:
            settings.check_methods()


def _check_perplexity(name: str, perplexity: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    place = f"studies.{name}.perplexity"
    _known(perplexity["model"], config["models"], f"{place} names the model")
    _known(perplexity["corpus"], config["corpora"], f"{place} names the corpus")
    with _naming(f"{place}.methods"):
        for method in perplexity["methods"]:
            check_name(method)


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Say in front of an error which part of the configuration it is in."""
    try:
        yield
    except ApproxKMVError as error:
        raise ConfigError(f"{place}: {error}") from error


def _known(name: str, names: Mapping[str, Any], what: str) -> None:
    if name not in names:
        raise ConfigError(f"{what} {name!r}, which is not there{_nearest(name, names)}")


def _nearest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(sorted(map(str, words)))}" if words else "; there is none"


def _one_line(error: Any) -> str:
    where = ".".join(str(part) for part in error.absolute_path)
    place = f"config: {where}" if where else "config"
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        allowed = error.schema.get("properties", {})
        wrong = next(key for key in error.instance if key not in allowed)
        return f"{place} has the unknown key {wrong!r}{_nearest(wrong, allowed)}"
    if error.validator == "pattern" and "propertyNames" in error.absolute_schema_path:
        return f"{place} has the name {error.instance!r}: names are of letters, digits, dots and hyphens"
    if error.validator == "required":
        return f"{place} lacks a key: {error.message}"
    if error.validator == "type":
        wanted = error.validator_value
        wanted = " or ".join(wanted) if isinstance(wanted, list) else wanted
        return f"{place} is {reprlib.repr(error.instance)}: it must be of type {wanted}"
    return f"{place}: {' '.join(error.message.split()):.300}"


def _whole_numbers(value: Any) -> Any:
    """The same with 3.0, which JSON Schema takes for a whole number, as 3."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _fill(value: Any, schema: Mapping[str, Any]) -> None:
    """Put the schema's defaults where keys are absent."""
    if isinstance(value, list):
        for item in value:
            _fill(item, schema.get("items", {}))
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key, part in properties.items():
            if key not in value and "default" in part:
                value[key] = copy.deepcopy(part["default"])
        for key, item in value.items():
            part = properties.get(key, schema.get("additionalProperties"))
            if isinstance(part, Mapping):
                _fill(item, part)


def settings_file(config: Mapping[str, Any], path: Path) -> Path:
    """Write a checked configuration to `path` unless it is there already with the same content; returns the path."""
    import yaml

    from approxkmv.files import write_text

    text = "# Written by the workflow: the configuration of this run, with defaults filled in.\n"
    text += yaml.safe_dump(dict(config), sort_keys=True, allow_unicode=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return path
