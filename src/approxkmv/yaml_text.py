"""YAML that contains only plain values, read in bounded time: the form of a configuration."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

from approxkmv.errors import ConfigError

# Bytes, entries (or 16 letters of a text) with every alias expanded, and levels: far beyond any configuration, and read
# in a second or two.
LARGEST_FILE = 2**18
MOST_ENTRIES = 10_000
MOST_LEVELS = 30
# Every generator accepts seeds of 32 bits; no other number is larger.
LARGEST_NUMBER = 2**32 - 1
# YAML 1.1 reads 12:30 as 750 and 017 as 15.
SURPRISING = re.compile(r"[-+]?(0[0-9_]+$|[0-9_]+:)")


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises ConfigError, in one line, for a file that is not YAML or not a configuration."""
    import yaml

    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {path} is not UTF-8 text: {error.reason}") from error
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{path} has more than {LARGEST_FILE:,} bytes: it is not a configuration")

    class Loader(yaml.SafeLoader):
        nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            # Stops early: a huge file takes seconds, and need not be read to its end.
            self.nodes += 1
            if self.nodes > 2 * MOST_ENTRIES:  # a key and its value
                raise ConfigError(f"{path} has more than {MOST_ENTRIES:,} entries: it is not a configuration")
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
    except (ArithmeticError, LookupError, ValueError, AttributeError) as error:
        # Numbers of thousands of digits, or of none, a month 13, "\UFFFFFFFF"; what is tagged !!bool and is not one.
        raise ConfigError(f"{path} has a value that cannot be read: {error}") from error


def _count_entries(node: Any, path: Path, known: dict[int, int], above: tuple[int, ...]) -> int:
    """The number of entries of a node with its aliases expanded.

    Raises ConfigError for duplicate keys, of which YAML silently keeps the last, for keys that are not single words,
    for numbers in base 8 or 60, for a node that contains itself, and for more entries or levels than a configuration
    has.
    """
    import yaml

    line = node.start_mark.line + 1 if node is not None else 1
    if id(node) in above:
        raise ConfigError(f"{path}: the value that starts at line {line} contains itself")
    if len(above) > MOST_LEVELS:
        raise ConfigError(f"{path} is nested too deeply for a configuration, at line {line}")
    if id(node) not in known:
        parts: list[Any] = []
        # A text counts for as many entries as short words that it could be.
        own = 1 + (len(node.value) // 16 if isinstance(node, yaml.ScalarNode) else 0)
        number = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))
        if number and SURPRISING.match(node.value):
            raise ConfigError(
                f"{path}: YAML does not read {node.value} as a decimal number, at line {line}: write one, or use quotes"
            )
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, item in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{path} has a key that is not a word, at line {key.start_mark.line + 1}")
                if key.value in seen:
                    raise ConfigError(
                        f"{path} has the key {key.value!r} twice, again at line {key.start_mark.line + 1}"
                    )
                seen.add(key.value)
                parts.append(item)
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = own + sum(_count_entries(part, path, known, (*above, id(node))) for part in parts)
    if known[id(node)] > MOST_ENTRIES:
        raise ConfigError(f"{path} has more than {MOST_ENTRIES:,} entries once its aliases are expanded")
    return known[id(node)]


def refuse_what_is_not_plain(value: Any, place: str = "config", level: int = 0) -> None:
    """Raise ConfigError, naming the place, for a value that JSON does not have, or that no file or figure can hold.

    Refuses keys that are not strings; numbers that are not finite or beyond LARGEST_NUMBER; and strings with line
    breaks, other control characters or half surrogate pairs.
    """
    if level > MOST_LEVELS:
        raise ConfigError(f"{place[:100]}... is nested too deeply for a configuration")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{place} has the key {key!r:.40}, which is not text: put it in quotes")
            refuse_what_is_not_plain(key, f"{place}: a key", level + 1)
            refuse_what_is_not_plain(item, f"{place}.{key}", level + 1)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            refuse_what_is_not_plain(item, f"{place}.{number}", level + 1)
    elif isinstance(value, str):
        bad = next((mark for mark in value if unicodedata.category(mark) in ("Cc", "Cs", "Zl", "Zp")), None)
        if bad is not None:
            raise ConfigError(f"{place} has {bad!a} in it, which is not a printable character: write it on one line")
    elif isinstance(value, (int, float)):
        # Also NaN, which is not within any bounds.
        if not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
            found = value if isinstance(value, float) else f"a number of {value.bit_length()} bits"
            raise ConfigError(f"{place} is {found}: numbers are finite and at most {LARGEST_NUMBER:,}")
    elif value is not None:
        raise ConfigError(f"{place} is a {type(value).__name__}: write a number, a text in quotes, or a list")
