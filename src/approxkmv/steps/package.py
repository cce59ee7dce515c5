"""Results of a study in one file, for others to take: tables, figures, how they were made, and a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from approxkmv.errors import TableError
from approxkmv.files import unpacked_limit, written_whole
from approxkmv.steps.cleaning import leftovers

MANIFEST = "manifest.json"
# The parts of a study's folder that are packed. Nothing in them is run or unpickled.
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
MEMBER = re.compile(r"tables/[\w.-]+\.(csv|json)|figures/[\w.-]+\.png")
MOST_FILES = 2000
# What damaged bytes raise, depending on where they are.
UNREADABLE = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, EOFError)


def pack(results: Path, out: Path) -> int:
    """Write a study's tables and figures with their manifest to a zip file; returns the number of files.

    What an earlier study left in the folder is left out. Raises TableError if there are no tables, or none that says
    how it was made.
    """
    left = leftovers(results)
    files = {
        str(path.relative_to(results)): path.read_bytes()
        for path in sorted([*results.glob("tables/*"), *results.glob("figures/*.png")])
        if MEMBER.fullmatch(str(path.relative_to(results))) and path not in left
    }
    if not NAME.fullmatch(results.resolve().name):
        raise TableError(f"{results.resolve()}: the study's name may hold letters, digits, '.', '_' and '-' only")
    manifest = {"study": results.resolve().name, "files": {name: _sha256(data) for name, data in files.items()}}
    _check(manifest, files, str(results))
    with written_whole(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**files, MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
            # Without the time, so that the same results make the same file.
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return len(files)


def take(package: Path, into: Path | None) -> list[str]:
    """Check a package, and unpack it to INTO/STUDY if `into` is given; returns what to say about it.

    Raises TableError for a file that is no such package, is damaged, holds more or less than its manifest says, has a
    table that cannot be read or no provenance, and if the folder exists.
    """
    manifest, files = _read(package)
    found = _check(manifest, files, str(package))
    lines = [f"study {manifest['study']}: {len(files)} files, as the manifest says", *found]
    if into is not None:
        folder = into / manifest["study"]
        if folder.exists():
            raise TableError(f"{folder} is there already: remove it first, or take the package into another folder")
        # Renamed when whole: half a study would be in the way of the next attempt, which removes what a kill left.
        unpacked = into / f".{folder.name}.unpacked"
        try:
            shutil.rmtree(unpacked, ignore_errors=True)
            for name, data in files.items():
                (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
                (unpacked / name).write_bytes(data)
            unpacked.rename(folder)
        except OSError as error:
            shutil.rmtree(unpacked, ignore_errors=True)
            raise TableError(f"cannot write {folder}: {error.strerror or error}") from error
        lines.append(f"taken into {folder}")
    return lines


def _read(package: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    if package.exists() and not package.is_file():
        # A device may never end.
        raise TableError(f"{package} cannot be read as a package of results: it is not a regular file")
    try:
        with zipfile.ZipFile(package) as archive:
            members = archive.infolist()
            if len(members) > MOST_FILES or sum(member.file_size for member in members) > unpacked_limit(package):
                raise TableError(f"{package} would unpack to too much: it is not a package of results")
            names = [member.filename for member in members]
            wrong = [name for name in names if name != MANIFEST and not MEMBER.fullmatch(name)]
            if wrong or len(set(names)) < len(names) or MANIFEST not in names:
                what = f"holds {wrong[0]!r}" if wrong else f"needs one {MANIFEST} and no name twice"
                raise TableError(f"{package} {what}: it is not a package of results")
            contents = {name: archive.read(name) for name in names}
        manifest = json.loads(contents.pop(MANIFEST))
    except (*UNREADABLE, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise TableError(f"{package} cannot be read as a package of results: {error}") from error
    valid = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    if valid:
        named = (manifest.get("study"), *manifest["files"].values())
        valid = all(isinstance(value, str) for value in named) and bool(NAME.fullmatch(manifest["study"]))
    if not valid:
        raise TableError(f"{package}: its manifest names no study or no files")
    return manifest, contents


def _check(manifest: dict[str, Any], files: dict[str, bytes], where: str) -> list[str]:
    """What made the tables, a line each. Raises TableError for what is wrong."""
    import pandas as pd

    hashes = {name: _sha256(data) for name, data in files.items()}
    if hashes != manifest["files"]:
        different = sorted({name for name, _ in hashes.items() ^ manifest["files"].items()})
        raise TableError(f"{where}: {different[0]} is not what the manifest says: pack the results again")
    made = []
    for name, data in files.items():
        try:
            if name.endswith(".csv"):
                pd.read_csv(io.BytesIO(data))
            elif name.endswith(".json"):
                record = json.loads(data)
                record = record.get("provenance", record)
                if {"command", "commit", "machine", "versions"} <= set(record):
                    made.append(f"{name}: {record['command']} at commit {record['commit']}")
            elif not data.startswith(b"\x89PNG"):
                raise ValueError("it is no PNG")
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise TableError(f"{where}: {name} cannot be read: {error}") from error
    if not made:
        raise TableError(f"{where} has no table that says by what command, commit and machine it was made")
    return made


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
