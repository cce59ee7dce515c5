"""File formats of texts: a function for each, from the bytes of a file to its documents."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from approxkmv.corpora.passages import Document
from approxkmv.errors import SourceError

# More than any study needs; a compressed file may expand to far more than a machine can hold.
LARGEST = 2**31
# Bytes of a row of a table, less its texts.
BESIDE_TEXT = 100
# Of what makes up a document.
NAMES = ("context", "title", "question", "questions")
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def read_file(path: Path) -> list[Document]:
    """The documents of a file, by its suffix; rows that repeat a context are merged, with all their questions.

    Raises SourceError with one line that names the file and, if there is one, the line.
    """
    name = path.name
    packed = path.suffix.lower() if path.suffix.lower() in OPENERS else ""
    kind = Path(name[: len(name) - len(packed)]).suffix.lower()
    if kind not in READERS:
        raise SourceError(
            f"{path} is not a supported text file: its name must end in {', '.join(READERS)}, "
            "optionally followed by .xz or .gz"
        )
    try:
        data = _unpacked(path, packed)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    try:
        return list(READERS[kind](data, name))
    except RecursionError as error:
        raise SourceError(f"{path} is nested too deeply for a file of texts") from error


def merged(documents: Iterable[Document]) -> list[Document]:
    """Merge documents with the same context: the place and title of the first, the questions of all."""
    found: dict[str, Document] = {}
    for document in documents:
        first = found.get(document.context)
        questions = document.questions if first is None else first.questions + document.questions
        found[document.context] = replace(first or document, questions=questions)
    return list(found.values())


def document_of(row: Any, where: str) -> Document:
    """A document from a row: a text, or an object with `context` and optionally `title`, `question`, `questions`.

    Raises SourceError, prefixed with `where`, for any other row.
    """
    row = {"context": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise SourceError(f"{where} is neither a text nor an object with a string `context`")
    _refuse_near_names(row, where)
    if "context" not in row:
        raise SourceError(f"{where} has no `context`, but {', '.join(f'{name:.40}' for name in row) or 'nothing'}")
    context, title, questions = row["context"], row.get("title", ""), row.get("questions", [])
    if not isinstance(context, str):
        raise SourceError(f"{where} has a `context` that is not text: {reprlib.repr(context)}")
    if not isinstance(questions, list):
        raise SourceError(f"{where}: questions must be a list of strings: name one question `question`")
    questions = [*questions, *([row["question"]] if "question" in row else [])]
    texts = (context, title, *questions)
    if any(type(text) is not str for text in texts):
        raise SourceError(f"{where}: title and question must be strings, and questions a list of strings")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SourceError(f"{where} has half a surrogate pair, {text[error.start]!a}: write UTF-8") from error
    # The title becomes the name of a row in tables, whose lines a carriage return would break.
    return Document(" ".join(title.split()), context, tuple(question for question in questions if question.strip()))


def _unpacked(path: Path, packed: str) -> bytes:
    parts: list[bytes] = []
    with open(path, "rb") as stream:
        if stream.read(30).startswith(b"version https://git-lfs"):
            raise SourceError(f"{path} is a Git LFS pointer, not the file: run git lfs pull")
    with OPENERS.get(packed, open)(path, "rb") as stream:
        while part := stream.read(2**20):
            parts.append(part)
            _refuse_too_much(path, len(parts) * 2**20)
    return b"".join(parts)


def _refuse_too_much(name: object, size: int) -> None:
    if size > LARGEST:
        raise SourceError(f"{name} holds more than {LARGEST / 2**30:g} GiB: cut it into a smaller file")


def _text(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(f"{name}, line {line}, is not UTF-8 text: {error.reason}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SourceError(f"{name}, line {line}, has a null character: write the file as UTF-8 text")
    return text


def _json(text: str, where: str) -> Any:
    def refused(reason: object, line: int | None = None) -> SourceError:
        place = f"{where}, line {line}" if line and "\n" in text else where
        return SourceError(f"{place}{',' if ', line ' in place else ''} {reason}")

    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        raise refused(f"is not JSON: {error.msg}", error.lineno) from error
    except ValueError as error:
        # Python refuses to parse numbers of more than 4,300 digits.
        long = re.search(r"\d{4301}", text)
        reason = "a number has more than 4,300 digits" if long else error
        line = text.count("\n", 0, long.start()) + 1 if long else None
        raise refused(f"cannot be read: {reason}", line) from error
    except RecursionError as error:
        raise refused("is nested too deeply for a file of texts") from error


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!a} occurs twice")
    return found


def _plain_text(data: bytes, name: str) -> Iterator[Document]:
    """A document per block of lines between blank lines."""
    for block in re.split(r"\n\s*\n", _lines(_text(data, name))):
        if block.strip():
            yield Document(name, " ".join(block.split()))


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_lines(data: bytes, name: str) -> list[Document]:
    """One row per line."""
    # Not splitlines: JSON allows other line separators inside strings.
    lines = enumerate(_lines(_text(data, name)).split("\n"), 1)
    rows = ((f"{name}, line {number}", line) for number, line in lines if line.strip())
    return merged(document_of(_json(line, where), where) for where, line in rows)


def _json_file(data: bytes, name: str) -> list[Document]:
    """SQuAD's own format (`data`, articles, `paragraphs` with `context` and `qas`) or an array of rows."""
    value = _json(_text(data, name), name)
    if isinstance(value, list):
        return merged(document_of(row, f"{name}, entry {number} of the array") for number, row in enumerate(value, 1))
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise SourceError(f"{name} is neither an array of texts nor an object with `data`, as SQuAD's own files are")
    return merged(_of_squad(value["data"], name))


def _of_squad(articles: list[Any], name: str) -> Iterator[Document]:
    for number, article in enumerate(articles, 1):
        where = f"{name}, article {number}"
        try:
            rows = [
                {
                    "title": article.get("title", ""),
                    "questions": [question["question"] for question in paragraph["qas"]],
                }
                | {"context": paragraph["context"]}
                for paragraph in article["paragraphs"]
            ]
        except (AttributeError, KeyError, TypeError) as error:
            raise SourceError(f"{where}, is not in SQuAD's format: paragraphs with context and qas") from error
        for row in rows:
            yield document_of(row, where)


def _csv(data: bytes, name: str) -> list[Document]:
    """One row per line, below a header with the column names."""
    # The csv module's own limit is 131,072 characters per field; this setting is global to the process.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_text(data, name), newline=""), strict=True)
    documents = []
    try:
        header = next(reader, [])
        used = columns_of(header, name)
        for row in filter(None, reader):
            where = f"{name}, line {reader.line_num}"
            if len(row) != len(header):
                raise SourceError(f"{where}, has {len(row)} fields, but the first line has {len(header)}")
            documents.append(document_of({key: row[header.index(key)] for key in used}, where))
    except csv.Error as error:
        raise SourceError(f"{name}, line {reader.line_num}, is not CSV: {error}") from error
    return merged(documents)


def _parquet(data: bytes, name: str) -> list[Document]:
    """One document per row."""
    import pyarrow
    import pyarrow.parquet

    try:
        return merged(_rows_of_parquet(pyarrow.parquet.ParquetFile(io.BytesIO(data)), name))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SourceError(f"{name} cannot be read as Parquet: {error}") from error


def _rows_of_parquet(file: Any, name: str) -> Iterator[Document]:
    columns = columns_of(file.schema_arrow.names, name)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    parts = [group.column(i) for group in groups for i in range(group.num_columns)]
    used = [part for part in parts if part.path_in_schema.split(".")[0] in columns]
    _refuse_too_much(name, sum(part.total_uncompressed_size for part in used))
    size = number = 0
    # Few at a time: rows that repeat a text take hardly any room in the file.
    for batch in file.iter_batches(16, columns=columns):
        size += batch.nbytes + BESIDE_TEXT * batch.num_rows
        _refuse_too_much(name, size)
        for row in batch.to_pylist():
            number += 1
            yield row_of_table(row, f"{name}, row {number}")


def _refuse_near_names(names: Iterable[Any], where: str) -> None:
    """Raise SourceError for a name that would be read but for spaces around it or capitals."""
    for name in names:
        if name not in NAMES and str(name).strip().lower() in NAMES:
            raise SourceError(f"{where} has {name!r}, which is not read: name it {str(name).strip().lower()}")


def columns_of(names: Sequence[str], where: str) -> list[str]:
    """The columns of a table that make up a document.

    Raises SourceError without `context`, for a duplicate, and for a name with spaces or capitals.
    """
    _refuse_near_names(names, where)
    if "context" not in names:
        found = ", ".join(f"{name:.40}" for name in names) or "none"
        raise SourceError(f"{where} has no column `context`: its columns are {found}")
    used = [name for name in names if name in NAMES]
    if len(set(used)) < len(used):
        raise SourceError(f"{where} has one of the columns {', '.join(sorted(set(used)))} twice")
    return used


def row_of_table(row: dict[str, Any], where: str) -> Document:
    """A document from a row in which missing values (except the context) are None."""
    return document_of({key: value for key, value in row.items() if value is not None or key == "context"}, where)


READERS: dict[str, Callable[[bytes, str], Iterable[Document]]] = {
    ".txt": _plain_text,
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".csv": _csv,
    ".parquet": _parquet,
}
