"""A sweep's settings from a JSON file of its own, for a machine without the packages that config.yaml needs."""

from __future__ import annotations

import json
from pathlib import Path

from approxkmv.errors import ConfigError
from approxkmv.sweep.settings import SweepSettings


def read_settings(path: Path) -> SweepSettings:
    """The settings in a JSON file with the keys of one entry of `sweeps`. Raises ConfigError in one line."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings {path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds no sweep: it must be an object with workloads")
    return SweepSettings.from_mapping(given)
