"""The commands that look after a study: show, clean, config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from approxkmv.cli.app import CONFIG, Config, StudyName, app, config_app
from approxkmv.config import load_config, study_of


@app.command()
def show(
    results: Annotated[Path, typer.Argument(help="Folder of a study, as results/embedded.")],
) -> None:
    """Say where a study's figures are, and the few numbers that matter."""
    from approxkmv.steps.show import lines

    for line in lines(results):
        typer.echo(line)


@app.command()
def clean(
    results: Annotated[Path, typer.Argument(help="Folder of a study, as results/embedded.")],
) -> None:
    """Remove what a study's folder still holds of models, shards and parts that the study no longer has."""
    from approxkmv.steps.cleaning import remove_leftovers

    for path in remove_leftovers(results):
        typer.echo(f"removed {path}")


@config_app.command("check")
def check(config: Config = CONFIG, study: StudyName = None) -> None:
    """Check all that can be known of a study before its first job, and say what it would do. Nothing is fetched."""
    from approxkmv.steps.checking import check_study

    loaded = load_config(config)
    for line in check_study(loaded, study_of(loaded, study)):
        typer.echo(line)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of the configuration, as YAML, for editors: workflow/schemas/config.schema.yaml."""
    from approxkmv.config.documents import schema_text

    typer.echo(schema_text(), nl=False)


@config_app.command("document")
def document() -> None:
    """Print what every key of the configuration means, as Markdown: docs/configuration.md."""
    from approxkmv.config.documents import document as text

    typer.echo(text(), nl=False)
