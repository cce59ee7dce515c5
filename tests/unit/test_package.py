"""A package of results is taken as it was packed, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from approxkmv.errors import TableError
from approxkmv.steps.package import pack, take

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    pack(REFERENCE / "complexity", tmp_path / "x.zip")
    return tmp_path / "x.zip"


def changed(package: Path, **files: bytes | None) -> Path:
    """The package with other contents of some members; None leaves one out."""
    with zipfile.ZipFile(package) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()} | files
    out = package.with_name("changed.zip")
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in contents.items():
            if data is not None:
                archive.writestr(name, data)
    return out


def test_what_is_packed_is_taken_byte_for_byte(package, tmp_path):
    lines = take(package, tmp_path / "into")
    assert lines[0].startswith("study complexity: 4 files")
    assert any("approxkmv complexity" in line for line in lines)
    for path in [*REFERENCE.glob("complexity/tables/*"), *REFERENCE.glob("complexity/figures/*")]:
        taken = tmp_path / "into" / "complexity" / path.relative_to(REFERENCE / "complexity")
        assert taken.read_bytes() == path.read_bytes()
    with pytest.raises(TableError, match="there already"):
        take(package, tmp_path / "into")
    pack(REFERENCE / "complexity", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == package.read_bytes()


def test_what_an_earlier_study_left_is_not_packed(tmp_path):
    for study in ("embedded", "complexity"):
        shutil.copytree(REFERENCE / study, tmp_path / "mine", dirs_exist_ok=True)
    config = {"study": "mine", "models": {}, "corpora": {}, "studies": {"mine": {"complexity": {}}}}
    (tmp_path / "mine" / "config.yaml").write_text(json.dumps(config))
    assert pack(tmp_path / "mine", tmp_path / "x.zip") == 4
    assert take(tmp_path / "x.zip", None)[0] == "study mine: 4 files, as the manifest says"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tables/complexity.csv": b"n\n1\n"}, "tables/complexity.csv is not what the manifest says"),
        ({"tables/complexity.csv": None}, "tables/complexity.csv is not what the manifest says"),
        ({"tables/more.csv": b"n\n1\n"}, "tables/more.csv is not what the manifest says"),
        ({"../tables/x.csv": b"n\n1\n"}, "holds '../tables/x.csv'"),
        ({"tables/x.py": b"1"}, "holds 'tables/x.py'"),
        ({"manifest.json": None}, "needs one manifest.json"),
        ({"manifest.json": b"{"}, "cannot be read"),
        ({"manifest.json": b'{"study": 5, "files": {}}'}, "its manifest names no study or no files"),
        ({"manifest.json": b'{"study": "s", "files": {"tables/complexity.csv": []}}'}, "names no study or no files"),
        ({"manifest.json": b"[]"}, "names no study"),
        ({"manifest.json": b'{"study": "../x", "files": {}}'}, "names no study"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_is_written(package, tmp_path, files, said):
    with pytest.raises(TableError, match=said.replace(".", r"\.")):
        take(changed(package, **files), tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_what_is_no_file_is_no_package(tmp_path):
    with pytest.raises(TableError, match="it is not a regular file"):
        take(tmp_path, None)


def test_a_package_whose_writing_fails_leaves_nothing(package, tmp_path, monkeypatch):
    write = Path.write_bytes

    def fails(path, data):
        if path.suffix == ".png":
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(TableError, match="No space left"):
        take(package, tmp_path / "into")
    assert not any((tmp_path / "into").iterdir())


def test_a_study_whose_name_would_not_be_taken_is_not_packed(tmp_path):
    shutil.copytree(REFERENCE / "complexity", tmp_path / "my study")
    with pytest.raises(TableError, match="my study: the study's name may hold"):
        pack(tmp_path / "my study", tmp_path / "x.zip")


def test_a_package_of_nested_json_is_refused(package, tmp_path):
    deep = b"[" * 200_000
    with zipfile.ZipFile(package) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    manifest["files"]["tables/complexity.json"] = hashlib.sha256(deep).hexdigest()
    files = {"tables/complexity.json": deep, "manifest.json": json.dumps(manifest).encode()}
    with pytest.raises(TableError, match=r"tables/complexity\.json cannot be read"):
        take(changed(package, **files), None)


def test_results_that_do_not_say_how_they_were_made_are_not_packed(tmp_path):
    shutil.copytree(REFERENCE / "complexity", tmp_path / "c")
    record = tmp_path / "c" / "tables" / "complexity.json"
    record.write_text(json.dumps({"seeds": 1}))
    with pytest.raises(TableError, match="by what command"):
        pack(tmp_path / "c", tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()
    (tmp_path / "no.zip").write_bytes(b"PK")
    with pytest.raises(TableError, match=r"no\.zip cannot be read"):
        take(tmp_path / "no.zip", None)


@pytest.mark.parametrize("step", [7, 31])
def test_damaged_bytes_are_refused_or_harmless(package, step, tmp_path):
    whole = package.read_bytes()
    for place in range(30, len(whole), step * len(whole) // 400 + 1):
        package.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        # Any other exception would be a traceback; some bytes, such as a date, may be anything.
        with contextlib.suppress(TableError):
            take(package, None)
