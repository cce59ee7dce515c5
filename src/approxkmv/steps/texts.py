"""From the corpus to the numbered texts of a study; shards are slices of this table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from approxkmv.config import Study, corpus_of
from approxkmv.corpora import Passage, choose_passages, read_corpus
from approxkmv.corpora.passages import cut_into_passages, cut_into_windows
from approxkmv.errors import ConfigError, SourceError
from approxkmv.files import read_table, write_parquet

TEXTS = {"index": "whole", "name": "text", "text": "text"}


def write_texts(study: Study, out: Path, locations: Sequence[Path] = ()) -> int:
    """Write index, name and text of the study's texts; returns how many.

    `locations`, files from `approxkmv fetch`, are of the study's models in their order, whose tokenizers say where
    windows end. Raises SourceError, ConfigError, TableError for the location of another model.
    """
    corpus = corpus_of(study)
    if study.long_texts == "windows" and len(locations) != len(study.models):
        raise ConfigError(f"long_texts of study {study.name} is windows: give --location for each of its models")
    if study.long_texts == "cut" and locations:
        raise ConfigError(f"long_texts of study {study.name} is cut, not windows: leave out --location")
    passages = cut_into_passages(read_corpus(corpus.source, corpus.sha256), study.unit)
    if study.long_texts == "windows":
        passages = cut_into_windows(passages, study.max_tokens, _tokens_of(study.models, locations))
    chosen = choose_passages(passages, study.contexts, study.seed)
    if not chosen:
        raise SourceError(f"the corpus {corpus.name} has no text of the unit {study.unit}: choose another")
    columns = {"index": [p.index for p in chosen], "name": [p.name for p in chosen], "text": [p.text for p in chosen]}
    write_parquet(out, pd.DataFrame(columns))
    return len(chosen)


def _tokens_of(models: Iterable[str], locations: Sequence[Path]) -> Callable[[str], int]:
    """A text's tokens, those of the tokenizer that makes most of it."""
    # Imported here, since they take seconds that only windows need.
    from approxkmv.models.tokenizer import load_tokenizer
    from approxkmv.results.locations import read_location

    tokenizers = [load_tokenizer(read_location(*of)) for of in zip(locations, models, strict=True)]
    return lambda text: max(len(tokenizer(text, verbose=False)["input_ids"]) for tokenizer in tokenizers)


def read_shard(texts: Path, shard: int, shard_contexts: int) -> list[Passage]:
    """The texts of one shard."""
    table = read_table(texts, TEXTS).iloc[shard * shard_contexts : (shard + 1) * shard_contexts]
    return [
        Passage(int(i), name, text) for i, name, text in zip(table["index"], table["name"], table["text"], strict=True)
    ]
