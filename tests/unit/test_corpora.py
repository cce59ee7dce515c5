"""Texts are split and sampled as configured, and the shipped corpus matches its description."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import re
import statistics
from pathlib import Path

import pandas as pd
import pytest
import yaml

from approxkmv.corpora import choose_passages, formats, read_corpus
from approxkmv.corpora.passages import Document, Passage, cut_into_passages, cut_into_windows
from approxkmv.errors import ConfigError, SourceError

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_squad_has_its_hash_and_counts():
    entry = yaml.safe_load((ROOT / "config.yaml").read_text())["corpora"]["squad-dev"]
    path = ROOT / entry["source"].removeprefix("path:")
    documents = read_corpus(f"path:{path}", entry["sha256"].upper())
    assert len(documents) == 2067
    assert len({d.name for d in documents}) == 48
    assert sum(len(d.questions) for d in documents) == 10570
    assert documents[0].context.startswith("Super Bowl 50 was an American football game")


def test_units_of_text():
    documents = [
        Document("a", 'One is 3.5 m. "Two!" said he. Three?', ("Why?", "How?")),
        Document("b", "Four", ("So?",)),
    ]
    assert [p.text for p in cut_into_passages(documents, "context")] == [documents[0].context, "Four"]
    sentences = [p.text for p in cut_into_passages(documents, "sentence")]
    assert sentences[0] == "One is 3.5 m."
    assert sentences[-1] == "Four"
    assert "Three?" in sentences
    assert [p.text for p in cut_into_passages([Document("c", 'He said "Stop." Then (he did.) Go.')], "sentence")] == [
        'He said "Stop."',
        "Then (he did.)",
        "Go.",
    ]
    parts = [Document("a", "One."), Document("b", "Else."), Document("a", "Two.")]
    articles = cut_into_passages(parts, "article")
    assert [(p.index, p.name, p.text) for p in articles] == [(0, "a", "One.\n\nTwo."), (1, "b", "Else.")]
    pairs = cut_into_passages(documents, "question_context")
    assert [p.text[:4] for p in pairs] == ["Why?", "How?", "So? "]
    assert [p.index for p in pairs] == [0, 1, 2]
    with pytest.raises(ConfigError, match="no questions"):
        cut_into_passages([Document("c", "x")], "question_context")
    with pytest.raises(ConfigError, match="'x y' has no title: use context"):
        cut_into_passages([Document("a", "x"), Document("", "x y")], "article")
    assert cut_into_passages([Document("d", " \n ")], "sentence") == []
    assert cut_into_passages([Document("d", "x", (" Why? ",))], "question_context")[0].text == "Why? x"


def test_half_of_the_sentences_are_as_short_as_the_configuration_says():
    text = (ROOT / "config.yaml").read_text()
    (said,) = re.findall(r"readings of sentences, of which half have (\d+) words at most", text)
    source = yaml.safe_load(text)["corpora"]["squad-dev"]["source"].removeprefix("path:")
    passages = cut_into_passages(read_corpus(f"path:{ROOT / source}"), "sentence")
    assert int(said) == statistics.median(len(passage.text.split()) for passage in passages)


def test_windows_hold_all_of_a_long_text_and_at_most_the_limit():
    def tokens_of(text: str) -> int:
        return 2 + sum(-(-len(word) // 4) for word in text.split())

    long = " ".join("abcdefghijk"[: 1 + i * 7 % 11] for i in range(100))
    passages = cut_into_passages([Document("a", "short"), Document("b", long), Document("c", "x" * 1000)], "context")
    windows = cut_into_windows(passages, 20, tokens_of)
    assert [w.index for w in windows] == list(range(len(windows)))
    assert (windows[0].name, windows[0].text) == ("a", "short")
    assert max(tokens_of(w.text) for w in windows) <= 20
    of_words = [w for w in windows if w.name.startswith("b")]
    assert " ".join(w.text for w in of_words) == long
    assert of_words[1].name == "b, window 2"
    # No window has room for the next one's first word.
    for one, other in itertools.pairwise(of_words):
        assert tokens_of(f"{one.text} {other.text.split()[0]}") > 20
    # Without white space, between any letters.
    assert "".join(w.text for w in windows if w.name.startswith("c")) == "x" * 1000
    # Where the limit has no room for a word, each is a window.
    assert [w.text for w in cut_into_windows(passages[1:2], 2, tokens_of)] == long.split()
    (whole,) = cut_into_windows([Passage(7, "d", " two words ")], 5, tokens_of)
    assert whole == Passage(0, "d", " two words ")


def test_a_draw_is_seeded_nested_and_in_order():
    passages = cut_into_passages([Document(str(i), str(i)) for i in range(100)], "context")
    ten, twenty = choose_passages(passages, 10, 7), choose_passages(passages, 20, 7)
    assert ten == choose_passages(passages, 10, 7)
    assert ten != choose_passages(passages, 10, 8)
    assert set(ten) < set(twenty)
    assert [p.index for p in twenty] == sorted(p.index for p in twenty)
    # A later version draws the same.
    assert [p.index for p in choose_passages(passages, 5, 0)] == [7, 8, 11, 23, 48]
    assert choose_passages(passages, None, 7) == passages
    assert choose_passages(passages, 1000, 7) == passages


def test_plain_text_is_one_document_per_block(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("First line\ngoes on.\n\n\nSecond.\n")
    assert [d.context for d in read_corpus(f"path:{path}")] == ["First line goes on.", "Second."]


def test_a_line_of_white_space_is_blank_and_the_ends_of_lines_may_be_any(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_bytes("\ufeffFirst line\r\ngoes on.\r\n \t\r\nSecond.\n\n\u00a0\nThird.\rGoes on.".encode())
    assert [d.context for d in read_corpus(f"path:{path}")] == ["First line goes on.", "Second.", "Third. Goes on."]


ROWS = [
    {"title": "a", "context": 'One, "two".', "question": "Why?"},
    {"title": "b", "context": "Drei.\nVier."},
    {"title": "c", "context": 'One, "two".', "question": "How?"},
]
MERGED = [Document("a", 'One, "two".', ("Why?", "How?")), Document("b", "Drei.\nVier.")]


def jsonl(rows: list[dict]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def squad(rows: list[dict]) -> bytes:
    """SQuAD's own form, a paragraph for each row."""
    paragraphs = [
        {"context": r["context"], "qas": [{"question": r[key]} for key in ("question",) if key in r]} for r in rows
    ]
    data = [{"title": row["title"], "paragraphs": [p]} for row, p in zip(rows, paragraphs, strict=True)]
    return json.dumps({"version": "1.1", "data": data}).encode()


def parquet(rows: list[dict]) -> bytes:
    return pd.DataFrame(rows).assign(id=1).to_parquet(index=False)


def table(rows: list[dict]) -> bytes:
    return pd.DataFrame(rows).assign(id=1).to_csv(index=False).encode()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.jsonl", jsonl),
        ("x.JSONL", lambda rows: b"\xef\xbb\xbf" + jsonl(rows)),
        ("x.jsonl", lambda rows: jsonl(rows).replace(b"\n", b"\r\n \r\n")),
        ("x.json", lambda rows: json.dumps(rows).encode()),
        ("x.json", squad),
        ("x.csv", table),
        ("x.csv", lambda rows: b"\xef\xbb\xbf" + table(rows)),
        ("x.parquet", parquet),
    ],
)
@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress), (".XZ", lzma.compress)]
)
def test_rows_that_repeat_a_context_are_one_document_in_every_kind_of_file(tmp_path, name, write, suffix, compress):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(compress(write(ROWS)))
    assert read_corpus(f"path:{path}") == MERGED


def test_a_title_is_one_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"title": "a\rb\n c", "context": "One."}]))
    assert read_corpus(f"path:{path}") == [Document("a b c", "One.")]


def test_an_array_of_texts(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('["One.", "Two."]')
    assert read_corpus(f"path:{path}") == [Document("", "One."), Document("", "Two.")]


def test_a_folder_of_the_user_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("One.")
    assert read_corpus("path:~/x.txt") == [Document("x.txt", "One.")]


def test_a_data_set_is_never_read_from_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody" / "squad").mkdir(parents=True)
    (tmp_path / "somebody" / "squad" / "train.jsonl").write_bytes(jsonl(ROWS))
    with pytest.raises(SourceError, match="but somebody/squad also exists here"):
        read_corpus("hub:somebody/squad@abc")


def test_a_compressed_file_may_not_hold_more_than_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", 2**20)
    path = tmp_path / "x.txt.xz"
    path.write_bytes(lzma.compress(b"a " * 2**22))
    with pytest.raises(SourceError, match="holds more than"):
        read_corpus(f"path:{path}")


def test_a_table_may_not_hold_more_than_a_limit_though_its_rows_repeat_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", 2**20)
    path = tmp_path / "x.parquet"
    for rows, length in ((2000, 1000), (20_000, 1), (1, 2**21)):
        pd.DataFrame({"context": ["w" * length] * rows}).to_parquet(path)
        assert path.stat().st_size < 2**18
        with pytest.raises(SourceError, match="holds more than"):
            read_corpus(f"path:{path}")


def data_set(monkeypatch: pytest.MonkeyPatch, **columns: list) -> None:
    """What the hub would answer, in two splits."""
    import datasets

    split = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=split, test=split))


def test_a_data_set_becomes_documents_with_their_questions(monkeypatch):
    data_set(monkeypatch, context=["One.", "Two.", "One."], title=["a", None, "a"], question=["Why?", None, "How?"])
    assert read_corpus("hub:somebody/squad@abc") == [
        Document("a", "One.", ("Why?", "How?", "Why?", "How?")),
        Document("", "Two.", ()),
    ]
    data_set(monkeypatch, context=["One."])
    assert read_corpus("hub:somebody/squad@abc") == [Document("", "One.", ())]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["One."], "label": [1]}, ["somebody/squad", "`context`", "text, label"]),
        ({"context": ["One.", None]}, ["somebody/squad", "not text", "None"]),
        ({"context": [1]}, ["somebody/squad", "not text", "1"]),
    ],
)
def test_a_data_set_of_another_shape_is_one_line_that_names_its_columns(monkeypatch, columns, words):
    data_set(monkeypatch, **columns)
    with pytest.raises(SourceError) as caught:
        read_corpus("hub:somebody/squad@abc")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_hash_of_a_data_set_is_refused_and_not_ignored(monkeypatch):
    data_set(monkeypatch, context=["One."])
    with pytest.raises(SourceError, match="sha256 is for files"):
        read_corpus("hub:somebody/squad@abc", "0" * 64)


def test_bad_sources_are_one_line(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for source, word in [
        (f"path:{tmp_path}/none.txt", "does not exist: correct its configured path"),
        ("ftp:x", "is unknown"),
        (f"path:{empty}", "no text"),
    ]:
        with pytest.raises(SourceError, match=word) as caught:
            read_corpus(source)
        assert "\n" not in str(caught.value)
    broken = tmp_path / "x.jsonl.xz"
    broken.write_bytes(b"not xz")
    with pytest.raises(SourceError, match="cannot be read"):
        read_corpus(f"path:{broken}")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.txt", b"One.\nOs\xe9.\n", "x.txt, line 2, is not UTF-8 text"),
        ("x.txt", b"One.\n\nTwo\0\n", "x.txt, line 3, has a null character"),
        ("x.jsonl", b'"One."\n\n{"context": 5}\n', "x.jsonl, line 3 has a `context` that is not text: 5"),
        (
            "x.jsonl",
            b'"One."\n{"context": "a", "context": "b"}\n',
            "x.jsonl, line 2, cannot be read: the key 'context'",
        ),
        ("x.jsonl", b'"One."\r{broken\n', "x.jsonl, line 2, is not JSON"),
        ("x.jsonl", '"One.\u2028Two."\n{broken\n'.encode(), "x.jsonl, line 2, is not JSON"),
        ("x.json", b'[\n"One.",\n{"context": "Two.", }]', "x.json, line 3, is not JSON"),
        ("x.json", b'["One.", 5]', "x.json, entry 2 of the array is neither a text"),
        ("x.json", b'{"data": [{"paragraphs": []}, {"paragraphs": 3}]}', "x.json, article 2, is not in SQuAD's format"),
        ("x.csv", b'context,title\n"One.\nTwo.",a\nThree.\n', "x.csv, line 4, has 1 fields, but the first line has 2"),
        ("x.csv", b"context,title\nOne.,a,b\n", "x.csv, line 2, has 3 fields"),
        ("x.csv", b'context\nOne.\n"Two."three\n', "x.csv, line 3, is not CSV"),
        (
            "x.csv",
            b"context,questions\nOne.,Why?\n",
            "x.csv, line 2: questions must be a list of strings: name one question `question`",
        ),
        ("x.parquet", pd.DataFrame({"context": ["One.", None]}).to_parquet(), "x.parquet, row 2 has a `context`"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_by_its_line(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError) as caught:
        read_corpus(f"path:{tmp_path / name}")
    assert says in str(caught.value)


def test_a_column_before_those_of_a_document_and_a_text_longer_than_csv_takes_by_itself(tmp_path):
    text = "One.\r\n" + "w " * 100_000
    (tmp_path / "x.csv").write_bytes(f'id,title,context\r\n1,a,"{text}"\r\n'.encode())
    assert read_corpus(f"path:{tmp_path / 'x.csv'}") == [Document("a", text)]


def test_questions_of_white_space_are_none_and_one_question_joins_a_list(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"context": "a", "questions": ["Why?", " "], "question": "How?"}\n')
    assert read_corpus(f"path:{tmp_path / 'x.jsonl'}") == [Document("", "a", ("Why?", "How?"))]
