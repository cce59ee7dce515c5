"""What a person at the terminal sees: bars with the time left, and one line per finished step."""

from __future__ import annotations

import errno
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


def reason_of(error: BaseException) -> str | None:
    """What to tell the user of a mistake, a full disk or too little memory; None of an error that is none of these."""
    cause: BaseException | None = error
    while cause is not None:
        # Also of an error that was raised in place of it, as that of a file which cannot be read.
        if is_of_memory(cause):
            said = " ".join(str(cause).split())
            return (
                f"out of memory{f' ({said[:160]})' if said else ''}: lower batch_tokens or shard_contexts of the study "
                "(lengths, of a sweep or a perplexity), or take a machine with more"
            )
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if isinstance(error, ApproxKMVError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return None


def is_of_memory(error: BaseException) -> bool:
    """Python's and NumPy's MemoryError, the system's, and torch's: a class of its own on CUDA, sentences on a CPU.

    With far too little its libraries cannot be mapped, nor files of weights, or oneDNN has no room for the code that
    it makes.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = [
        *("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
        *("could not create a primitive", "failed to map segment", "Cannot allocate memory"),
    ]
    # safetensors has an exception of its own, which is neither of the two.
    speaks = isinstance(error, (RuntimeError, ImportError)) or type(error).__name__ == "SafetensorError"
    return isinstance(error, MemoryError) or (speaks and any(word in str(error) for word in words))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For the workflow's own code: what reason_of knows is one line on stderr and exit code 2."""
    try:
        yield
    except Exception as error:
        reason = reason_of(error)
        if reason is None:
            raise
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
