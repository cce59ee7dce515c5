"""One run at a time: a lock that the system releases when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from approxkmv.errors import BusyError

_held: dict[Path, IO[str]] = {}


def try_lock(path: Path) -> IO[str] | None:
    """The locked file, which stays locked until it is closed or the process ends; None if another process holds it.

    On a file system without locks the file counts as locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            pass
        # Its last holder may have removed the file in between: then the lock keeps nobody out.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}")
    file.flush()
    return file


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Run the block while no other process or thread runs one with this file; waits until then."""
    while (file := try_lock(path)) is None:
        time.sleep(0.1)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def hold(path: Path, what: str) -> None:
    """Keep the lock until release, or until this process ends.

    Raises BusyError, which says who holds it, when another process does.
    """
    path = path.resolve()
    if path in _held:
        return
    while (file := try_lock(path)) is None:
        # Not there: its holder has just ended.
        with contextlib.suppress(FileNotFoundError):
            who = path.read_text(encoding="utf-8") or "another process"
            raise BusyError(f"{what} is under way already, by {who}: wait until it ends, or stop it")
    _held[path] = file


def release(path: Path) -> None:
    """Release a held lock, and remove its file."""
    path.unlink(missing_ok=True)
    if file := _held.pop(path.resolve(), None):
        file.close()
