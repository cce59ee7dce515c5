"""From a model of the catalogue to a folder on disk, and from there to a model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from approxkmv.config import ModelEntry, Study
from approxkmv.errors import SourceError
from approxkmv.models import ModelLocation, fetch, parse_source
from approxkmv.models.fetching import check_wheel, locate
from approxkmv.models.sources import PathSource
from approxkmv.results.locations import read_location, write_location
from approxkmv.steps.devices import check_device

if TYPE_CHECKING:
    from approxkmv.models import CapturableModel


def fetch_model(entry: ModelEntry, cache: Path, out: Path) -> ModelLocation:
    """Fetch or find the model, and write its location. Raises SourceError in one line."""
    location = fetch(
        parse_source(entry.source), cache / "models" / entry.name, sha256=entry.sha256, files=dict(entry.files)
    )
    write_location(out, location, entry.source, entry.name)
    return location


def check_model(entry: ModelEntry) -> None:
    """Raise SourceError for what would stop `fetch_model` and can be known without fetching anything."""
    source = parse_source(entry.source)
    if entry.sha256 is not None:
        check_wheel(source)
    if isinstance(source, PathSource):
        if not source.path.exists():
            raise SourceError(f"models.{entry.name}: {source.path} does not exist: correct its configured path")
        locate(source, entry.files)


def load_model(study: Study, model_name: str, location: Path) -> CapturableModel:
    """The model at its location as the study runs it.

    Raises ConfigError for a device that does not exist, TableError for the location of another model.
    """
    from approxkmv.models import CapturableModel

    check_device(study)
    return CapturableModel.load(
        read_location(location, model_name),
        dtype=study.dtype,
        device=study.device,
        rotary_scaling=dict(study.rotary_scaling) if study.rotary_scaling else None,
    )
