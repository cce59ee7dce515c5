"""YAML that holds nothing but plain values, in bounded time: what a configuration may be made of."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from approxkmv.errors import ConfigError

# Bytes, entries with every alias written out, and levels: far beyond any configuration, and read in a second or two.
LARGEST_FILE = 2**18
MOST_ENTRIES = 10_000
MOST_LEVELS = 30
# Seeds of 32 bits are taken by every generator; no other number is larger.
LARGEST_NUMBER = 2**32 - 1


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises ConfigError, in one line, for a file that is not YAML or is no configuration."""
    import yaml

    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {path} is not UTF-8 text: {error.reason}") from error
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{path} has more than {LARGEST_FILE:,} bytes: it is no configuration")

    class Loader(yaml.SafeLoader):
        nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            # While it is read: a file of nothing but entries takes seconds, and need not be read to its end.
            self.nodes += 1
            if self.nodes > 2 * MOST_ENTRIES:  # a key and its value
                raise ConfigError(f"{path} has more than {MOST_ENTRIES:,} entries: it is no configuration")
            return super().compose_node(parent, index)

    try:
        loader = Loader(text)
        node = loader.get_single_node()
        _count_entries(node, path, {}, ())
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is not YAML{where}: {getattr(error, 'problem', error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply for a configuration") from error
    except (ValueError, KeyError, AttributeError) as error:
        # A number of thousands of digits, a month 13; what is tagged !!bool or !!timestamp and is none.
        raise ConfigError(f"{path} has a value that cannot be read: {error}") from error


def _count_entries(node: Any, path: Path, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many entries a node has with its aliases written out.

    Raises ConfigError for keys that stand twice, of which YAML keeps the last silently, for keys that are no single
    words, for what holds itself, and for more entries or levels than a configuration has.
    """
    import yaml

    line = node.start_mark.line + 1 if node is not None else 1
    if id(node) in above:
        raise ConfigError(f"{path}: what begins at line {line} holds itself")
    if len(above) > MOST_LEVELS:
        raise ConfigError(f"{path} is nested too deeply for a configuration, at line {line}")
    if id(node) not in known:
        parts: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, item in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{path} has a key that is no word, at line {key.start_mark.line + 1}")
                if key.value in seen:
                    raise ConfigError(
                        f"{path} has the key {key.value!r} twice, again at line {key.start_mark.line + 1}"
                    )
                seen.add(key.value)
                parts.append(item)
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_count_entries(part, path, known, (*above, id(node))) for part in parts)
    if known[id(node)] > MOST_ENTRIES:
        raise ConfigError(f"{path} has more than {MOST_ENTRIES:,} entries once its aliases are written out")
    return known[id(node)]


def refuse_what_is_not_plain(value: Any, place: str = "config", level: int = 0) -> None:
    """Raise ConfigError, naming the place, for a value that is none of JSON's, or that no file or figure can bear.

    Refused are keys that are no text; numbers that are not finite or beyond LARGEST_NUMBER; and text with line breaks,
    other control characters or halves of characters.
    """
    if level > MOST_LEVELS:
        raise ConfigError(f"{place[:100]}... is nested too deeply for a configuration")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{place} has the key {key!r:.40}, which is no text: put it into quotes")
            refuse_what_is_not_plain(key, f"{place}: a key", level + 1)
            refuse_what_is_not_plain(item, f"{place}.{key}", level + 1)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            refuse_what_is_not_plain(item, f"{place}.{number}", level + 1)
    elif isinstance(value, str):
        bad = next((mark for mark in value if unicodedata.category(mark) in ("Cc", "Cs", "Zl", "Zp")), None)
        if bad is not None:
            raise ConfigError(f"{place} has {bad!a} in it, which is no printable character: write it on one line")
    elif isinstance(value, (int, float)):
        # Also not a number, which is not within any bounds.
        if not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
            found = value if isinstance(value, float) else f"a number of {value.bit_length()} bits"
            raise ConfigError(f"{place} is {found}: numbers are finite and at most {LARGEST_NUMBER:,}")
    elif value is not None:
        raise ConfigError(f"{place} is a {type(value).__name__}: write a number, a text in quotes, or a list")
