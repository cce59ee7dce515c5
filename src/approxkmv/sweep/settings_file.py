"""A sweep's settings from a separate JSON file, for a machine without the packages that config.yaml needs."""

from __future__ import annotations

import json
from pathlib import Path

from approxkmv.errors import ConfigError
from approxkmv.sweep.settings import SweepSettings
from approxkmv.yaml_text import LARGEST_FILE


def read_settings(path: Path, out: Path) -> SweepSettings:
    """The settings for a table `out`, from a JSON file with the keys of one entry of `sweeps`.

    Raises ConfigError in one line, also if the table's record would overwrite the settings.
    """
    if path.resolve() == out.with_suffix(".json").resolve():
        raise ConfigError(f"the record of the sweep would overwrite its settings {path}: choose another --out")
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ConfigError(f"{path} has more than {LARGEST_FILE:,} bytes: it is not a sweep")
        given = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        # Besides invalid JSON: a number with thousands of digits, or endlessly nested lists.
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path} is not a sweep: it must be an object with workloads")
    return SweepSettings.from_mapping(given)
