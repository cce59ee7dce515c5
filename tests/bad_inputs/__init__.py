"""Bad inputs, each of which must end with exit code 2 and one line on stderr: for the tests, and to be counted.

A module of this package has a list CASES; `all_cases` finds them all.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before a library reads it: no bad input asks a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from approxkmv import cli, progress
from approxkmv.errors import ApproxKMVError


@dataclass(frozen=True)
class Case:
    """One bad input."""

    kind: str
    """texts, tables, configuration, archives, models or Python calls."""
    name: str
    """What is bad, in a few words; no other case of its kind has them."""
    run: Callable[[Path], tuple[int, str]]
    """From an empty folder, in which it makes the input, to the exit code and what was printed on stderr."""


def all_cases() -> list[Case]:
    """The cases of every module, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [case for name in names for case in importlib.import_module(f"{__name__}.{name}").CASES]


def is_one_line(code: int, printed: str) -> bool:
    """Whether the exit code is 2 and stderr has one line, which is the command's own."""
    return code == 2 and len(printed.strip().splitlines()) == 1 and printed.startswith("approxkmv: ")


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run `approxkmv` with these arguments in a folder, in this process: its exit code and what stderr shows."""
    printed = io.StringIO()
    # A handler that another test left writes elsewhere.
    progress.LOG.handlers.clear()
    before = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["approxkmv", *arguments]
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except Exception:
        traceback.print_exc(file=printed)
        code = 1
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
        progress.LOG.handlers.clear()
    return code, printed.getvalue()


def python_call(call: Callable[[], object]) -> tuple[int, str]:
    """What a command would make of a call of the Python interface: 2 and a line for an exception of the package."""
    try:
        call()
    except ApproxKMVError as error:
        return 2, f"approxkmv: {error}\n"
    except Exception:
        return 1, traceback.format_exc()
    return 0, ""
