"""Shards of readings to the tables of one model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from approxkmv.config import ModelEntry, Study
from approxkmv.errors import TableError
from approxkmv.files import write_csv
from approxkmv.results.shards import read_shards
from approxkmv.results.tables import ModelTables
from approxkmv.statistics.readings import POWERS, PRINTED, READINGS
from approxkmv.steps.summary import LARGEST_LOG

# The unit of text is a reading too.
OF_SENTENCES = "sentences"


def summarise(study: Study, model: ModelEntry, texts: Path, statistics: Path, out: Path) -> pd.DataFrame:
    """Write readings_MODEL.csv, readings_path_MODEL.csv and readings_heads_MODEL.csv of a model; returns the first.

    Columns: reading, entries (`all`, or `causal` or `masked` as in paper_comparison.csv), heads, texts, largest_ratio
    (of any head, text and prefix), heads_within_bound (whose largest c is at most the model's bound), median_ratio
    (over heads, of their largest c), median_next and median_double (over heads, of the median over texts of
    K_(n)/K_(n+1) and K_(n)/K_(2n), left out where they are 0/0), share_underflowing (of all heads and texts: where
    K_(2n) is 0 as a float32) and its two parts share_infinite (K_(n) is not 0) and share_undefined (K_(n) is 0 too, so
    that the ratio is 0/0). The second has the scales between the model's own
    (`power` 1) and none (0) in place of the readings. A study of sentences calls its first reading `sentences`.
    """
    names = ModelTables(out, model.name)
    kinds = "readings.parquet", "contexts.csv"
    values, _ = read_shards(statistics, model.name, texts, study.shard_contexts, *kinds)
    if values.empty:
        raise TableError(f"model {model.name}: no text is long enough for readings: lower min_tokens and min_prefix")
    heads = _per_head(values)
    path = pd.concat(
        [_table(values, heads, name, model.paper_bound).assign(power=power) for name, power in POWERS.items()],
        ignore_index=True,
    )
    table = pd.concat([_table(values, heads, name, model.paper_bound) for name in READINGS], ignore_index=True)
    heads = heads[heads["reading"].isin(READINGS)].copy()
    if study.unit == "sentence":
        for made in (table, heads):
            made["reading"] = made["reading"].replace(PRINTED, OF_SENTENCES)
    write_csv(names.readings_path, path)
    write_csv(names.readings, table)
    write_csv(names.readings_heads, heads)
    return table


def _per_head(values: pd.DataFrame) -> pd.DataFrame:
    ratios = {name: _ratio(values[f"log_{name}"]) for name in ("next", "double")}
    groups = values.assign(**ratios).groupby(["reading", "entries", "layer", "head"], sort=True)
    columns = {"ratio": groups["ratio"].max(), "next_ratio": groups["next"].median()}
    return pd.DataFrame(columns | {"double_ratio": groups["double"].median()}).reset_index()


def _table(values: pd.DataFrame, heads: pd.DataFrame, reading: str, bound: float) -> pd.DataFrame:
    """A row of the tables per kind of entries."""
    rows = []
    for entries, part in values[values["reading"] == reading].groupby("entries", sort=True):
        of_heads = heads[(heads["reading"] == reading) & (heads["entries"] == entries)]
        largest = of_heads["ratio"]
        rows.append(
            {
                "reading": reading,
                "entries": entries,
                "heads": len(of_heads),
                "texts": part["context"].nunique(),
                "largest_ratio": largest.max(),
                "heads_within_bound": int((largest <= bound).sum()),
                "median_ratio": largest.median(),
                "median_next": of_heads["next_ratio"].median(),
                "median_double": of_heads["double_ratio"].median(),
                "share_underflowing": part["underflows"].mean(),
                "share_infinite": (part["underflows"] & ~part["undefined"]).mean(),
                "share_undefined": part["undefined"].mean(),
            }
        )
    return pd.DataFrame(rows)


def _ratio(logs: pd.Series) -> pd.Series:
    """exp, capped at the largest float64; infinities stay infinite."""
    return pd.Series(np.where(np.isinf(logs), logs, np.exp(logs.clip(upper=LARGEST_LOG))), index=logs.index)
