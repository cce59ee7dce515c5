"""What is shown on the terminal: progress bars with the time left, and one line per finished step."""

from __future__ import annotations

import errno
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from approxkmv.errors import ApproxKMVError

LOG = logging.getLogger("approxkmv")
OUT_OF_MEMORY = "out of memory"


def on_terminal() -> bool:
    """Whether stderr is a terminal, so that progress bars of pip and of the hub's library are visible."""
    return sys.stderr.isatty()


def progress(total: int, unit: str, title: str) -> Any:
    """A tqdm bar on stderr that disappears when done; silent if stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total, unit=unit, desc=title, leave=False, dynamic_ncols=True, unit_scale=total > 10_000, disable=None
    )


def log_to(path: Path | None) -> None:
    """Send the lines of finished steps to stderr and, if given, also to a log file."""
    # If the disk is full the log cannot be written either: drop its lines instead of printing a traceback for each.
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
    """What to tell the user about a user error, a full disk or too little memory; None for any other error."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "approxkmv").startswith("approxkmv"):
        return f"this needs the package {error.name}: pip install 'approxkmv[pipeline]'"
    cause: BaseException | None = error
    while cause is not None:
        # Also when it is the cause of another error, such as that of a file that cannot be read.
        if is_of_memory(cause):
            said = " ".join(str(cause).split())
            return (
                f"{OUT_OF_MEMORY}{f' ({said[:160]})' if said else ''}: lower batch_tokens or shard_contexts of the "
                "study (for a sweep or perplexity: lengths), or use a machine with more memory"
            )
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if isinstance(error, ApproxKMVError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return None


def is_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, NumPy's, the system's or torch's out-of-memory error.

    torch has a class for it on CUDA, only messages on a CPU. When very little memory is left, libraries and files of
    weights cannot be mapped, and oneDNN has no room for the code that it generates.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    words = [
        *("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
        *("could not create a primitive", "failed to map segment", "Cannot allocate memory"),
        *("bad_alloc", "can't start new thread"),
        # What Python says of an extension module that got no memory and did not say so.
        "error return without exception set",
    ]
    # safetensors has an exception of its own, which is none of these.
    speaks = (
        isinstance(error, (RuntimeError, ImportError, OSError, SystemError))
        or type(error).__name__ == "SafetensorError"
    )
    return isinstance(error, MemoryError) or (speaks and any(word in str(error) for word in words))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For the workflow's own code: errors that reason_of knows become one line on stderr and exit code 2."""
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


class RunLog(logging.Filter):
    """For Snakemake's logger: what a person sees of a run are warnings, errors and, on a terminal, how far it is.

    A step that starts after others of its rule and model says how long they took on average. `nothing_to_do` is called
    if there is nothing to run; `stopped` says whether the user stopped the run.
    """

    def __init__(self, nothing_to_do: Callable[[], None]) -> None:
        super().__init__()
        self.nothing_to_do = nothing_to_do
        self.stopped = False
        self.start = time.monotonic()
        self.running: dict[int, tuple[str, float]] = {}
        self.took: dict[str, list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        done, total = getattr(record, "done", None), getattr(record, "total", None)
        if done is not None and total is not None and on_terminal():
            minutes = (time.monotonic() - self.start) / 60
            print(f"  step {done} of {total} done, {minutes:.1f} min so far", file=sys.stderr)
        event = getattr(getattr(record, "event", None), "name", "")
        if event == "JOB_INFO":
            self._begin(record.jobid, record.rule_name, record.wildcards)  # type: ignore[attr-defined]
        elif event == "JOB_FINISHED" and record.job_id in self.running:  # type: ignore[attr-defined]
            kind, began = self.running.pop(record.job_id)  # type: ignore[attr-defined]
            self.took.setdefault(kind, []).append(time.monotonic() - began)
        message = str(record.msg)
        if message.startswith("Nothing to be done"):
            self.nothing_to_do()
        self.stopped |= message.startswith("Terminating processes on user request")
        return record.levelno >= logging.WARNING

    def _begin(self, job: int, rule: str, wildcards: Mapping[str, str]) -> None:
        kind = " ".join([rule, wildcards.get("model", "")]).strip()
        before = self.took.get(kind, [])
        mean = sum(before) / max(1, len(before))
        # The end of a shorter one is seen sooner than its expectation is read.
        if mean >= 5 and on_terminal():
            span = f"{mean:.0f} s" if mean < 100 else f"{mean / 60:.0f} min"
            which = ", ".join(value for name, value in wildcards.items() if name != "model")
            print(f"  {kind}{which and f', {which}'}: about {span}, as {len(before)} before it", file=sys.stderr)
        self.running[job] = (kind, time.monotonic())


@contextmanager
def step(title: str) -> Iterator[list[str]]:
    """Time a step and log one line when it is done; what the block appends to the list is added to that line."""
    start = time.perf_counter()
    notes: list[str] = []
    yield notes
    seconds = time.perf_counter() - start
    LOG.info("%s", "  ".join([f"{title:<44}", f"{seconds:6.1f} s", *notes]))


class Times:
    """Where a step spends its time: the seconds of each part, for the line logged at its end.

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
