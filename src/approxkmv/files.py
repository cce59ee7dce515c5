"""Files that are complete or absent: written under a temporary name, renamed when complete, checked by hash."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from approxkmv.errors import SourceError, TableError, one_line

if TYPE_CHECKING:
    import pandas as pd

MAX_UNPACKED = 64 << 30
"""The most bytes that an archive may unpack to; also no more than UNPACKED_TO_START plus 20 times its own size."""
UNPACKED_TO_START = 1 << 30


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if the block succeeds and removed if it fails.

    It keeps the suffix, which tells matplotlib and pandas the format. Raises TableError, in one line, when the disk
    is full, the folder cannot be written, or the path is that of a folder or a device.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        _refuse_what_is_no_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TableError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        # safetensors raises an exception of its own here, which is not an OSError.
        if type(error).__name__ != "SafetensorError":
            raise
        raise TableError(f"cannot write {path}: {error}") from error
    finally:
        # If the parent is not a folder this fails too, and must not hide the reason.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise TableError for a folder, a device or a pipe: the superuser's rename would replace /dev/null by a file."""
    if path.exists() and not path.is_file():
        raise TableError(f"cannot write {path}: it exists and is not a regular file")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def cache_folder() -> Path | None:
    """approxkmv below NUMBA_CACHE_DIR, XDG_CACHE_HOME or ~/.cache, whichever is set first; None without a home."""
    try:
        below = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(below) / "approxkmv"


def check_writable(*paths: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Raise TableError unless each path can be written, is distinct and is none of `inputs`, which the run reads.

    Better known before hours of work. A table's hash is written beside it (see write_csv).
    """
    outputs = [*paths, *(hash_file(path) for path in paths if path.suffix == ".csv")]
    places = [os.path.realpath(path) for path in outputs]
    read = {os.path.realpath(path) for path in inputs if path is not None}
    for path, place in zip(outputs, places, strict=True):
        temporary = _temporary(path)
        try:
            _refuse_what_is_no_file(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            temporary.unlink()
        except OSError as error:
            raise TableError(f"cannot write {path}: {error.strerror or error}") from error
        if places.count(place) > 1:
            raise TableError(f"cannot write {path}: another output of the same run has this name")
        if place in read:
            raise TableError(f"cannot write {path}: the run reads this file")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV without an index, complete or not at all, with its hash beside it (see read_table).

    Floats round-trip exactly.
    """
    with written_with_hash(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a Parquet file without an index, complete or not at all, with its hash beside it (see read_table)."""
    with written_with_hash(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


@contextmanager
def written_with_hash(path: Path) -> Iterator[Path]:
    """Like written_whole, for a table; writes its hash beside it (see read_table)."""
    with written_whole(path) as temporary:
        yield temporary
        # Remove the old hash first: a kill in between leaves a table without a hash, not one with a wrong hash.
        hash_file(path).unlink(missing_ok=True)
    write_text(hash_file(path), f"{file_sha256(path)}  {path.name}\n")


def hash_file(path: Path) -> Path:
    """The path of a table's hash."""
    return path.with_name(f"{path.name}.sha256")


def is_damaged(path: Path) -> bool:
    """Whether the file does not match the hash beside it; a file without a hash is accepted."""
    try:
        expected = hash_file(path).read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not expected or file_sha256(path) != expected[0]


Columns: TypeAlias = Mapping[str, str]
"""Column names and what each holds: "whole" (integers of at least 0), "number" (NaN too), "at least 0" (finite),
"at least 0 or empty", "yes or no", "text" or "anything"."""
ROUNDING = 1e-6
"""How far below 0 a computed number of at least 0 may be."""
IN_WORDS = {"whole": "whole numbers of at least 0", "number": "numbers"}


def read_table(path: Path, columns: Columns | None = None, empty: bool = False) -> pd.DataFrame:
    """Read a CSV or Parquet file that an earlier step wrote, and check that it has the given columns.

    If its hash lies beside it, as FILE.sha256, it must match; a table without one is accepted. Raises TableError when
    the table is missing, truncated, of other columns or contents, or without rows unless `empty`.
    """
    import pandas as pd

    path = Path(path)
    try:
        if is_damaged(path):
            raise TableError(f"{path} does not match its checksum: delete it and run again")
        table = pd.read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except FileNotFoundError as error:
        raise TableError(f"{path} is missing: run the step that writes it first") from error
    except TableError:
        raise
    except Exception as error:
        raise TableError(f"{path} cannot be read ({one_line(error)}): delete it and run again") from error
    check_columns(path, table, columns or {})
    if table.empty and not empty:
        raise TableError(f"{path} has no rows: delete it and run again")
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    text = path.read_bytes().decode("utf-8")
    if not text.endswith("\n"):
        raise ValueError("its last line is truncated")
    # pandas would silently pad rows that are too short.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    names = next(rows)
    if len(set(names)) < len(names):
        raise ValueError("a column occurs twice")
    for row in rows:
        if len(row) != len(names):
            raise ValueError(f"line {rows.line_num} has {len(row)} fields, but the first line {len(names)}")
    return pd.read_csv(io.StringIO(text))


def check_columns(path: Path, table: pd.DataFrame, columns: Columns) -> None:
    """Raise TableError unless the table has these columns with the contents that each name stands for."""
    from pandas.api import types

    missing = [name for name in columns if name not in table]
    if missing:
        raise TableError(f"{path} lacks the columns {', '.join(missing)}: delete it and run again")
    for name, what in columns.items():
        values = table[name]
        numbers = types.is_numeric_dtype(values) and not types.is_bool_dtype(values)
        good = {
            "whole": types.is_integer_dtype(values) and bool((values >= 0).all()) if numbers else False,
            "number": numbers,
            "at least 0": numbers and bool(values.between(-ROUNDING, math.inf, inclusive="left").all()),
            "at least 0 or empty": numbers and not bool((values < -ROUNDING).any()),
            "yes or no": types.is_bool_dtype(values),
            "text": all(isinstance(value, str) for value in values),
        }
        # The columns of a table without rows have no meaningful types.
        if len(values) and not good.get(what, True):
            wanted = f"numbers of {what}" if what.startswith("at least") else IN_WORDS.get(what, what)
            raise TableError(f"{path} is damaged: column {name} must hold {wanted}: delete it and run again")


def read_json(path: Path, keys: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a JSON object that an earlier step wrote, and check that it has the given keys, each of its type.

    float means any finite number; numbers are at least 0. Raises TableError when the file is missing, truncated or of
    another shape.
    """

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is not a finite number")

    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"), parse_constant=refuse)
    except FileNotFoundError as error:
        raise TableError(f"{path} is missing: run the step that writes it first") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(f"{path} cannot be read ({error}): delete it and run again") from error
    if not isinstance(value, dict):
        raise TableError(f"{path} is not a JSON object: delete it and run again")
    check_keys(path, value, keys or {})
    return value


def check_keys(path: Path, value: Mapping[str, Any], keys: Mapping[str, type]) -> None:
    """Raise TableError unless the object read from `path` has these keys, each of its type, numbers at least 0."""
    for key, kind in keys.items():
        if key not in value:
            raise TableError(f"{path} lacks {key}: delete it and run again")
        found = value[key]
        good = type(found) in ((int, float) if kind is float else (kind,))
        number = kind in (int, float)
        # JSON's 1e999 parses as infinity.
        if not good or (number and not 0 <= found < math.inf):
            what = f"{kind.__name__}{' of at least 0' if number else ''}"
            raise TableError(f"{path}: {key} is {reprlib.repr(found)}, not a {what}: delete it and run again")


def unpacked_limit(archive: Path) -> int:
    """The most bytes an archive may unpack to: weights hardly compress, and a small file must not fill the disk."""
    return min(MAX_UNPACKED, UNPACKED_TO_START + 20 * archive.stat().st_size)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_sha256(path: Path, expected: str | None) -> None:
    """Raise SourceError unless the file has the expected hash; None skips the check."""
    if expected is None:
        return
    found = file_sha256(path)
    if found != expected.lower():
        raise SourceError(f"{path} has SHA-256 {found}, expected {expected}: replace the file or correct the hash")
