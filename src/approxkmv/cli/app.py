"""The command-line application, and what its commands share: options, and the study they work on."""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from approxkmv.config import Study, load_config, study_of
from approxkmv.errors import ConfigError, TableError
from approxkmv.files import check_writable
from approxkmv.progress import log_to

app = typer.Typer(
    name="approxkmv",
    help=(
        "Is a model's attention sparse, head by head and length by length?\n\n"
        "For one model: approxkmv check path:FOLDER. "
        "A study runs fetch, texts, extract, statistics, summary, growth, compare and figure; one of long texts runs "
        "lengths, length-scaling and growth; one of attention methods runs model-heads, sweep and perplexity. "
        "Snakemake runs them all; each can also be run alone. They read config.yaml (--config) and work on "
        "the study named there (or by --study). A user error prints one line and exits with code 2."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        typer.echo(f"approxkmv {importlib.metadata.version('approxkmv')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


config_app = typer.Typer(
    help="Check the configuration, or document its keys.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")

# What the help calls the file that an option has a command write; Command tells these options by it.
FILE, LOG_FILE = "FILE", "LOG"
Config = Annotated[Path, typer.Option("--config", help="The configuration file.")]
StudyName = Annotated[
    str | None, typer.Option("--study", help="A study of the configuration; default: its key `study`.")
]
Log = Annotated[
    Path | None,
    typer.Option("--log", metavar=LOG_FILE, help="Also log finished steps and their times to this file."),
]
Model = Annotated[str, typer.Option("--model", help="A model of the study, by its name in the configuration.")]
CONFIG = Path("config.yaml")


def to_write(*flags: str, help: str) -> Any:
    """The option of a file to write. Its callback raises TableError for a path that cannot be a file's, as "."."""
    return typer.Option(*flags, help=help, metavar=FILE, callback=of_a_file)


def of_a_file(path: Path) -> Path:
    """The path, if it can be that of a file. Raises TableError."""
    if not path.name:
        raise TableError(f"cannot write {path}: give the name of a file")
    return path


def asked(config: Path, study: str | None, log: Path | None) -> Study:
    """The study that a command works on; also starts the log of its steps. Raises ConfigError."""
    log_to(log)
    return study_of(load_config(config), study)


def refuse_given(context: typer.Context, names: Collection[str], why: str) -> None:
    """Raise ConfigError if one of these options was given, where nothing would read it."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


class Command(TyperCommand):
    """A command that does not start where it could not write its files, or would write over one that it reads."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises TableError."""
        named = [(option, path) for option in self.params for path in _paths(ctx.params.get(option.name))]
        for (option, path), (other, same) in permutations(named, 2):
            if option.metavar in (FILE, LOG_FILE) and os.path.realpath(path) == os.path.realpath(same):
                raise TableError(f"cannot write {path}: {other.opts[0]} names this file too")
        check_writable(*(path for option, path in named if option.metavar == FILE))
        return super().invoke(ctx)


def _paths(value: Any) -> list[Path]:
    return [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, Path)]
