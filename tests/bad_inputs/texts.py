"""Texts that are no texts, or not those that their name promises."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import yaml

from bad_inputs import Case, command

GOOD = b'{"context": "One."}\n'
FILLER = bytes(range(256)) * 8


def texts_of(folder: Path, source: str, sha256: str | None = None, **study: Any) -> tuple[int, str]:
    """Run the texts step on a corpus."""
    config = {
        "models": {"m": {"source": "path:m"}},
        "corpora": {"c": {"source": source, "sha256": sha256}},
        "studies": {"embedded": {"models": ["m"], "corpus": "c", **study}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    found = command(folder, "texts", "--out", "texts.parquet")
    assert not (folder / "texts.parquet").exists()
    return found


def file(name: str, data: bytes, folder: Path, **study: Any) -> tuple[int, str]:
    (folder / name).write_bytes(data)
    return texts_of(folder, f"path:{name}", **study)


def parquet(**columns: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), stream)
    return stream.getvalue()


def squad(data: Any) -> bytes:
    return json.dumps({"version": "1.1", "data": data}).encode()


PARQUET = parquet(context=["One.", "Two."] * 200)
XZ, GZ = lzma.compress(GOOD * 500), gzip.compress(GOOD * 500)
FILES: list[tuple[str, str, bytes]] = [
    # No kind of text
    ("a name without a suffix", "words", b"One."),
    ("a suffix of another kind", "words.md", b"One."),
    ("a table of spreadsheets", "words.xlsx", FILLER),
    ("tab-separated values", "words.tsv", b"context\nOne.\n"),
    ("a suffix that another tool compresses", "words.jsonl.zst", GOOD),
    ("bzip2", "words.txt.bz2", b"One."),
    ("compressed, and of no kind", "words.xz", lzma.compress(b"One.")),
    ("compressed twice", "words.txt.gz.xz", lzma.compress(gzip.compress(b"One."))),
    ("a name that only contains a suffix", "words.txt~", b"One."),
    # Plain text
    ("an empty file", "words.txt", b""),
    ("white space alone", "words.txt", b" \n\t\n\r\n"),
    ("a byte order mark alone", "words.txt", b"\xef\xbb\xbf"),
    ("Latin-1", "words.txt", b"One.\nOs\xe9.\n"),
    ("UTF-16 with its mark", "words.txt", "One.".encode("utf-16")),
    ("UTF-16 without a mark", "words.txt", "One.".encode("utf-16-le")),
    ("UTF-32", "words.txt", "One.".encode("utf-32")),
    ("a surrogate in UTF-8", "words.txt", b"One.\n\xed\xa0\x80\n"),
    ("an overlong sequence", "words.txt", b"\xc0\xaf"),
    ("UTF-8 that ends inside a character", "words.txt", "Os\xe9".encode()[:-1]),
    ("a null character", "words.txt", b"One.\n\0\n"),
    ("a program", "words.txt", b"\x7fELF\x02\x01\x01\0" + FILLER),
    ("a pointer of Git LFS", "words.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ("a pointer of Git LFS, compressed by its name", "words.jsonl.xz", b"version https://git-lfs.github.com/spec/v1\n"),
    # Compressed
    ("xz that is not xz", "words.txt.xz", b"One."),
    ("gzip that is not gzip", "words.txt.gz", b"One."),
    ("xz under the name of gzip", "words.txt.gz", XZ),
    ("gzip under the name of xz", "words.txt.xz", GZ),
    ("xz cut short", "words.jsonl.xz", XZ[: len(XZ) // 2]),
    ("xz without its end", "words.jsonl.xz", XZ[:-4]),
    ("an xz header alone", "words.jsonl.xz", XZ[:12]),
    ("an empty file called xz", "words.jsonl.xz", b""),
    ("xz with a changed byte", "words.jsonl.xz", XZ[:30] + bytes([XZ[30] ^ 255]) + XZ[31:]),
    ("gzip cut short", "words.jsonl.gz", GZ[: len(GZ) // 2]),
    ("a gzip header alone", "words.jsonl.gz", GZ[:10]),
    ("gzip with a changed byte", "words.jsonl.gz", GZ[:20] + bytes([GZ[20] ^ 255]) + GZ[21:]),
    ("gzip with a changed checksum", "words.jsonl.gz", GZ[:-8] + bytes(8)),
    ("zlib under the name of gzip", "words.jsonl.gz", zlib.compress(GOOD)),
    ("empty, compressed", "words.txt.gz", gzip.compress(b"")),
    ("Latin-1, compressed", "words.txt.xz", lzma.compress(b"Os\xe9")),
    # A line of JSON each
    ("a line that is not JSON", "words.jsonl", GOOD + b"{broken\n"),
    ("a line cut short", "words.jsonl", GOOD + GOOD[:9]),
    ("two objects on a line", "words.jsonl", GOOD.strip() + GOOD),
    ("a line that is a number", "words.jsonl", GOOD + b"5\n"),
    ("a line that is null", "words.jsonl", GOOD + b"null\n"),
    ("a line that is a list", "words.jsonl", GOOD + b"[1, 2]\n"),
    ("an object over several lines", "words.jsonl", b'{\n"context": "One."\n}\n'),
    ("an array in place of lines", "words.jsonl", b'[{"context": "One."},\n{"context": "Two."}]\n'),
    ("no context", "words.jsonl", GOOD + b'{"text": "One."}\n'),
    ("a context that is a number", "words.jsonl", GOOD + b'{"context": 5}\n'),
    ("a context that is null", "words.jsonl", b'{"context": null}\n'),
    ("a context that is a list", "words.jsonl", b'{"context": ["One."]}\n'),
    ("a context that is a long list", "words.jsonl", b'{"context": [' + b"1, " * 5000 + b"1]}\n"),
    ("contexts of white space", "words.jsonl", b'{"context": " "}\n{"context": ""}\n'),
    ("a title that is a number", "words.jsonl", b'{"context": "One.", "title": 5}\n'),
    ("questions that are null", "words.jsonl", b'{"context": "One.", "questions": null}\n'),
    ("questions that are a text", "words.jsonl", b'{"context": "One.", "questions": "Why?"}\n'),
    ("questions of numbers", "words.jsonl", b'{"context": "One.", "questions": [5]}\n'),
    ("a question that is a list", "words.jsonl", b'{"context": "One.", "question": ["Why?"]}\n'),
    ("a key twice", "words.jsonl", b'{"context": "One.", "context": "Two."}\n'),
    ("half a surrogate pair", "words.jsonl", GOOD + b'{"context": "\\ud800"}\n'),
    ("the other half in a title", "words.jsonl", b'{"context": "One.", "title": "\\udc00"}\n'),
    ("half a surrogate pair in a question", "words.jsonl", b'{"context": "One.", "questions": ["\\ud83d"]}\n'),
    ("a number of 6,000 digits", "words.jsonl", GOOD + b'{"context": "One.", "id": ' + b"9" * 6000 + b"}\n"),
    ("a list nested 100,000 deep", "words.jsonl", b"[" * 100_000 + b"]" * 100_000),
    ("an object nested 100,000 deep", "words.jsonl", b'{"context": ' * 100_000 + b"1" + b"}" * 100_000),
    ("a context nested 900 deep", "words.jsonl", b'{"context": ' + b"[" * 900 + b"]" * 900 + b"}"),
    ("single quotes", "words.jsonl", b"{'context': 'One.'}\n"),
    ("a raw line break in a text", "words.jsonl", b'{"context": "One.\nTwo."}\n'),
    ("a comma behind the last key", "words.jsonl", b'{"context": "One.",}\n'),
    # One JSON value
    ("no JSON at all", "words.json", b"One."),
    ("an empty JSON file", "words.json", b""),
    ("lines called a JSON file", "words.json", GOOD * 2),
    ("an object without data", "words.json", b'{"context": "One."}'),
    ("an empty object", "words.json", b"{}"),
    ("an empty array", "words.json", b"[]"),
    ("a number", "words.json", b"5"),
    ("a text", "words.json", b'"One."'),
    ("an array of numbers", "words.json", b"[1, 2]"),
    ("an array of lists", "words.json", b'[["One."]]'),
    ("an array with null", "words.json", b'["One.", null]'),
    ("an array with half a surrogate pair", "words.json", b'["One.", "\\ud800"]'),
    ("an array with a number of 6,000 digits", "words.json", b'[\n{"context": "One.", "id":\n' + b"9" * 6000 + b"}]"),
    ("an array nested 100,000 deep", "words.json", b"[" * 100_000 + b"]" * 100_000),
    ("an array cut short", "words.json", b'["One.", "Two.'),
    ("an article without paragraphs", "words.json", squad([{"title": "a"}])),
    ("an article that is a list", "words.json", squad([["a"]])),
    ("paragraphs that are null", "words.json", squad([{"paragraphs": None}])),
    ("a paragraph without context", "words.json", squad([{"paragraphs": [{"qas": []}]}])),
    ("a paragraph without questions", "words.json", squad([{"paragraphs": [{"context": "One."}]}])),
    ("a question without its text", "words.json", squad([{"paragraphs": [{"context": "One.", "qas": [{"id": 1}]}]}])),
    (
        "a question that is a number",
        "words.json",
        squad([{"paragraphs": [{"context": "a", "qas": [{"question": 1}]}]}]),
    ),
    ("a context of SQuAD that is a number", "words.json", squad([{"paragraphs": [{"context": 1, "qas": []}]}])),
    ("no article", "words.json", squad([])),
    ("data that is an object", "words.json", squad({"a": 1})),
    # CSV
    ("an empty CSV", "words.csv", b""),
    ("a header alone", "words.csv", b"context\n"),
    ("no column context", "words.csv", b"text,title\nOne.,a\n"),
    ("a column context with another capital", "words.csv", b"Context\nOne.\n"),
    ("the column context twice", "words.csv", b"context,context\nOne.,Two.\n"),
    ("a space before the name of a column", "words.csv", b"context, question\nOne.,Why?\n"),
    ("a space behind the name of a column", "words.csv", b"context,questions \nOne.,Why?\n"),
    ("a column of questions with a capital", "words.csv", b"context,Question\nOne.,Why?\n"),
    ("a space before a key", "words.jsonl", b'{"context": "One.", " question": "Why?"}\n'),
    ("a key with a capital in an array", "words.json", b'[{"context": "One.", "Questions": ["Why?"]}]'),
    ("a space before a column of a table", "words.parquet", parquet(**{"context": ["One."], " question": ["Why?"]})),
    ("a row with a field too many", "words.csv", b"context,title\nOne.,a\nTwo.,b,c\n"),
    ("a row with a field too few", "words.csv", b"context,title\nOne.,a\nTwo.\n"),
    ("a quotation that is not closed", "words.csv", b'context\nOne.\n"Two.\n'),
    ("a letter behind a quotation", "words.csv", b'context\n"One."Two\n'),
    ("semicolons", "words.csv", b"title;context\na;One.\n"),
    ("a CSV in Latin-1", "words.csv", b"context\nOne.\nOs\xe9\n"),
    ("a CSV with a null character", "words.csv", b"context\nOne.\n\0\n"),
    ("a CSV with lists of questions", "words.csv", b'context,questions\nOne.,"[""Why?""]"\n'),
    ("a CSV of empty texts", "words.csv", b'context\n""\n" "\n'),
    # Parquet
    ("a Parquet file that is not one", "words.parquet", b"One."),
    ("an empty Parquet file", "words.parquet", b""),
    ("a Parquet file cut short", "words.parquet", PARQUET[: len(PARQUET) // 2]),
    ("a Parquet file without its end", "words.parquet", PARQUET[:-8]),
    ("a Parquet file without its start", "words.parquet", PARQUET[8:]),
    ("a Parquet footer with another length", "words.parquet", PARQUET[:-8] + b"\xff" + PARQUET[-7:]),
    ("a Parquet file with a column of zeros", "words.parquet", b"PAR1" + bytes(60) + PARQUET[64:]),
    ("a table without context", "words.parquet", parquet(text=["One."])),
    ("a table without columns", "words.parquet", parquet()),
    ("a table without rows", "words.parquet", parquet(context=pa.array([], pa.string()))),
    ("a column of numbers", "words.parquet", parquet(context=[1, 2])),
    ("a column of bytes", "words.parquet", parquet(context=[b"One."])),
    ("a column of lists", "words.parquet", parquet(context=[["One."]])),
    ("a column with a gap", "words.parquet", parquet(context=["One.", None])),
    ("a column of nothing", "words.parquet", parquet(context=pa.nulls(3))),
    ("titles that are numbers", "words.parquet", parquet(context=["One."], title=[1])),
    ("questions that are numbers in a table", "words.parquet", parquet(context=["One."], questions=[[1]])),
    (
        "text in a table that is not UTF-8",
        "words.parquet",
        parquet(context=pa.array([b"Os\xe9"]).view(pa.string())),
    ),
    ("a CSV called Parquet", "words.parquet", pd.DataFrame({"context": ["One."]}).to_csv().encode()),
    ("a Parquet file called CSV", "words.csv", PARQUET),
    ("a Parquet file called text", "words.txt", PARQUET),
]


def folder_as_corpus(folder: Path) -> tuple[int, str]:
    (folder / "words.txt").mkdir()
    return texts_of(folder, "path:words.txt")


def pipe_as_corpus(folder: Path) -> tuple[int, str]:
    os.mkfifo(folder / "words.txt")
    return texts_of(folder, "path:words.txt")


def link_to_itself(folder: Path) -> tuple[int, str]:
    (folder / "words.txt").symlink_to("words.txt")
    return texts_of(folder, "path:words.txt")


def link_to_nowhere(folder: Path) -> tuple[int, str]:
    (folder / "words.txt").symlink_to("removed.txt")
    return texts_of(folder, "path:words.txt")


def local_folder_of_a_data_set(folder: Path) -> tuple[int, str]:
    (folder / "somebody" / "words").mkdir(parents=True)
    (folder / "somebody" / "words" / "train.jsonl").write_bytes(GOOD)
    return texts_of(folder, "hub:somebody/words@abc")


SOURCES = {
    "a file that is not there": "path:none.txt",
    "a user that is not there": "path:~nobody-of-this-name/words.txt",
    "a name longer than any file's": f"path:{'x' * 5000}.txt",
    "a null character in a path": "path:words\0.txt",
    "a line break behind a path": "path:words.txt\n",
    "a device": "path:/dev/zero",
    "a data set without a revision": "hub:somebody/words",
    "a data set with an empty revision": "hub:somebody/words@",
    "a data set whose name climbs": "hub:../words@abc",
    "a data set whose name is absolute": "hub:/somebody/words@abc",
    "a data set with three names": "hub:a/b/c@abc",
    "a data set with a space": "hub:some body/words@abc",
    "a line break behind a revision": "hub:somebody/words@abc\n",
    "a data set that cannot be had": "hub:somebody/words@abc",
}
HASHES: dict[str, Callable[[Path], tuple[int, str]]] = {
    "a file with another hash": lambda folder: hashed(folder, "path:words.jsonl"),
    "a hash of a data set": lambda folder: hashed(folder, "hub:somebody/words@abc"),
}


def hashed(folder: Path, source: str) -> tuple[int, str]:
    (folder / "words.jsonl").write_bytes(GOOD)
    return texts_of(folder, source, sha256="0" * 64)


def question_context(folder: Path) -> tuple[int, str]:
    return file("words.jsonl", GOOD, folder, unit="question_context")


CASES = [
    *(Case("texts", name, partial(file, path, data)) for name, path, data in FILES),
    *(Case("texts", name, partial(texts_of, source=source)) for name, source in SOURCES.items()),
    *(Case("texts", name, run) for name, run in HASHES.items()),
    Case("texts", "a folder called as a file", folder_as_corpus),
    Case("texts", "a pipe", pipe_as_corpus),
    Case("texts", "a link to itself", link_to_itself),
    Case("texts", "a link to nowhere", link_to_nowhere),
    Case("texts", "a folder with the name of a data set", local_folder_of_a_data_set),
    Case("texts", "questions asked of a corpus without", question_context),
]
