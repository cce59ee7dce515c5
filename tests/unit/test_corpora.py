"""Texts are cut and drawn as the configuration says, and the shipped corpus is what its description says."""

from __future__ import annotations

import pytest
import yaml

from approxkmv.config import SCHEMA
from approxkmv.corpora import choose_passages, read_corpus
from approxkmv.corpora.passages import Document, cut_into_passages
from approxkmv.errors import ConfigError, SourceError

ROOT = SCHEMA.parents[2]


def test_the_shipped_squad_has_its_hash_and_counts():
    entry = yaml.safe_load((ROOT / "config.yaml").read_text())["corpora"]["squad-dev"]
    path = ROOT / entry["source"].removeprefix("path:")
    documents = read_corpus(f"path:{path}", entry["sha256"])
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
    pairs = cut_into_passages(documents, "question_context")
    assert [p.text[:4] for p in pairs] == ["Why?", "How?", "So? "]
    assert [p.index for p in pairs] == [0, 1, 2]
    with pytest.raises(ConfigError, match="no questions"):
        cut_into_passages([Document("c", "x")], "question_context")


def test_a_draw_is_seeded_nested_and_in_order():
    passages = cut_into_passages([Document(str(i), str(i)) for i in range(100)], "context")
    ten, twenty = choose_passages(passages, 10, 7), choose_passages(passages, 20, 7)
    assert ten == choose_passages(passages, 10, 7)
    assert ten != choose_passages(passages, 10, 8)
    assert set(ten) < set(twenty)
    assert [p.index for p in twenty] == sorted(p.index for p in twenty)
    assert choose_passages(passages, None, 7) == passages
    assert choose_passages(passages, 1000, 7) == passages


def test_plain_text_is_one_document_per_block(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("First line\ngoes on.\n\n\nSecond.\n")
    assert [d.context for d in read_corpus(f"path:{path}")] == ["First line goes on.", "Second."]


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
        ({"context": ["One.", None]}, ["somebody/squad", "no text", "None"]),
        ({"context": [1]}, ["somebody/squad", "no text", "1"]),
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
    with pytest.raises(SourceError, match="sha256 is of a file"):
        read_corpus("hub:somebody/squad@abc", "0" * 64)


def test_bad_sources_are_one_line(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for source, word in [
        (f"path:{tmp_path}/none.txt", "does not exist"),
        ("ftp:x", "not known"),
        (f"path:{empty}", "no text"),
    ]:
        with pytest.raises(SourceError, match=word) as caught:
            read_corpus(source)
        assert "\n" not in str(caught.value)
    broken = tmp_path / "x.jsonl.xz"
    broken.write_bytes(b"not xz")
    with pytest.raises(SourceError, match="cannot be read"):
        read_corpus(f"path:{broken}")
