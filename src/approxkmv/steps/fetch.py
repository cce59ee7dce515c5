"""From a model of the catalogue to a folder on disk, and the JSON file that says where and what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.config import ModelEntry, Study
from approxkmv.errors import ConfigError, SourceError, TableError
from approxkmv.files import sha256, write_json
from approxkmv.models import ModelLocation, fetch, parse_source
from approxkmv.models.folders import RECORD
from approxkmv.models.sources import PathSource, identity

if TYPE_CHECKING:
    from approxkmv.models import CapturableModel


def fetch_model(entry: ModelEntry, cache: Path, out: Path) -> ModelLocation:
    """Fetch or find the model, and write its location. Raises SourceError in one line."""
    location = fetch(
        parse_source(entry.source), cache / "models" / entry.name, sha256=entry.sha256, files=dict(entry.files)
    )
    write_json(
        out,
        {
            "folder": str(location.folder),
            "gguf_file": location.gguf_file,
            "source": entry.source,
            "name": entry.name,
            "identity": _identity(entry.source, location.folder),
        },
    )
    return location


def _identity(source: str, folder: Path) -> str:
    """Identifies the weights of a source: for a path by its files, otherwise by the hashes of what was fetched.

    Raises SourceError when files are missing.
    """
    parsed = parse_source(source)
    if isinstance(parsed, PathSource):
        return identity(parsed.path)
    # The hub's cache names folders by commit, and unpacked models have a record of their hashes.
    return sha256(folder / RECORD) if (folder / RECORD).is_file() else folder.name


def read_location(path: Path) -> ModelLocation:
    """The location that fetch_model wrote. Raises TableError if it is missing, or the model is gone or has changed."""
    value = _read(path)
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


def load_model(study: Study, location: Path) -> CapturableModel:
    """The model at a location as the study runs it. Raises ConfigError for a device that does not exist."""
    import torch

    from approxkmv.models import CapturableModel

    if study.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"study {study.name} asks for device cuda, but there is none here: set device to cpu")
    return CapturableModel.load(
        read_location(location),
        dtype=study.dtype,
        device=study.device,
        rotary_scaling=dict(study.rotary_scaling) if study.rotary_scaling else None,
    )


def origin(location: Path, texts: Path) -> str:
    """The weights and texts that a shard is made from, as a string. Raises TableError when either cannot be read."""
    try:
        return f"weights {_read(location)['identity']}, texts {sha256(texts)}"
    except OSError as error:
        raise TableError(f"{texts} cannot be read ({error.strerror}): run texts again") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: value[key] for key in ("folder", "gguf_file", "source", "identity")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableError(f"{path} cannot be read ({error}): run fetch again") from error
