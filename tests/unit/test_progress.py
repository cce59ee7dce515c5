"""Progress bars appear on a terminal and not in a file; a log on a full disk loses its lines and nothing else."""

from __future__ import annotations

import io
import logging
import mmap
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from approxkmv import cli, progress
from approxkmv.errors import ConfigError, TableError, UnavailableError
from approxkmv.sweep.measure import running_out_of_memory


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with progress.progress(total=3, unit="text", title="reading") as bar:
        for _ in range(3):
            bar.update()
    return stream.getvalue()


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(monkeypatch):
    shown = drawn(Terminal(), monkeypatch)
    assert "reading" in shown
    assert "0/3" in shown
    assert not shown.endswith("\n"), "it disappears when done"
    assert progress.on_terminal()
    assert drawn(io.StringIO(), monkeypatch) == ""
    assert not progress.on_terminal()


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_on_a_full_disk_prints_no_traceback(tmp_path, capsys, log):
    progress.log_to(tmp_path / "step.log")
    file = log.handlers[1]
    assert isinstance(file, logging.FileHandler)
    file.setStream(FullDisk()).close()
    with progress.step("reading") as notes:
        notes.append("3 texts")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "reading" in error
    assert "3 texts" in error


def test_finished_steps_are_lines_on_stderr_and_in_the_log(tmp_path, capsys, log):
    progress.log_to(tmp_path / "logs" / "step.log")
    with progress.step("reading"):
        pass
    assert "reading" in capsys.readouterr().err
    assert "reading" in (tmp_path / "logs" / "step.log").read_text()


class OutOfMemoryError(RuntimeError):
    """As torch's own, of which a machine without CUDA has no instance."""


def read_with_too_little() -> None:
    try:
        raise MemoryError("Unable to allocate 7.45 GiB")
    except MemoryError as error:
        raise TableError("results/x cannot be read: delete it") from error


def raising(error: Exception) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    "command",
    [
        lambda: np.empty(2**55),
        lambda: torch.empty(2**55),
        lambda: mmap.mmap(-1, 2**55),
        raising(OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has 79 GiB.")),
        raising(RuntimeError("could not create a primitive")),
        raising(ImportError("libtorch_cpu.so: failed to map segment from shared object")),
        raising(RuntimeError("unable to mmap 335 bytes from file <model.safetensors>: Cannot allocate memory (12)")),
        raising(RuntimeError("std::bad_alloc")),
        raising(OSError("libllvmlite.so: failed to map segment from shared object")),
        raising(SystemError("error return without exception set")),
        raising(RuntimeError("can't start new thread")),
        raising(SafetensorError("Cannot allocate memory (os error 12)")),
        read_with_too_little,
    ],
    ids=[
        "numpy",
        "torch",
        "system",
        "cuda",
        "onednn",
        "library",
        "weights",
        "c++",
        "library without a number",
        "extension",
        "thread",
        "header",
        "in place of",
    ],
)
def test_too_little_memory_is_one_line_that_says_what_to_lower(monkeypatch, capsys, log, command):
    monkeypatch.setattr(cli, "app", lambda **_: command())
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # as it was, afterwards
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    for word in ("approxkmv: out of memory", "batch_tokens", "shard_contexts"):
        assert word in printed
    with pytest.raises(SystemExit) as end, progress.one_line_errors():
        command()
    assert end.value.code == 2


def test_what_is_of_memory_makes_a_method_unavailable():
    with pytest.raises(UnavailableError, match="a method runs out of memory"), running_out_of_memory("a method"):
        raise RuntimeError("could not create a primitive")
    with pytest.raises(RuntimeError, match="a bug"), running_out_of_memory("a method"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("first", "at_exit", "code", "one"),
    [
        ("MemoryError()", "MemoryError()", 2, True),
        ("ValueError('a bug')", "ValueError('a bug')", 1, False),
        # A fault of another kind is not hidden.
        ("MemoryError()", "ValueError('a bug')", 2, False),
    ],
)
def test_what_fails_at_exit_adds_nothing_to_the_line_about_memory(first, at_exit, code, one):
    program = (
        "import atexit; from approxkmv import cli\n"
        f"def fail(**_): raise {first}\n"
        f"def fail_at_exit(): raise {at_exit}\n"
        "atexit.register(fail_at_exit); cli.app = fail; cli.main()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == code
    assert (run.stderr.count("\n") == 1) == one, run.stderr
    assert ("a bug" in run.stderr) == ("a bug" in first + at_exit)


@pytest.mark.parametrize(
    ("ends", "code", "line"),
    [
        (raising(KeyboardInterrupt()), 130, "stopped"),
        # What typer makes of it
        (lambda: 130, 130, "stopped"),
        (lambda: 3, 3, ""),
        (lambda: None, 0, ""),
        (raising(ConfigError("two\nlines  of a file")), 2, "two lines of a file"),
    ],
)
@pytest.mark.parametrize("logged", [False, True])
def test_a_command_ends_with_its_code_and_one_line_which_is_in_the_log_too(
    monkeypatch, capsys, log, tmp_path, logged, ends, code, line
):
    def command(**_: object) -> object:
        if logged:
            progress.log_to(tmp_path / "a.log")
        return ends()

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = f"approxkmv: {line}\n" if line else ""
    assert (end.value.code, capsys.readouterr().err) == (code, said)
    if logged:
        assert (tmp_path / "a.log").read_text().endswith(said)


def test_a_bug_stays_a_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: raising(RuntimeError("a bug"))())
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("no such\nstudy"), "approxkmv: no such study\n"),
        (OSError(28, "No space left on device", "results/x"), "approxkmv: results/x: No space left on device\n"),
        (OSError(28, "No space left on device"), "approxkmv: a file: No space left on device\n"),
    ],
)
def test_in_the_workflow_a_mistake_or_a_full_disk_is_one_line_and_exit_code_2(capsys, error, line):
    with pytest.raises(SystemExit) as end, progress.one_line_errors():
        raise error
    assert end.value.code == 2
    assert capsys.readouterr().err == line
    with progress.one_line_errors():
        pass
    with pytest.raises(KeyError), progress.one_line_errors():
        raise KeyError("a bug stays a traceback")


def test_a_step_says_how_long_those_of_its_kind_took(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    log = progress.RunLog(lambda: None)

    def emit(event: str, **more: object) -> None:
        record = {"msg": "", "levelno": logging.INFO, "event": SimpleNamespace(name=event)} | more
        assert not log.filter(logging.makeLogRecord(record))

    def run(job: int, model: str, seconds: float) -> None:
        emit("JOB_INFO", jobid=job, rule_name="extract", wildcards={"model": model, "shard": f"{job:04d}"})
        now[0] += seconds
        emit("JOB_FINISHED", job_id=job)

    run(0, "bert", 30)
    run(1, "bert", 50)
    run(2, "llama", 300)
    assert stream.getvalue() == "  extract bert, 0001: about 30 s, as 1 before it\n"
    run(3, "bert", 1)
    run(4, "llama", 1)
    assert stream.getvalue().splitlines()[1:] == [
        "  extract bert, 0003: about 40 s, as 2 before it",
        "  extract llama, 0004: about 5 min, as 1 before it",
    ]
    emit("JOB_FINISHED", job_id=9)


def test_a_run_says_how_far_it_is_on_a_terminal_that_nothing_is_to_do_and_that_it_was_stopped(monkeypatch):
    now, nothing = [60.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    log = progress.RunLog(lambda: nothing.append("to do"))

    def passes(message: str, level: int = logging.INFO, **more: object) -> bool:
        return log.filter(logging.makeLogRecord({"msg": message, "levelno": level} | more))

    now[0] += 90.0
    for stream, shown in ((io.StringIO(), ""), (Terminal(), "  step 3 of 12 done, 1.5 min so far\n")):
        monkeypatch.setattr("sys.stderr", stream)
        assert not passes("", done=3, total=12)
        assert not passes("", done=3)
        assert stream.getvalue() == shown
    assert passes("a warning", logging.WARNING)
    assert (nothing, log.stopped) == ([], False)
    passes("Nothing to be done (all requested files are present)")
    passes("Terminating processes on user request, this might take some time.")
    passes("something after it")
    assert (nothing, log.stopped) == (["to do"], True)


def test_a_package_that_is_missing_is_named_and_a_module_of_our_own_is_a_bug():
    assert progress.reason_of(ModuleNotFoundError("", name="tqdm")).startswith(
        "this needs the package tqdm: pip install"
    )
    for name in ("approxkmv.nowhere", None):
        assert progress.reason_of(ModuleNotFoundError("", name=name)) is None


def test_too_little_memory_is_seen_behind_another_error_unless_that_hides_it():
    def failing(cause: BaseException | None, hides: bool) -> BaseException:
        try:
            try:
                raise MemoryError("too\nlarge")
            except MemoryError:
                if hides:
                    raise ConfigError("a mistake") from cause
                raise ConfigError("a mistake")  # noqa: B904
        except ConfigError as error:
            return error

    assert progress.reason_of(failing(None, hides=False)).startswith("out of memory (too large): lower batch_tokens")
    assert progress.reason_of(failing(None, hides=True)) == "a mistake"
    assert progress.reason_of(OSError("no number")) is None
    assert f"({160 * 'x'})" in progress.reason_of(MemoryError(300 * "x"))


def test_times_of_a_part_add_up_and_a_log_begins_anew(tmp_path, monkeypatch, log, capsys):
    now = iter([0.0, 1.5, 2.0, 5.0, 5.0, 5.25])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    times = progress.Times()
    for part in ("model", "kernel", "model"):
        with times.of(part):
            pass
    assert str(times) == "model 1.8 s, kernel 3.0 s"
    for line in ("one run", "the next"):
        progress.log_to(tmp_path / "step.log")
        progress.LOG.info(line)
    assert capsys.readouterr().err.splitlines() == ["one run", "the next"]
    assert (tmp_path / "step.log").read_text().endswith("the next\n")
    assert "one run" not in (tmp_path / "step.log").read_text()
