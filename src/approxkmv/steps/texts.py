"""From the corpus to the numbered texts of a study; shards are slices of this table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from approxkmv.config import Study, corpus_of
from approxkmv.corpora import Passage, choose_passages, read_corpus
from approxkmv.corpora.passages import cut_into_passages
from approxkmv.errors import SourceError
from approxkmv.files import read_table, write_parquet

TEXTS = {"index": "whole", "name": "text", "text": "text"}


def write_texts(study: Study, out: Path) -> int:
    """Write index, name and text of the study's texts; returns how many. Raises SourceError, ConfigError."""
    corpus = corpus_of(study)
    documents = read_corpus(corpus.source, corpus.sha256)
    chosen = choose_passages(cut_into_passages(documents, study.unit), study.contexts, study.seed)
    if not chosen:
        raise SourceError(f"the corpus {corpus.name} has no text of the unit {study.unit}: choose another")
    columns = {"index": [p.index for p in chosen], "name": [p.name for p in chosen], "text": [p.text for p in chosen]}
    write_parquet(out, pd.DataFrame(columns))
    return len(chosen)


def read_shard(texts: Path, shard: int, shard_contexts: int) -> list[Passage]:
    """The texts of one shard."""
    table = read_table(texts, TEXTS).iloc[shard * shard_contexts : (shard + 1) * shard_contexts]
    return [
        Passage(int(i), name, text) for i, name, text in zip(table["index"], table["name"], table["text"], strict=True)
    ]
