"""The JSON file that says where a model is and identifies its weights: what each shard depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from approxkmv.errors import SourceError, TableError
from approxkmv.files import file_sha256, write_json
from approxkmv.models import ModelLocation, parse_source
from approxkmv.models.folders import unchanged
from approxkmv.models.sources import HubSource, PathSource, PypiSource, identity
from approxkmv.typed import shown


def write_location(path: Path, location: ModelLocation, source: str, name: str) -> None:
    """Write where the model of a source is. Raises SourceError when its files are missing."""
    write_json(
        path,
        {
            "folder": str(location.folder),
            "gguf_file": location.gguf_file,
            "source": source,
            "name": name,
            "identity": _identity(source, location.folder),
        },
    )


def _identity(source: str, folder: Path) -> str:
    """Identifies the weights of a source that were put into or found in a folder.

    What was unpacked or converted is identified by the hashes that were recorded then, and files that are used where
    they lie by their names, sizes, times and beginnings. Raises SourceError when files are missing, or not as recorded.
    """
    match parse_source(source):
        case PathSource(path):
            # A GGUF file has been converted into a folder.
            return identity(path) if folder == path else f"{identity(path)} {unchanged(folder)}"
        case HubSource():
            return identity(folder)
        case PypiSource():
            return unchanged(folder)


def read_location(path: Path, model: str | None = None) -> ModelLocation:
    """The location that a file has, of the model with this name if one is given.

    Raises TableError if it is missing, of another model, or the model is gone or has changed.
    """
    value = _read(path)
    if model is not None and value["name"] not in (model, None):
        raise TableError(f"{path} says where the model {value['name']} is, not {model}: name the file of {model}")
    folder = Path(value["folder"])
    if not folder.is_dir():
        raise TableError(f"{path} names {folder}, which is gone: delete {path} and run again")
    try:
        found = _identity(value["source"], folder)
    except (OSError, SourceError) as error:
        raise TableError(f"{path} names a model that cannot be read ({error}): delete {path} and run again") from error
    if found != value["identity"]:
        raise TableError(
            f"the model in {folder} is not the one that {path} was written for: run fetch, or the study, again"
        )
    return ModelLocation(folder, value["gguf_file"])


def origin(location: Path, texts: Path, model: str) -> str:
    """What a shard is made from: model, weights and texts. Raises TableError when a file cannot be read."""
    try:
        return f"model {model}, weights {_read(location)['identity']}, texts {file_sha256(texts)}"
    except OSError as error:
        raise TableError(f"{texts} cannot be read ({error.strerror}): run texts again") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {key: value[key] for key in ("folder", "gguf_file", "source", "identity")} | {"name": value.get("name")}
        for key, word in found.items():
            if not isinstance(word, str) and (word is not None or key not in ("gguf_file", "name")):
                raise TypeError(f"{key} is {shown(word)}")
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TableError(f"{path} cannot be read ({error}): run fetch again") from error
