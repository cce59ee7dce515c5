"""Read documents from a file or from a data set on the hub."""

from __future__ import annotations

from pathlib import Path

from approxkmv.corpora.formats import columns_of, merged, read_file, row_of_table
from approxkmv.corpora.passages import Document
from approxkmv.errors import SourceError, one_line
from approxkmv.files import check_sha256
from approxkmv.models.checking import refuse_broken_link
from approxkmv.models.sources import HubSource, parse_hub
from approxkmv.progress import on_terminal


def parse_corpus(source: str) -> Path | HubSource:
    """The file or data set that a corpus source names. Raises SourceError if it names neither."""
    kind, _, rest = source.partition(":")
    if kind == "path" and rest:
        try:
            return Path(rest).expanduser()
        except RuntimeError as error:
            raise SourceError(f"the corpus {source}: {error}") from error
    if kind == "hub" and rest:
        return parse_hub(source, rest)
    raise SourceError(f"the corpus source {source!r} is unknown: use path:FILE or hub:NAME@REVISION")


def read_corpus(source: str, sha256: str | None = None) -> list[Document]:
    """The documents of a corpus.

    `path:FILE` is a file in the format given by its suffix, optionally followed by .xz or .gz:
    .txt, one document per block of lines between blank lines;
    .jsonl, an object per line with `context` and optionally `title`, `questions` (a list) or `question`;
    .json, an array of such objects or of texts, or SQuAD's own file; .csv and .parquet, with such columns.
    `hub:NAME@REVISION` is a data set with the columns of SQuAD (`context`, optionally `title` and `question`), all
    splits. Rows that repeat a context are merged into one document. `sha256` applies to files only.

    Raises SourceError, in one line, when the source cannot be read or its hash differs.
    """
    where = parse_corpus(source)
    if isinstance(where, HubSource):
        if sha256 is not None:
            raise SourceError(f"the corpus {source}: sha256 is for files; a data set is pinned by its revision")
        documents = _from_hub(where)
    else:
        refuse_broken_link(where, f"the corpus {source}")
        if not where.is_file():
            what = "is a folder: name one file" if where.is_dir() else "does not exist: correct its configured path"
            raise SourceError(f"the corpus {source} {what}")
        check_sha256(where, sha256)
        documents = read_file(where)
    if not any(document.context.strip() for document in documents):
        raise SourceError(f"the corpus {source} holds no text")
    return documents


def _from_hub(source: HubSource) -> list[Document]:
    import datasets

    name, revision = source.repository, source.revision
    if Path(name).exists():
        # The library would read that folder, whatever the revision.
        raise SourceError(f"{source} is on the hub, but {name} also exists here: rename it, or use path:FILE")
    try:
        if not on_terminal():
            datasets.utils.logging.disable_progress_bar()
        splits = datasets.load_dataset(name, revision=revision)
    except Exception as error:
        raise SourceError(
            f"the data set {name} at revision {revision} cannot be loaded: {one_line(error)}. Check the network and "
            "the name, or fill the cache first"
        ) from error
    where = f"the data set {name}"
    return merged(
        row_of_table(row, where)
        for split in splits.values()
        for row in split.select_columns(columns_of(split.column_names, where))
    )
