"""The exceptions that users see: each carries a one-line message that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ApproxKMVError(Exception):
    """Base of every error that the command line prints as one line, with exit code 2."""

    def __init__(self, message: object) -> None:
        # What is quoted from a file or another library may have several lines, or codes that a terminal would obey.
        shown = (c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in str(message))
        super().__init__("".join(shown).strip())


class InputError(ApproxKMVError, ValueError):
    """An argument of the Python interface has the wrong shape, type or range, or holds a non-finite value."""


class ConfigError(ApproxKMVError):
    """The configuration has an unknown key, a wrong type or a value out of range."""


class SourceError(ApproxKMVError):
    """A model or a text could not be fetched, or does not match its hash."""


class CaptureError(ApproxKMVError):
    """Queries and keys of this architecture cannot be captured."""


class NonFiniteError(ApproxKMVError):
    """A model produced an activation that is NaN or infinite."""


class TableError(ApproxKMVError):
    """A file that an earlier step wrote is missing, truncated or not what this step expects."""


class BusyError(ApproxKMVError):
    """Another run is using the same folder."""


class UnavailableError(ApproxKMVError):
    """A method cannot run on this device, with these shapes or in this memory; a sweep records why and goes on."""


def did_you_mean(word: object, words: Iterable[str], there: str, cutoff: float) -> str:
    """The end of a message about an unknown word: the closest known word or, if none is close, all of them."""
    words = list(words)
    near = difflib.get_close_matches(str(word), words, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else f"{there}: {', '.join(words) or 'none'}"


def one_line(error: BaseException) -> str:
    """The first non-blank line of an error's text, with the next one if it ends in a colon; or the error's type."""
    # The text of a missing key is the key alone.
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
