"""Model folders that are complete or absent: filled under a temporary name, hashed, renamed when complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from approxkmv.errors import SourceError, one_line
from approxkmv.files import file_sha256
from approxkmv.lock import one_at_a_time
from approxkmv.models.sources import ModelLocation

RECORD = "source.json"
"""Written last into a fetched folder: the source, the hashes of what it was made from and of every file, and size and
times of each file."""


def complete(
    destination: Path, source: str, hashes: Mapping[str, str], fill: Callable[[Path], dict[str, str]]
) -> ModelLocation:
    """The destination if it is complete for this source and these hashes; otherwise fill a new folder and rename it.

    Args:
        hashes: by file name ("wheel" for the wheel): of the files it must contain or must have been made from.
        fill: writes into the given folder, and returns the hashes of what it read.
    Raises:
        SourceError: a file whose hash differs, or what fill raises.
    """
    # Of two runs the second takes what the first makes.
    with one_at_a_time(destination.with_name(f".{destination.name}.lock")):
        remove_leftovers(destination.parent)
        if _is_complete(destination, source, hashes):
            return ModelLocation(destination)
        with replacing(destination) as folder:
            made_from = fill(folder)
            files = file_hashes(folder)
            compare(files | made_from, hashes, source)
            record = {"source": source, "made_from": made_from, "sha256": files, "seen": stamps(folder)}
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        return ModelLocation(destination)


def _is_complete(destination: Path, source: str, hashes: Mapping[str, str]) -> bool:
    """Whether every file has its recorded hash, and no file was added."""
    try:
        record = json.loads((destination / RECORD).read_text())
        known = record["sha256"] | record["made_from"]
        return (
            record["source"] == source
            and all(known.get(name) == digest for name, digest in hashes.items())
            and file_hashes(destination) == record["sha256"]
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def unchanged(folder: Path) -> str:
    """Identifies the content of a folder that `complete` filled, after checking that it has not been edited since.

    A file whose size and times are those of its record is not hashed again.

    Raises:
        SourceError: a file was changed, added or removed, or the record cannot be read.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        hashes, seen, now = record["sha256"], record.get("seen", {}), stamps(folder)
        newer = {name for name in now.keys() & hashes if now[name] != seen.get(name)}
        edited = set(now) ^ set(hashes) | {name for name in newer if file_sha256(folder / name) != hashes[name]}
        content = json.dumps([record["source"], record["made_from"], hashes], sort_keys=True)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SourceError(f"{folder}: what was fetched cannot be checked ({one_line(error)})") from error
    if edited:
        raise SourceError(f"{folder}: {min(edited)} is not what was fetched: it was changed, added or removed")
    return hashlib.sha256(content.encode()).hexdigest()


@contextlib.contextmanager
def replacing(destination: Path) -> Iterator[Path]:
    """A new folder beside the destination that takes its name if the block ends without an error.

    Replaces what an earlier fetch wrote under that name; leaves anything else alone.

    Raises:
        SourceError: the destination is a file, or a folder with content that no fetch wrote.
    """
    foreign = destination.exists() and not (destination / RECORD).is_file()
    if foreign and (not destination.is_dir() or any(destination.iterdir())):
        raise SourceError(f"{destination} exists and was not written by a fetch: remove it or name another folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.{_this_process(os.getpid())}."
    room = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    try:
        folder = room / "new"  # made by mkdir, to get the user's usual permissions
        folder.mkdir()
        yield folder
        if destination.exists():
            destination.rename(room / "old")
        folder.rename(destination)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders that killed calls of replacing left in a folder, except those of living processes.

    Only those of this machine: the folder may be shared with others, whose processes are unknown here.
    """
    for room in folder.glob(".*"):
        found = re.fullmatch(rf"\..+\.{re.escape(_this_process(''))}(\d+)\.[^.]+", room.name)
        if found and room.is_dir() and not is_running(int(found[1])):
            shutil.rmtree(room, ignore_errors=True)


def _this_process(number: int | str) -> str:
    return f"{socket.gethostname()}-{number}"


def is_running(number: int) -> bool:
    """Whether a process with this number is running on this machine; one that has ended but is not reaped is not."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        # The state follows the name, which is in brackets and may hold anything.
        return Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True


def compare(found: Mapping[str, str], expected: Mapping[str, str], name: str) -> None:
    """Raise SourceError, which names the model, unless each expected file is there with its hash."""
    for file, digest in expected.items():
        if file not in found:
            raise SourceError(f"{name}: {file} has a hash in the configuration but is not in the model's folder")
        if found[file] != digest.lower():
            raise SourceError(f"{name}: {file} has sha256 {found[file]}, expected {digest}: the file is not used")


def file_hashes(folder: Path) -> dict[str, str]:
    """Hashes of all files but the record, by path inside the folder."""
    return {name: file_sha256(path) for name, path in _recorded(folder).items()}


def stamps(folder: Path) -> dict[str, list[int]]:
    """Size and times of all files but the record: any write changes one, and only the second can be set at will."""
    found = {name: path.stat() for name, path in _recorded(folder).items()}
    return {name: [about.st_size, about.st_mtime_ns, about.st_ctime_ns] for name, about in found.items()}


def _recorded(folder: Path) -> dict[str, Path]:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(files(folder))}
    return {name: path for name, path in paths.items() if name != RECORD}


def files(folder: Path) -> Iterator[Path]:
    """All files in a folder and below it."""
    return (path for path in folder.rglob("*") if path.is_file())
