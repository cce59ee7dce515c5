"""A model of the catalogue to a folder on disk, and the JSON file that says where it lies."""

from __future__ import annotations

import json
from pathlib import Path

from approxkmv.config import ModelEntry
from approxkmv.errors import TableError
from approxkmv.files import write_json
from approxkmv.models import ModelLocation, fetch, parse_source


def fetch_model(entry: ModelEntry, cache: Path, out: Path) -> ModelLocation:
    """Fetch or find the model, and write its location. Raises SourceError in one line."""
    location = fetch(
        parse_source(entry.source), cache / "models" / entry.name, sha256=entry.sha256, files=dict(entry.files)
    )
    write_json(
        out,
        {"folder": str(location.folder), "gguf_file": location.gguf_file, "source": entry.source, "name": entry.name},
    )
    return location


def read_location(path: Path) -> ModelLocation:
    """The location that fetch_model wrote. Raises TableError when it is missing or the model has gone."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        location = ModelLocation(Path(value["folder"]), value["gguf_file"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise TableError(f"{path} cannot be read ({error}): run fetch again") from error
    if not location.folder.is_dir():
        raise TableError(f"{path} names {location.folder}, which is gone: delete {path} and run again")
    return location
