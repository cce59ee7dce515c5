"""Shards of long texts to the tables of one model: c, order ratios and keys per row against the length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from approxkmv.config import ModelEntry, Study, corpus_of
from approxkmv.errors import TableError
from approxkmv.files import write_csv, write_json
from approxkmv.results.shards import read_shards
from approxkmv.results.tables import KEYS, ModelTables, facts_of_attention, masks_of
from approxkmv.steps.lengths import VALUES, too_short


def summarise(
    study: Study, model: ModelEntry, texts: Path, statistics: Path, out: Path, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Write length_scaling_MODEL.csv and lengths_MODEL.json of a model; returns the latter.

    The CSV has, per layer, head and length: texts, and medians over texts of ratio (c), next_ratio and double_ratio
    (K_(n)/K_(n+1) and K_(n)/K_(2n)) beside log_double, softmax_ratio (c of D^-1 A), tail_exponent (see HeadStatistics),
    and keys_90_mean, keys_90_median, keys_90_largest: how many keys hold 90 % of a row's softmax mass, over the rows of
    a text; likewise keys_99_...; largest_ratio is the largest c of any text.
    """
    names = ModelTables(out, model.name)
    kinds = "lengths.parquet", "contexts.csv"
    values, taken = read_shards(statistics, model.name, texts, study.shard_contexts, *kinds)
    if values.empty:
        raise TableError(
            f"model {model.name}: no text reaches the shortest length, {min(study.lengths):,} tokens: shorten lengths"
        )
    table = length_scaling(values)
    write_csv(names.length_scaling, table)
    run = sorted({int(length) for length in table["length"]})
    used = taken[taken["used"]]
    facts = {
        "model": model.name,
        "label": model.label,
        "corpus": corpus_of(study).label,
        "texts_used": int(values["context"].nunique()),
        "lengths": run,
        "lengths_left_out": {str(length): "no text reaches it" for length in study.lengths if length not in run},
        "texts_missing": [
            too_short(context, n, bool(cut), study.lengths)
            for context, n, cut in zip(*(used[name].tolist() for name in ("context", "tokens", "cut")), strict=True)
            if n < max(study.lengths)
        ],
        "layers": int(table["layer"].max()) + 1,
        "heads": int(table["head"].max()) + 1,
        "paper_bound": model.paper_bound,
        **facts_of_attention(taken),
        "provenance": provenance,
    }
    write_json(names.lengths, facts)
    return facts


def length_scaling(values: pd.DataFrame) -> pd.DataFrame:
    """The table of `summarise` from the rows of all texts."""
    keys = ["layer", "head", "length"]
    groups = values.groupby(keys, sort=True)
    table = pd.DataFrame({"texts": groups.size()})
    for before in masks_of(values, "ratio"):
        medians = groups[[f"{before}{name}" for name in VALUES]].median()
        table[f"{before}ratio"] = medians[f"{before}ratio"]
        table[f"{before}largest_ratio"] = groups[f"{before}ratio"].max()
        with np.errstate(over="ignore"):
            # Capped at the largest float64; the logarithm has the truth.
            for name in ("next", "double"):
                capped = np.minimum(np.exp(medians[f"{before}log_{name}"]), np.finfo(np.float64).max)
                table[f"{before}{name}_ratio"] = capped
        for name in ("log_double", "softmax_ratio", "tail_exponent", *KEYS):
            table[f"{before}{name}"] = medians[f"{before}{name}"]
    return table.reset_index()
