"""Read documents from a shipped file, a plain text file, or a data set on the hub."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from approxkmv.corpora.passages import Document
from approxkmv.errors import SourceError
from approxkmv.files import check_sha256
from approxkmv.progress import on_terminal


def read_corpus(source: str, sha256: str | None = None) -> list[Document]:
    """The documents of a corpus.

    `path:FILE.jsonl[.xz]` holds one object per line with `context` and, if wanted, `title` and `questions`;
    `path:FILE.txt` is one document per block of lines between blank lines; `hub:NAME@REVISION` is a data set with the
    columns of SQuAD (`context`; if wanted, `title` and `question`), all splits. A hash is of a file, so of path: alone.

    Raises SourceError, in one line, when the source cannot be read or its hash differs.
    """
    kind, _, rest = source.partition(":")
    if kind == "path" and rest:
        path = Path(rest)
        if not path.is_file():
            raise SourceError(f"the corpus {source} does not exist: correct its path in config.yaml")
        check_sha256(path, sha256)
        name = path.name.removesuffix(".xz")
        try:
            with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8") as f:
                text = f.read()
            documents = list(_json_lines(text, name) if name.endswith(".jsonl") else _blocks(text, name))
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise SourceError(f"the corpus {source} cannot be read: {error}") from error
    elif kind == "hub" and "@" in rest:
        if sha256 is not None:
            raise SourceError(f"the corpus {source}: sha256 is of a file: a data set is pinned by its revision")
        documents = _from_hub(*rest.rsplit("@", 1))
    else:
        raise SourceError(f"the corpus source {source!r} is not known: use path:FILE or hub:NAME@REVISION")
    if not documents:
        raise SourceError(f"the corpus {source} holds no text")
    return documents


def _json_lines(text: str, name: str) -> Iterator[Document]:
    # Not splitlines: JSON allows other line separators inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{name}, line {number}, is not JSON: {error.msg}") from error
        if not isinstance(row, dict) or not isinstance(row.get("context"), str):
            raise SourceError(f"{name}, line {number}, is no object with a string `context`")
        title, questions = row.get("title", ""), row.get("questions", [])
        if not isinstance(title, str) or not isinstance(questions, list) or any(type(q) is not str for q in questions):
            raise SourceError(f"{name}, line {number}: title must be a string and questions a list of strings")
        yield Document(title, row["context"], tuple(questions))


def _blocks(text: str, name: str) -> Iterator[Document]:
    for block in text.split("\n\n"):
        if block.strip():
            yield Document(name, " ".join(block.split()))


def _from_hub(name: str, revision: str) -> list[Document]:
    import datasets

    try:
        if not on_terminal():
            datasets.utils.logging.disable_progress_bar()
        splits = datasets.load_dataset(name, revision=revision)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"the data set {name} at revision {revision} cannot be had: {reason}. Check the network and the name, "
            "or fill the cache first"
        ) from error
    # Questions about one context are rows of their own; a context keeps the place of its first row.
    found: dict[str, tuple[str, list[str]]] = {}
    for split in splits.values():
        if "context" not in split.column_names:
            raise SourceError(
                f"the data set {name} has no column `context`, of which texts are made: "
                f"its columns are {', '.join(split.column_names)}"
            )
        for row in split:
            if not isinstance(row["context"], str):
                raise SourceError(f"the data set {name} has a `context` that is no text: {row['context']!r:.40}")
            found.setdefault(row["context"], (row.get("title") or "", []))[1].append(row.get("question") or "")
    return [
        Document(title, context, tuple(question for question in questions if question))
        for context, (title, questions) in found.items()
    ]
