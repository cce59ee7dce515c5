"""Every command explains itself and each of its options."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from inspect import unwrap
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from approxkmv.cli import app, main
from approxkmv.errors import ConfigError, TableError

ROOT = Path(__file__).resolve().parents[2]
APP = typer.main.get_command(app)
COMMANDS = APP.commands
EVERY = [*COMMANDS.items(), *COMMANDS["config"].commands.items()]


def help_of(*words: str) -> str:
    """What --help prints, without its line breaks."""
    result = CliRunner().invoke(app, [*words, "--help"], catch_exceptions=False)
    assert result.exit_code == 0
    return " ".join(result.output.split())


def test_the_help_lists_every_command():
    assert {"fetch", "texts", "extract", "statistics", "summary", "growth", "compare", "figure"} <= set(COMMANDS)
    shown = help_of()
    for name, command in COMMANDS.items():
        assert f" {name} {command.help.splitlines()[0]}" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_explains_every_option_and_argument(name):
    shown = help_of(name)
    assert COMMANDS[name].help.splitlines()[0] in shown
    for option in COMMANDS[name].params:
        assert (option.help or "").strip(), f"{name}: {option.name} has no help text"
        assert " ".join(option.help.split()) in shown
        for word in option.opts:
            assert word in shown


@pytest.mark.parametrize(("name", "command"), [(name, command) for name, command in EVERY if name != "config"])
def test_the_help_of_a_command_has_an_example_that_can_be_typed(name, command):
    words = shlex.split(" ".join(command.help.split("Example: ")[1].split(" > ")[0].split()))
    assert words[0] == "approxkmv"
    context = APP.make_context("approxkmv", words[1:])
    found = APP
    while hasattr(found, "resolve_command"):
        _, found, rest = found.resolve_command(context, [*context._protected_args, *context.args])
        context = found.make_context(found.name, rest, parent=context)
    assert found.name == name
    assert found is command


def test_the_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"approxkmv {importlib.metadata.version('approxkmv')}\n")


def files_to_write(command) -> list:
    """The options of a command that name a file to write, in its own words."""
    return [option for option in command.params if re.search(r"(file|File) to write|are written\.$", option.help or "")]


@pytest.mark.parametrize("path", ["", ".", "/"])
@pytest.mark.parametrize("name", [name for name, command in EVERY if files_to_write(command)])
def test_a_path_that_cannot_be_a_file_is_refused_as_one_to_write(name, path):
    # Before anything is read: of the other options none names what there is.
    words = [name]
    for option in COMMANDS[name].params:
        if option in files_to_write(COMMANDS[name]) or option.required:
            words += [option.opts[0]] * (option.param_type_name == "option")
            words += [path if option in files_to_write(COMMANDS[name]) else "1"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, TableError), result.output
    assert str(result.exception).endswith(": give the name of a file")


def pairs_of_files() -> list[tuple[str, Any, Any]]:
    """Every command with two options that name files, of which the first is written."""
    found = []
    for name, command in EVERY:
        hints = get_type_hints(unwrap(command.callback)) if command.callback else {}
        paths = [option for option in command.params if "Path" in str(hints.get(option.name))]
        # `figure --out` is the beginning of two names.
        files = [option for option in files_to_write(command) if option.name != "stem"]
        written = [option for option in paths if option in files or option.name == "log"]
        found += [(name, one, other) for one in written for other in paths if other is not one]
    return found


@pytest.mark.parametrize(
    ("name", "written", "other"),
    [pytest.param(*pair, id=f"{pair[0]}-{pair[1].name}-{pair[2].name}") for pair in pairs_of_files()],
)
def test_no_command_writes_over_a_file_that_it_reads_or_writes_too(name, written, other, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a").write_text("kept")
    words = []
    for option in COMMANDS[name].params:
        if option in (written, other) or option.required:
            words += [option.opts[0]] * (option.param_type_name == "option")
            path = tmp_path / {written: "link", other: "a"}.get(option, option.name)
            words += ["1" if option.name == "shard" else str(path)]
    with pytest.raises(TableError, match=r"^cannot write .*/(a|link): \S+ names this file too$"):
        COMMANDS[name].main(words, name, standalone_mode=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]
    assert (tmp_path / "a").read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "M", "--contexts", "0"], "Invalid value for '--contexts': it must be greater than or equal to 1"),
        (["check", "M", "--contexts", "x"], "Invalid value for '--contexts': it must be a valid integer"),
        (["check"], "Missing argument"),
        (["nope"], "No such command 'nope'"),
        (["clean", "nowhere"], "nowhere is no folder of a study"),
    ],
)
def test_a_wrong_option_is_one_line(words, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["approxkmv", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"approxkmv: {said}")


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--version"], 0), (["check", "--help"], 0)])
def test_help_and_version_end_as_they_should(words, code, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["approxkmv", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert "approxkmv" in "".join(capsys.readouterr())


def test_a_package_is_taken_into_the_folder_that_is_named(monkeypatch):
    monkeypatch.setattr("approxkmv.steps.package.take", lambda package, into: [f"{package} into {into}"])
    for words, said in (([], "a.zip into None\n"), (["--into", "b"], "a.zip into b\n")):
        assert CliRunner().invoke(app, ["take", "a.zip", *words]).output == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("perplexity --study perplexity --tokens 64", "--tokens goes with --method: the study has its own"),
        ("perplexity --study perplexity --plan none.json --seed 1", "--seed goes with --method: the study has its own"),
        *(
            (f"perplexity --study perplexity --{name} {value}", f"--{name} goes with --method: the study has its own")
            for name, value in (("model", "m"), ("corpus", "c"), ("layers", "0"), ("parameters", "{}"))
        ),
        ("perplexity --plan none.json --parameters {}", "--parameters goes with --method"),
        ("perplexity --method window --study perplexity", "--study goes with a study that has perplexity, and without"),
        ("perplexity --plan none.json --study embedded", "--study goes with a study that has perplexity"),
        *(
            (f"sweep --settings none.json --{name} none", f"--{name} goes with a configuration, not with --settings")
            for name in ("config", "study", "capture", "tuning-capture")
        ),
        *(
            (f"sweep --study figure5 --{name} heads.safetensors", f"--{name} goes with a sweep that captures heads")
            for name in ("capture", "tuning-capture")
        ),
        *(
            (f"plan --study perplexity --{name} {value}", f"--{name} goes with --model: the study has its own")
            for name, value in (("target", "0.1"), ("tokens", "64"), ("corpus", "c"))
        ),
        ("plan --model smollm2-135m --study perplexity", "--study goes without --model"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, [*words.split(), "--out", str(out)])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(said)
    assert not out.exists()
