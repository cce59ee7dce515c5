"""Every command explains itself and each of its options."""

from __future__ import annotations

import importlib.metadata
import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from approxkmv.cli import app
from approxkmv.errors import TableError

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
