"""The finished cases of a long run, kept in a file beside its output until the output is complete."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from approxkmv.files import check_writable, write_text
from approxkmv.imports import ROOT, digest_of
from approxkmv.lock import hold, release


class PartialTable:
    """What a run has finished, as JSON lines in OUTPUT.part: what it depends on, then one case per line.

    A killed run leaves the file behind; the next run with the same dependencies resumes after its last case.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Take over the cases of an earlier run, or tell `say` why that is not possible.

        Args:
            output: the table that the cases will make.
            identity: what they depend on besides this package's code, keyed by a word to show to users, such as
                "settings"; any JSON values.
        Raises:
            TableError: the file cannot be written. BusyError: another process is writing the same output.
        """
        self.path = Path(output).with_name(f"{Path(output).name}.part")
        check_writable(self.path)
        self._lock = self.path.with_name(f".{Path(output).name}.lock")
        hold(self._lock, f"a run that writes {output}")
        for half_written in self.path.parent.glob(f".{glob.escape(self.path.stem)}.[0-9]*.part"):
            half_written.unlink()
        # Tells apart versions outside a checkout too.
        code = digest_of(sorted(ROOT.rglob("*.py")))
        self._identity = {name: _hash(_text(value)) for name, value in {**identity, "code": code}.items()}
        self.cases: list[dict[str, Any]] = []
        try:
            head, *lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            earlier = json.loads(head)
            whole = earlier["cases"] == _hash("".join(lines))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            say(f"{self.path} is damaged: the run starts over")
        elif other := [name for name, value in self._identity.items() if earlier.get(name) != value]:
            say(f"{self.path} is from a run with other {' and '.join(other)}: the run starts over")
        else:
            self.cases = [json.loads(line) for line in lines]
            say(f"the run resumes after the {len(lines)} finished by an earlier one, kept in {self.path}")

    def add(self, case: dict[str, Any]) -> None:
        """Save one more case, on disk when this returns. Raises TableError when the disk is full."""
        self.cases.append(case)
        lines = "".join(f"{_text(one)}\n" for one in self.cases)
        write_text(self.path, f"{_text({**self._identity, 'cases': _hash(lines)})}\n{lines}")

    def remove(self) -> None:
        """Remove the file, whose content is now in the output."""
        self.path.unlink(missing_ok=True)
        release(self._lock)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
