"""The finished cases of a long run, kept in a file beside its output until that is whole."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from approxkmv.files import check_writable, write_text
from approxkmv.lock import hold, release


class PartialTable:
    """What a run has finished, in OUTPUT.part as JSON lines: what it depends on, then one case a line.

    A killed run leaves the file behind; the next one that depends on the same goes on after its last case.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Take over the cases that an earlier run left, or tell `say` why not.

        Args:
            output: the table that the cases will make.
            identity: what they depend on beside this package's code, by the word that a person has for it, as
                "settings"; whatever JSON can hold.
        Raises:
            TableError: the file cannot be written. BusyError: another process is making the same output.
        """
        self.path = Path(output).with_name(f"{Path(output).name}.part")
        check_writable(self.path)
        self._lock = self.path.with_name(f".{Path(output).name}.lock")
        hold(self._lock, f"a run that writes {output}")
        for half_written in self.path.parent.glob(f".{glob.escape(self.path.stem)}.[0-9]*.part"):
            half_written.unlink()
        self._identity = {name: _hash(_text(value)) for name, value in {**identity, "code": _code()}.items()}
        self.cases: list[dict[str, Any]] = []
        try:
            head, *lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            earlier = json.loads(head)
            whole = earlier["cases"] == _hash("".join(lines))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            say(f"{self.path} is damaged: the run starts anew")
        elif other := [name for name, value in self._identity.items() if earlier.get(name) != value]:
            say(f"{self.path} is of a run with other {' and '.join(other)}: the run starts anew")
        else:
            self.cases = [json.loads(line) for line in lines]
            say(f"the run goes on after the {len(lines)} that an earlier one finished, kept in {self.path}")

    def add(self, case: dict[str, Any]) -> None:
        """Keep one more case, on disk when this returns. Raises TableError when the disk is full."""
        self.cases.append(case)
        lines = "".join(f"{_text(one)}\n" for one in self.cases)
        write_text(self.path, f"{_text({**self._identity, 'cases': _hash(lines)})}\n{lines}")

    def remove(self) -> None:
        """Remove the file: what it holds stands in the output."""
        self.path.unlink(missing_ok=True)
        release(self._lock)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _code() -> dict[str, str]:
    """A hash of each source file of this package, which tells versions apart where there is no checkout."""
    root = Path(__file__).parent
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in root.rglob("*.py")}
