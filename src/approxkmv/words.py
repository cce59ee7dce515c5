"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number and its noun in the singular or plural.

    >>> counted(1, "head"), counted(0, "text")
    ('1 head', '0 texts')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
