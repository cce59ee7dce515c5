"""Every command explains itself and each of its options."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from approxkmv.cli import app

COMMANDS = typer.main.get_command(app).commands


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
