"""Read config.yaml and check it: an error is one line that names its place and the closest valid key."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from approxkmv.attention import check_name
from approxkmv.config.documents import keys_at
from approxkmv.config.keys import Configuration, Section
from approxkmv.config.paths import moved
from approxkmv.errors import ApproxKMVError, ConfigError, did_you_mean
from approxkmv.files import write_text
from approxkmv.typed import shown
from approxkmv.yaml_text import read_yaml, refuse_what_is_not_plain

S = TypeVar("S", bound=Section)


def load_config(path: Path) -> Configuration:
    """The configuration in a YAML file, checked, with defaults filled in. Raises ConfigError in one line.

    Its paths, which are relative to the file, become relative to the working folder.
    """
    return checked(moved(read_yaml(path), path.parent, Path()))


def checked(value: Any) -> Configuration:
    """A configuration with its defaults. Raises ConfigError, which names the wrong key and the closest valid one."""
    config = read_as(Configuration, value)
    config = config.model_copy(update={"cache": os.path.expanduser(config.cache)})
    known(config.study, config.studies, "study is")
    for name, study in config.studies.items():
        for model in study.models:
            known(model, config.models, f"studies.{name}.models names the model")
        if study.models and study.corpus is None:
            raise ConfigError(f"studies.{name} names models but no corpus: add one of {', '.join(config.corpora)}")
        if study.corpus is not None:
            known(study.corpus, config.corpora, f"studies.{name}.corpus names the corpus")
        if study.sweep is not None:
            known(study.sweep, config.sweeps, f"studies.{name}.sweep names the sweep")
        if study.perplexity is not None:
            _check_part(f"studies.{name}.perplexity", study.perplexity, config)
            with naming(f"studies.{name}.perplexity.methods"):
                for method in study.perplexity.methods:
                    check_name(method)
    for name, sweep in config.sweeps.items():
        if sweep.capture is not None:
            _check_part(f"sweeps.{name}.capture", sweep.capture, config)
            known(sweep.capture.corpora[1], config.corpora, f"sweeps.{name}.capture.tuning_corpus names the corpus")
        with naming(f"sweeps.{name}"):
            for method in sweep.methods:
                check_name(method)
            if sweep.parameters:
                sweep.check_methods()
    return config


def read_as(kind: type[S], value: Any, origin: str = "config") -> S:
    """A part of a configuration alone, with its defaults. Raises ConfigError, which names the value's origin."""
    refuse_what_is_not_plain(value, origin)
    try:
        # By the rules of JSON neither a string nor a boolean is a number.
        return kind.model_validate_json(json.dumps(_whole_numbers(value)), strict=True)
    except ValidationError as error:
        raise ConfigError(min(_one_line(one, origin) for one in error.errors())[1]) from error


def settings_file(config: Configuration, path: Path) -> Path:
    """Write a checked configuration to `path` unless it is already there with the same content; returns the path."""
    import yaml

    text = "# Written by the workflow: the configuration of this run, with defaults filled in.\n"
    text += yaml.safe_dump(
        moved(config.model_dump(mode="json"), Path(), path.parent), sort_keys=True, allow_unicode=True
    )
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return path


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Prefix errors with their place in the configuration."""
    try:
        yield
    except ApproxKMVError as error:
        raise ConfigError(f"{place}: {error}") from error


def known(name: str, names: Mapping[str, Any], what: str) -> None:
    """Raise ConfigError, with the closest name, unless the name exists."""
    if name not in names:
        raise ConfigError(f"{what} {name!r}, which does not exist; {did_you_mean(name, names, 'there is', 0.5)}")


def _check_part(place: str, part: Any, config: Configuration) -> None:
    known(part.model, config.models, f"{place} names the model")
    known(part.corpus, config.corpora, f"{place} names the corpus")


def _one_line(error: Any, origin: str) -> tuple[int, str]:
    """How deep in the configuration an error is, and the line that reports it."""
    place: tuple[Any, ...] = error["loc"]
    kind, value, above, last = error["type"], error["input"], place[:-1], place[-1] if place else None
    if kind == "extra_forbidden":
        near = did_you_mean(last, keys_at(above), "there are", 0.4)
        return len(above), f"{_dotted(origin, above)} has the unknown key {last!r}; {near}"
    if kind == "missing":
        return len(above), f"{_dotted(origin, above)} lacks the key {last!r}"
    message = str(error["ctx"]["error"]) if kind == "value_error" else error["msg"].replace("Input should", "it must")
    if last == "[key]":
        return len(above), f"{_dotted(origin, above[:-1])} has the name {shown(value)}: {message}"
    return len(place), f"{_dotted(origin, place)}{'' if isinstance(value, dict) else f' is {shown(value)}'}: {message}"


def _dotted(origin: str, place: Sequence[Any]) -> str:
    return f"{origin}: {'.'.join(map(str, place))}" if place else origin


def _whole_numbers(value: Any) -> Any:
    """The value with 3.0, which JSON Schema accepts as an integer, replaced by 3."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
