"""What the rows of the softmax look like, from the shards of a model to its table per layer and head."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from approxkmv.config import Study
from approxkmv.errors import TableError
from approxkmv.files import write_csv
from approxkmv.results.shards import read_shards
from approxkmv.results.tables import ATTENTION, ModelTables, masks_of


def write_attention_table(study: Study, model: str, texts: Path, statistics: Path, out: Path) -> pd.DataFrame:
    """Write attention_MODEL.csv: per layer and head, texts and means over them of the columns of measure_attention."""
    # contexts.csv is read only to check that both come from the same weights and texts.
    kinds = "attention.parquet", "contexts.csv"
    values, _ = read_shards(statistics, model, texts, study.shard_contexts, *kinds)
    if values.empty:
        raise TableError(f"model {model}: no text has {study.min_tokens} tokens: lower min_tokens (and min_prefix)")
    groups = values.groupby(["layer", "head"], sort=True)
    columns = [f"{before}{name}" for before in masks_of(values, ATTENTION[0]) for name in ATTENTION]
    table = pd.DataFrame({"texts": groups.size()}).join(groups[columns].mean()).reset_index()
    write_csv(ModelTables(out, model).attention, table)
    return table
