"""The paths in a configuration, which are relative to the file that names them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from approxkmv.yaml_text import read_yaml

# Of a model or corpus, after path:, and of a sweep's workload.
SOURCE, FILES = "source", ("path", "tuning_path")


def moved(value: Any, start: Path, base: Path) -> Any:
    """A configuration whose paths are relative to `start` with paths relative to `base`."""
    if start.resolve() == base.resolve():
        # As written, so that a record of them says what the configuration says.
        return value
    if isinstance(value, list):
        return [moved(item, start, base) for item in value]
    if isinstance(value, dict):
        return {key: _moved_text(key, item, start, base) for key, item in value.items()}
    return value


def relocate(config: Any, files: Sequence[Path]) -> None:
    """In the merged contents of `files`, of which later ones prevail, make paths relative to the working folder."""
    done: set[tuple[Any, ...]] = set()
    for file in reversed(files):
        if file.exists():
            value = read_yaml(file)
            _relocate(config, value, moved(value, file.parent, Path()), (), done)


def _relocate(config: Any, value: Any, there: Any, place: tuple[Any, ...], done: set[tuple[Any, ...]]) -> None:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        try:
            now = config[key]
        except (KeyError, IndexError, TypeError):
            continue
        if isinstance(value[key], (dict, list)):
            _relocate(now, value[key], there[key], (*place, key), done)
        elif now == value[key] and (*place, key) not in done:
            config[key] = there[key]
            done.add((*place, key))


def _moved_text(key: Any, value: Any, start: Path, base: Path) -> Any:
    if not isinstance(value, str):
        return moved(value, start, base)
    kind, colon, rest = value.partition(":")
    if key == SOURCE and kind == "path":
        return f"path:{_relative(rest, start, base)}"
    return _relative(value, start, base) if key in FILES and not (colon and kind == "npm") else value


def _relative(path: str, start: Path, base: Path) -> str:
    if not path or path.startswith("~") or os.path.isabs(path):
        return path
    return os.path.relpath(start / path, base)
