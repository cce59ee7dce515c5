"""The commands that look after a study: show, clean, pack, take, config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from approxkmv.cli.app import CONFIG, Config, StudyName, app, config_app, to_write
from approxkmv.config import load_config, study_of


@app.command()
def show(
    results: Annotated[Path, typer.Argument(help="A study's folder, such as results/embedded.")],
) -> None:
    """List a study's figures and its main numbers.

    Example: approxkmv show results/embedded
    """
    from approxkmv.steps.show import lines

    for line in lines(results):
        typer.echo(line)


@app.command()
def clean(
    results: Annotated[Path, typer.Argument(help="A study's folder, such as results/embedded.")],
) -> None:
    """Remove files of models, shards and parts that the study no longer has.

    Example: approxkmv clean results/embedded
    """
    from approxkmv.steps.cleaning import remove_leftovers

    for path in remove_leftovers(results):
        typer.echo(f"removed {path}")


@app.command()
def pack(
    results: Annotated[Path, typer.Argument(help="A study's folder, such as results/paper-dev.")],
    out: Annotated[Path, to_write("--out", help="The file to write, a .zip.")],
) -> None:
    """Pack a study's tables and figures, with how they were made and a manifest, for others to take.

    Example: approxkmv pack results/paper-dev --out paper-dev.zip
    """
    from approxkmv.steps.package import pack as write

    typer.echo(f"{out}: {write(results, out)} files")


@app.command()
def take(
    package: Annotated[Path, typer.Argument(help="A file that `approxkmv pack` wrote.")],
    into: Annotated[Path | None, typer.Option("--into", help="Unpack to this folder; default: only check.")] = None,
) -> None:
    """Check a package of results against its manifest and, with --into, unpack it.

    Example: approxkmv take paper-dev.zip --into results/reference
    """
    from approxkmv.steps.package import take as read

    for line in read(package, into):
        typer.echo(line)


@config_app.command("check")
def check(config: Config = CONFIG, study: StudyName = None) -> None:
    """Check a study before its first job, and say what it would do. Nothing is fetched.

    Example: approxkmv config check --study paper
    """
    from approxkmv.steps.config_check import check_study

    loaded = load_config(config)
    for line in check_study(loaded, study_of(loaded, study)):
        typer.echo(line)


@config_app.command("schema")
def schema() -> None:
    """Print the configuration's JSON Schema, as YAML, for editors: workflow/schemas/config.schema.yaml.

    Example: approxkmv config schema > workflow/schemas/config.schema.yaml
    """
    from approxkmv.config.documents import schema_text

    typer.echo(schema_text(), nl=False)


@config_app.command("document")
def document() -> None:
    """Print the meaning of every configuration key, as Markdown: docs/configuration.md.

    Example: approxkmv config document > docs/configuration.md
    """
    from approxkmv.config.documents import document as text

    typer.echo(text(), nl=False)
