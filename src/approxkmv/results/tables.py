"""Names of the tables that pass between a study's steps, and functions that read them."""

from __future__ import annotations

import math
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.errors import TableError
from approxkmv.files import Columns, check_columns, check_keys, read_json, read_table
from approxkmv.statistics.entries import CAUSAL, EVERY_KEY, SHARES

if TYPE_CHECKING:
    import pandas as pd

# Prefix of a column with the same statistic, over only the entries that each layer's own mask allows.
MASKED = "masked_"


def masks_of(table: Container[str], column: str) -> list[str]:
    """The prefixes with which a table (or dict) has `column`: the empty one and, for a causal model, MASKED."""
    return [before for before in ("", MASKED) if f"{before}{column}" in table]


KEYS = [f"keys_{100 * share:g}_{what}" for share in SHARES for what in ("mean", "median", "largest")]
# Statistics of the softmax's rows and of the whole matrix: see AttentionStatistics.
ATTENTION = ["entropy", "support", "keys_90", "keys_99", "first_mass", "sink_mass", "largest_weight"]
ATTENTION += ["column_norm", "stable_rank"]
# The tables of a shard by the end of their name: the columns that identify a row, and those that are summarised.
SHARDS: dict[str, tuple[list[str], Columns]] = {
    "contexts.csv": (
        ["context", "tokens", "cut"],
        {"used": "yes or no", "causal": "yes or no", "mask": "text", "left_out": "anything"},
    ),
    "heads.parquet": (
        ["context", "layer", "head", "max_prefix"],
        dict.fromkeys(("max_ratio", "log_next", "log_double"), "at least 0"),
    ),
    "prefixes.parquet": (["context", "layer", "head", "prefix"], {"ratio": "at least 0"}),
    "attention.parquet": (["context", "layer", "head", "tokens"], dict.fromkeys(ATTENTION, "at least 0")),
    "readings.parquet": (
        ["context", "layer", "head"],
        dict.fromkeys(("reading", "entries"), "text")
        | dict.fromkeys(("ratio", "log_next", "log_double"), "at least 0 or empty")
        | dict.fromkeys(("underflows", "undefined"), "yes or no"),
    ),
    "lengths.parquet": (
        ["context", "layer", "head", "length"],
        {"tail_exponent": "number"}
        | dict.fromkeys(("ratio", "log_next", "log_double", "softmax_ratio", *KEYS), "at least 0"),
    ),
}


def facts_of_attention(contexts: pd.DataFrame) -> dict[str, Any]:
    """What an overview says about a model's attention, from its shards' contexts: `causal`, `mask`, `left_out`."""
    first = contexts.iloc[0]
    left_out = first["left_out"].split("; ") if isinstance(first["left_out"], str) else []
    return {"causal": bool(first["causal"]), "mask": first["mask"], "left_out": left_out}


class ModelTables:
    """The paths of one model's tables in a folder; an attribute is named as its file begins."""

    def __init__(self, folder: Path, model: str) -> None:
        # JSON: counts, the largest c, and how the tables were made.
        self.overview = folder / f"overview_{model}.json"
        # One row per layer and head.
        self.heads = folder / f"heads_{model}.csv"
        self.growth = folder / f"growth_{model}.csv"
        self.attention = folder / f"attention_{model}.csv"
        # One row per prefix length, for each layer and head or over all of them.
        self.growth_curves = folder / f"growth_curves_{model}.csv"
        self.context_scaling = folder / f"context_scaling_{model}.csv"
        # One row per kind of entries and reading, or scale between the model's own and none, or reading of each head.
        self.readings = folder / f"readings_{model}.csv"
        self.readings_path = folder / f"readings_path_{model}.csv"
        self.readings_heads = folder / f"readings_heads_{model}.csv"
        # One row per layer, head and factor.
        self.gauge = folder / f"gauge_{model}.csv"
        # Of long texts: one row per layer, head and length; JSON: which lengths were run, and how.
        self.length_scaling = folder / f"length_scaling_{model}.csv"
        self.lengths = folder / f"lengths_{model}.json"

    @property
    def facts(self) -> Path:
        """The overview or, for a model measured on long texts only, what is known of those."""
        return self.overview if self.overview.exists() else self.lengths


# Keys of an overview (see steps summary and length_scaling) and their types; some are repeated with prefix masked_.
MASKED_FACTS: dict[str, type] = {
    **dict.fromkeys(("largest_ratio", "median_ratio"), float),
    **dict.fromkeys(("largest_ratio_layer", "largest_ratio_head", "heads_within_bound"), int),
}
OVERVIEW: dict[str, type] = {
    **dict.fromkeys(("model", "label", "corpus", "mask"), str),
    **dict.fromkeys(("texts_used", "texts_too_short", "texts_cut", "layers", "heads"), int),
    "paper_bound": float,
    **dict.fromkeys(("lengths", "texts_missing", "left_out"), list),
    **MASKED_FACTS,
}


def read_overview(path: Path, *names: str) -> dict[str, Any]:
    """The overview JSON of one model, checked to hold these names and, for a causal model, their masked_ forms.

    Raises TableError if it is missing, truncated or invalid.
    """
    facts = read_json(path)
    # Overviews of earlier versions lack these two keys; their models have neither windows nor anything left out.
    facts = {"mask": CAUSAL if facts.get("causal") else EVERY_KEY, "left_out": []} | facts
    names = (*names, "mask", "left_out")
    check_keys(path, facts, {name: OVERVIEW[name] for name in names})
    masked = {f"{MASKED}{name}": OVERVIEW[name] for name in names if name in MASKED_FACTS}
    if any(name in facts for name in masked):
        check_keys(path, facts, masked)
    for name, kind in (("lengths", int), ("texts_missing", str), ("left_out", str)):
        if name in names and not all(type(item) is kind for item in facts[name]):
            raise TableError(f"{path}: {name} must hold only items of type {kind.__name__}: delete it and run again")
    if "lengths" in names and not facts["lengths"]:
        raise TableError(f"{path} names no lengths: delete it and run again")
    return facts


def read_heads(path: Path, facts: dict[str, Any], columns: Columns, along: str | None = None) -> pd.DataFrame:
    """A table with one row for each layer and head of the overview `facts`, and the columns layer, head and `columns`.

    `along` names a third column, such as prefix: each head then has one row for each of its values. For a causal model
    the columns are repeated with the prefix masked_, all or none. Raises TableError for any other table.
    """
    place = ["layer", "head", *([along] if along else [])]
    table = read_statistics(path, dict.fromkeys(place, "whole"), columns)
    counts = facts["layers"], facts["heads"], *([table[along].nunique()] if along else [])
    whole = len(table) == math.prod(counts) and not table.duplicated(place).any()
    if not whole or any(table[name].max() >= count for name, count in zip(place[:2], counts, strict=False)):
        raise TableError(
            f"{path} does not have one row for each of {facts['layers']} layers and {facts['heads']} heads"
            f"{f' and each {along}' if along else ''}: delete it and run again"
        )
    return table


def read_shard_table(path: Path, kind: str) -> pd.DataFrame:
    """A table of one shard, where `kind` is a key of SHARDS; all but contexts.csv may be empty.

    Raises TableError for an invalid table.
    """
    place, columns = SHARDS[kind]
    return read_statistics(path, dict.fromkeys(place, "whole"), columns, empty=kind != "contexts.csv")


def read_statistics(path: Path, place: Columns, columns: Columns, empty: bool = False) -> pd.DataFrame:
    """A table with the columns `place` and `columns`; for a causal model also the latter as masked_..., all or none.

    Raises TableError for any other table, and for an empty one unless `empty`.
    """
    table = read_table(path, {**place, **columns}, empty)
    masked = {f"{MASKED}{name}": what for name, what in columns.items()}
    if any(name in table for name in masked):
        check_columns(path, table, masked)
    return table
