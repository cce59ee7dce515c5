"""One self-contained HTML file from a folder of tables and, where there are any, figures."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from approxkmv.errors import TableError
from approxkmv.files import check_keys, read_json, read_table, write_text
from approxkmv.page.contents import ASSETS, CAPTIONS, FIGURES
from approxkmv.page.heads import explorer, of_model
from approxkmv.page.verdict import holds, is_on_long_texts, is_there, measured, sentences, sweep_sentence

CLAIMS = dict.fromkeys(("claim", "criterion", "model", "entries", "holds"), "text") | {"ours": "number"}


def write_page(
    tables: Path,
    figures: Path,
    out: Path,
    title: str,
    models: Collection[str] | None = None,
    left: Collection[Path] = (),
) -> int:
    """Write the page of a folder of tables, of all its models or of those named; returns its size in bytes.

    It says nothing of the files `left` by an earlier study.

    Raises TableError for a folder without tables, or for one that cannot be read; a table that is not there is named
    on the page.
    """
    if not any(tables.glob("*.csv")) and not any(tables.glob("*.json")):
        raise TableError(f"{tables} has no tables: name the folder tables of a study")
    import jinja2

    every = measured(tables, models, left)
    # One that was measured on long texts too is there twice.
    names = list(dict.fromkeys(facts["model"] for facts in every))
    shown, missing = [], []
    for facts in every:
        model, absent = of_model(tables, facts)
        missing += absent
        if model["values"]:
            shown.append(model)
    verdicts = []
    for facts in every:
        word, answer = holds(tables, facts)
        first, *found = sentences(tables, facts)
        verdicts.append({"word": word, "answer": answer, "what": first, "found": found})
    claims = tables / "paper_comparison.csv"
    if any(not is_on_long_texts(facts) for facts in every) and not claims.is_file():
        missing.append(claims.name)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    script = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in ("charts.js", "explorer.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("page.html.j2").render(
        title=title,
        verdicts=verdicts,
        sweep=sweep_sentence(tables, left),
        claims=_claims(claims, {facts["model"]: facts["label"] for facts in every}),
        explorer=explorer(shown) if shown else None,
        figures=list(_figures(tables, figures, names, left)),
        perplexities=_perplexities(tables / "perplexity.csv", left),
        records=_records(tables, left),
        missing=sorted(set(missing)),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        script=script,
        digest=digest,
    )
    write_text(out, text)
    return len(text.encode())


def figures_of(tables: Path, models: Sequence[str], left: Collection[Path] = ()) -> list[tuple[str, list[str], str]]:
    """What can be drawn from these tables, in reading order: a figure's name, its models, the name of its file."""
    from approxkmv.figures.catalogue import PER_MODEL, PER_STUDY

    found: list[tuple[str, list[str], str]] = []
    for name, figure in FIGURES.items():
        able = [m for m in models if all(is_there(tables / table.format(m), left) for table in figure.tables)]
        if name in PER_MODEL:
            found += [(name, [model], f"{name}_{model}") for model in able]
        elif able if name in PER_STUDY else is_there(tables / figure.tables[0], left):
            found.append((name, able if name in PER_STUDY else [], name))
    return found


def _figures(tables: Path, figures: Path, models: Sequence[str], left: Collection[Path]) -> Iterator[dict[str, Any]]:
    for name, of, stem in figures_of(tables, models, left):
        path = figures / f"{stem}.png"
        if path.is_file():
            caption = (CAPTIONS / f"{FIGURES[name].caption}.rst").read_text(encoding="utf-8").strip()
            parts = re.split(r"``(.+?)``", caption)
            title = FIGURES[name].title + (f", {of[0]}" if len(of) == 1 and len(models) > 1 else "")
            yield {"title": title, "caption": parts, "name": stem, **_picture(path)}


def _picture(path: Path) -> dict[str, Any]:
    from PIL import Image

    with Image.open(path) as image:
        # A quarter of the bytes; this method keeps rare colours, such as those of a map's ends.
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        data = io.BytesIO()
        small.save(data, "PNG", optimize=True)
        return {"data": base64.b64encode(data.getvalue()).decode(), "width": image.width, "height": image.height}


def _claims(path: Path, labels: dict[str, str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    shown = []
    for row in read_table(path, CLAIMS).to_dict("records"):
        if row["model"] in labels:
            paper = _short(row.get("paper", math.nan))
            words = {name: row[name].replace("<=", "≤") for name in ("claim", "criterion", "entries", "holds")}
            more = {"label": labels[row["model"]], "read": ", read as " in row["claim"]}
            shown.append(words | more | {"ours": _short(row["ours"]), "paper": paper})
    return shown


def _short(value: float, digits: int = 3) -> str:
    """A number for a cell of a table; one that could not be measured is a dash."""
    return "–" if math.isnan(value) else "∞" if value == math.inf else f"{value:,.{digits}g}"


def _perplexities(path: Path, left: Collection[Path]) -> list[dict[str, Any]]:
    if not is_there(path, left):
        return []
    numbers = ("tokens", "perplexity", "exact_perplexity", "seconds", "exact_seconds")
    words = ("model", "method", "parameters")
    rows = read_table(path, dict.fromkeys(words, "text") | dict.fromkeys(numbers, "at least 0 or empty")).to_dict(
        "records"
    )
    return [
        {"model": row["model"], "method": row["method"], "parameters": _parameters(row["parameters"])}
        | {name: _short(row[name], 4) for name in numbers}
        for row in rows
    ]


def _parameters(text: str) -> str:
    """A method's parameters as a table has them, for reading: `block 256, samples 16`."""
    try:
        given = json.loads(text)
        # A plan's parameters end with how many heads each method computes.
        heads = given.pop("heads", {})
        return ", ".join(f"{name} {value}" for name, value in (given | heads).items())
    except (ValueError, AttributeError, TypeError, RecursionError):
        return text


def _records(tables: Path, left: Collection[Path]) -> list[dict[str, Any]]:
    """The provenance of each table that records one. Raises TableError for a record of another form."""
    found = []
    for path in sorted(set(tables.glob("*.json")).difference(left)):
        facts = read_json(path)
        record = facts.get("provenance", facts)
        if isinstance(record, dict) and {"command", "machine", "versions"} <= record.keys():
            check_keys(path, record, {"machine": dict, "versions": dict})
            # Python does not know the number of cores on every machine.
            known = {} if record["machine"].get("cores", 0) is None else {"cores": int}
            check_keys(path, record["machine"], known | {"processor": str, "device": str})
            made = {name: record.get(name) for name in ("command", "commit", "machine", "versions", "settings")}
            found.append({"table": path.stem, "source": facts.get("source")} | made)
    return found
