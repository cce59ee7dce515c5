"""Files that are whole or absent: written under a temporary name, renamed when complete, checked by hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.errors import SourceError, TableError

if TYPE_CHECKING:
    import pandas as pd

MAX_UNPACKED = 64 << 30
"""Bytes that an archive may unpack to; and no more than UNPACKED_TO_START and 20 times its own size."""
UNPACKED_TO_START = 1 << 30


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed to it when the block ends well, removed when it does not.

    The name keeps the suffix, from which matplotlib and pandas tell the format. Raises TableError, in one line, when
    the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TableError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        # safetensors says so in an exception of its own, which is no OSError.
        if type(error).__name__ != "SafetensorError":
            raise
        raise TableError(f"cannot write {path}: {error}") from error
    finally:
        # Where the folder is no folder this fails too, and must not hide why.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def check_writable(*paths: Path) -> None:
    """Raise TableError unless each path can be written as a file of its own: to be known before hours of work."""
    for i, path in enumerate(map(Path, paths)):
        temporary = _temporary(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise TableError(f"cannot write {path}: it is a folder, or no file")
            temporary.touch()
            temporary.unlink()
        except OSError as error:
            raise TableError(f"cannot write {path}: {error.strerror or error}") from error
        if path in map(Path, paths[:i]):
            raise TableError(f"cannot write {path}: another output of the same run has this name")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV without an index, whole or not at all; floats with the digits that bring the same number back."""
    with written_whole(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a Parquet file without an index, whole or not at all."""
    with written_whole(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV or Parquet file that an earlier step wrote. Raises TableError when missing or cut short."""
    import pandas as pd

    try:
        return pd.read_parquet(path) if Path(path).suffix == ".parquet" else pd.read_csv(path)
    except FileNotFoundError as error:
        raise TableError(f"{path} is missing: run the step that writes it first") from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TableError(f"{path} cannot be read ({reason}): delete it and run again") from error


def unpacked_limit(archive: Path) -> int:
    """How many bytes an archive may unpack to: weights hardly compress, and a small file must not fill the disk."""
    return min(MAX_UNPACKED, UNPACKED_TO_START + 20 * archive.stat().st_size)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_sha256(path: Path, expected: str | None) -> None:
    """Raise SourceError unless the file has the expected hash; None expects nothing."""
    if expected is None:
        return
    found = sha256(path)
    if found != expected:
        raise SourceError(f"{path} has SHA-256 {found}, expected {expected}: replace the file or correct config.yaml")
