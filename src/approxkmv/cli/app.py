"""The command line's application, and what its commands share: options, the study that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from approxkmv.config import Study, load_config, study_of
from approxkmv.progress import log_to

app = typer.Typer(
    name="approxkmv",
    help=(
        "Is a model's attention sparse, head by head and length by length?\n\n"
        "A study goes through fetch, texts, extract, statistics, summary, growth, compare, figure; long texts through "
        "lengths, length-scaling and growth; attention methods through model-heads and sweep, and perplexity. "
        "Snakemake runs them all; each can be run alone. Every command reads config.yaml (--config) and works on the "
        "study that it names (or --study). A user's mistake is one line and exit code 2."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

config_app = typer.Typer(
    help="The configuration: check it, explain its keys.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")

Config = Annotated[Path, typer.Option("--config", help="The configuration file.")]
StudyName = Annotated[str | None, typer.Option("--study", help="A study of the configuration; its `study` by default.")]
Log = Annotated[Path | None, typer.Option("--log", help="Write the finished steps with their times here as well.")]
Model = Annotated[str, typer.Option("--model", help="A model of the study, by its name in the catalogue.")]
CONFIG = Path("config.yaml")


def asked(config: Path, study: str | None, log: Path | None) -> Study:
    """The study that a command works on; from here on its steps are logged. Raises ConfigError."""
    log_to(log)
    return study_of(load_config(config), study)
