"""Lists of layers as a user writes them: "all", or numbers and ranges such as 0,5-9."""

from __future__ import annotations

import re
from collections.abc import Sequence

from approxkmv.errors import InputError


def parse_layers(text: str, n_layers: int, every: Sequence[int] | None = None) -> list[int]:
    """The layers named, counted from 0, without duplicates and in order; `every` are those that "all" names.

    >>> parse_layers("0,5-9", 30)
    [0, 5, 6, 7, 8, 9]

    Raises InputError for another form, for a layer the model does not have, and for an empty list.
    """
    if text.strip() == "all":
        return list(range(n_layers) if every is None else every)
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise InputError(f"layers is {text!r}: write all, or numbers and ranges such as 0,5-9")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise InputError(f"layers names {part.strip()}, which ends before it begins")
        if last >= n_layers:
            raise InputError(f"layers names {part.strip()}, but the model has layers 0 to {n_layers - 1}")
        found.update(range(first, last + 1))
    return sorted(found)
