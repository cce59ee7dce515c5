"""What a person at the terminal sees: bars with the time left, and one line per finished step."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from approxkmv.errors import ApproxKMVError

LOG = logging.getLogger("approxkmv")


def on_terminal() -> bool:
    """Whether somebody sees stderr, and so the bars of pip and of the hub's library."""
    return sys.stderr.isatty()


def progress(total: int, unit: str, title: str) -> Any:
    """A tqdm bar on stderr, gone when done; silent where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total, unit=unit, desc=title, leave=False, dynamic_ncols=True, unit_scale=total > 10_000, disable=None
    )


def log_to(path: Path | None) -> None:
    """Send the lines of finished steps to stderr and, when given, to a log file as well."""
    # On a full disk the log cannot be written either: its lines are lost, without a traceback for each.
    logging.raiseExceptions = False
    LOG.setLevel(logging.INFO)
    LOG.handlers.clear()
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    LOG.addHandler(terminal)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, mode="w", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOG.addHandler(file)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For the workflow's own code: a user's mistake or a full disk is one line on stderr and exit code 2."""
    try:
        yield
    except ApproxKMVError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or 'a file'}: {error.strerror or error}"
    else:
        return
    print(f"approxkmv: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def step(title: str) -> Iterator[list[str]]:
    """Time a step and say in one line that it is done; what the block appends to the list is added to the line."""
    start = time.perf_counter()
    notes: list[str] = []
    yield notes
    seconds = time.perf_counter() - start
    LOG.info("%s", "  ".join([f"{title:<44}", f"{seconds:6.1f} s", *notes]))


class Times:
    """Where a step spends its time: the seconds of each part, for the line that says it is done.

    >>> times = Times()
    >>> with times.of("model"): pass
    >>> str(times)
    'model 0.0 s'
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())
