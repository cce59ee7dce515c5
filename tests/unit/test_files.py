"""Files are complete or absent, and one process at a time writes them, also where a run is killed or a disk is full."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from approxkmv import cli, files, lock
from approxkmv.errors import TableError
from approxkmv.files import (
    check_columns,
    check_writable,
    hash_file,
    is_damaged,
    read_json,
    read_table,
    write_csv,
    write_text,
    written_whole,
)
from approxkmv.partial import PartialTable

TABLE = pd.DataFrame({"n": [1, 2], "c": [0.1, 1 / 3]})


def test_what_cannot_be_written_whole_leaves_the_file_of_before(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        # Some file systems tell of a full disk only when what was written is asked to be on it.
        patch.setattr(os, "fsync", full)
        with pytest.raises(TableError, match=r"cannot write .*a\.txt: No space left on device"):
            write_text(path, "after")
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        raise ZeroDivisionError(temporary.write_text("half"))
    assert (path.read_text(), [one.name for one in tmp_path.iterdir()]) == ("before", ["a.txt"])


def test_a_kill_between_a_table_and_its_hash_leaves_no_wrong_hash(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    write_csv(path, TABLE)
    assert not is_damaged(path)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "file_sha256", killed)
        with pytest.raises(KeyboardInterrupt):
            write_csv(path, 2 * TABLE)
    assert not hash_file(path).exists()
    pd.testing.assert_frame_equal(read_table(path), 2 * TABLE)
    for damage in (b"", b"\xff\xfe", b"0" * 64):
        hash_file(path).write_bytes(damage)
        with pytest.raises(TableError, match="does not match its checksum"):
            read_table(path)


class SafetensorError(Exception):
    """Named as that of the package, which is not an OSError."""


def test_a_disk_that_is_full_for_weights_is_one_line_and_a_folder_is_no_file(tmp_path):
    with (
        pytest.raises(TableError, match=r"cannot write .*a\.safetensors: no space"),
        written_whole(tmp_path / "a.safetensors"),
    ):
        raise SafetensorError("no space")
    for path in (tmp_path, Path(os.devnull)):
        for write in (check_writable, lambda path: write_text(path, "x")):
            with pytest.raises(TableError, match="it exists and is not a regular file"):
                write(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["n,c\n1,2\n3", "n,c\n1,2\n3,4,5\n", "n,c\n1,2\n3\n", "n,n\n1,2\n", 'n,c\n1,"2"x\n', "n,c\n\xff,2\n", ""]
)
def test_a_table_that_a_kill_or_an_editor_has_damaged_is_not_read(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TableError, match="cannot be read"):
        read_table(path)
    path.write_text("n,c\n")
    assert read_table(path, empty=True).empty
    with pytest.raises(TableError, match="has no rows"):
        read_table(path)


@pytest.mark.parametrize("names", [["a.csv", "a.csv"], ["a.csv", "link.csv"], ["a.csv", "a.csv.sha256"]])
def test_two_outputs_are_two_files(tmp_path, names):
    (tmp_path / "link.csv").symlink_to("a.csv")
    with pytest.raises(TableError, match="another output of the same run has this name"):
        check_writable(*(tmp_path / name for name in names))
    check_writable(tmp_path / "a.csv", tmp_path / "a.json", inputs=[tmp_path / "b.json", None])
    assert [path.name for path in tmp_path.iterdir()] == ["link.csv"]


def test_a_plan_is_not_overwritten_by_the_record_of_the_run_that_it_is_for(tmp_path, monkeypatch, capsys):
    plan = tmp_path / "smollm2.json"
    plan.write_text("{}")
    (tmp_path / "link.json").symlink_to(plan)
    monkeypatch.chdir(Path(__file__).parents[2])
    for given in (plan, tmp_path / "link.json"):
        words = ["approxkmv", "perplexity", "--plan", str(given), "--out", str(tmp_path / "smollm2.csv")]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert "smollm2.json: the run reads this file" in capsys.readouterr().err
    assert plan.read_text() == "{}"


@pytest.mark.parametrize(
    ("what", "good", "bad"),
    [
        ("whole", [0, 1], [[-1, 0], [0.5, 1.0], [True, False]]),
        ("number", [0.5, float("nan")], [["a", "b"], [True, False]]),
        ("at least 0", [0.0, -1e-9], [[0.0, -1e-3], [0.0, float("inf")], [0.0, float("nan")]]),
        ("at least 0 or empty", [0.0, float("nan")], [[0.0, -1e-3]]),
        ("yes or no", [True, False], [[0, 1]]),
        ("text", ["a", "b"], [["a", float("nan")]]),
    ],
)
def test_a_column_holds_what_its_word_says(tmp_path, what, good, bad):
    check_columns(tmp_path, pd.DataFrame({"x": good}), {"x": what})
    for values in bad:
        with pytest.raises(TableError, match="column x must hold"):
            check_columns(tmp_path, pd.DataFrame({"x": values}), {"x": what})


@pytest.mark.parametrize(
    ("value", "kind"),
    [("-1", int), ("true", int), ("0.5", int), ("NaN", float), ("1e999", float), ("-0.5", float), ("3", str)],
)
def test_a_key_holds_a_number_of_at_least_0_or_its_type(tmp_path, value, kind):
    path = tmp_path / "a.json"
    path.write_text(f'{{"x": {value}}}')
    with pytest.raises(TableError, match=r"a\.json"):
        read_json(path, {"x": kind})
    # What is no number is not JSON, whoever asks for it.
    path.write_text('{"x": 3, "y": NaN}')
    with pytest.raises(TableError, match="NaN is not a finite number"):
        read_json(path)
    path.write_text('{"x": 3}')
    assert read_json(path, {"x": int}) == read_json(path, {"x": float}) == {"x": 3}


def test_a_waiting_thread_goes_on_when_the_other_has_ended(tmp_path):
    path, order = tmp_path / ".lock", []

    def work(name):
        with lock.one_at_a_time(path):
            order.append(f"{name} begins")
            time.sleep(0.05)
            order.append(f"{name} ends")

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [words.split()[1] for words in order] == ["begins", "ends"] * 2
    assert not path.exists()


def test_a_lock_names_its_holder_alone_and_is_taken_again_after_its_release(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    monkeypatch.chdir(tmp_path)
    path.write_text("process 123456789012345 of a machine with a long name")
    for place in (path, Path(".lock"), path):
        lock.hold(place, "a run")
    assert path.read_text().startswith(f"process {os.getpid()} of ")
    assert "long name" not in path.read_text()
    assert lock.try_lock(path) is None
    lock.release(path)
    assert not path.exists()
    lock.hold(path, "a run")
    assert lock.try_lock(path) is None
    lock.release(Path(".lock"))
    again = lock.try_lock(path)
    assert again is not None
    again.close()


def test_a_file_that_its_holder_has_removed_is_no_lock(tmp_path, monkeypatch):
    path, real = tmp_path / ".lock", lock.fcntl.flock

    def removed_first(file, how):
        monkeypatch.setattr(lock.fcntl, "flock", real)
        path.unlink()
        real(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", removed_first)
    file = lock.try_lock(path)
    assert os.path.samestat(os.fstat(file.fileno()), path.stat())
    file.close()


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", none)
    file = lock.try_lock(tmp_path / ".lock")
    assert file is not None
    file.close()


def test_cases_are_resumed_of_the_same_run_alone(tmp_path):
    output, said = tmp_path / "[a].csv", []
    half = tmp_path / ".[a].csv.123.part"

    def started(**identity):
        half.write_text("half")
        return PartialTable(output, identity, said.append)

    first = started(settings=1)
    assert not half.exists()
    first.add({"rows": [1]})
    assert started(settings=1).cases == [{"rows": [1]}]
    assert "resumes after the 1" in said.pop()
    half.unlink(missing_ok=True)
    with pytest.raises(TableError, match="cannot write"):
        PartialTable(first.path / "b.csv", {}, said.append)
    # What an earlier version did not know of counts as another.
    for other, word in (({"settings": 2}, "settings"), ({"settings": 1, "machine": None}, "machine")):
        assert started(**other).cases == []
        assert f"with other {word}" in said.pop()
    for damage in ("", "[]", "3", "null", '"cases"', "{}", json.dumps({"cases": "0"}) + "\n{}\n"):
        first.path.write_text(damage)
        assert started(settings=1).cases == []
        assert "is damaged" in said.pop()
    first.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_what_is_kept_for_later_runs_is_the_first_that_is_set(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path(os.environ["HOME"]))
    for name, folder in (("HOME", "/h/.cache"), ("XDG_CACHE_HOME", "/x"), ("NUMBA_CACHE_DIR", "/n")):
        monkeypatch.setenv(name, folder.removesuffix("/.cache"))
        assert files.cache_folder() == Path(folder, "approxkmv")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    assert files.cache_folder() == Path("/x/approxkmv")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() is None
