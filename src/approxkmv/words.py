"""Numbers in sentences."""

from __future__ import annotations


def significant(value: float) -> str:
    """A number above 0 to three digits, or to the unit.

    >>> significant(0.00571), significant(57.76), significant(12345.6)
    ('0.00571', '57.8', '12,346')
    """
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def counted(number: int, noun: str) -> str:
    """A number and its noun in the singular or plural.

    >>> counted(1, "head"), counted(0, "text")
    ('1 head', '0 texts')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
