"""A sweep's settings from a JSON file of its own, for a machine without the packages that config.yaml needs."""

from __future__ import annotations

import json
from pathlib import Path

from approxkmv.errors import ConfigError
from approxkmv.sweep.settings import SweepSettings


def read_settings(path: Path, out: Path) -> SweepSettings:
    """The settings in a JSON file with the keys of one entry of `sweeps`, for a table `out`.

    Raises ConfigError in one line, also where the table's record would overwrite the settings.
    """
    if path.resolve() == out.with_suffix(".json").resolve():
        raise ConfigError(f"the record of the sweep would overwrite its settings {path}: choose another --out")
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        # Beside what is no JSON: a number of thousands of digits, or lists in lists without end.
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds no sweep: it must be an object with workloads")
    return SweepSettings.from_mapping(given)
