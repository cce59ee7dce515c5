"""c of every text at several lengths to its size, trend and prediction, head by head."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd

from approxkmv.config import Study
from approxkmv.errors import TableError
from approxkmv.files import write_csv
from approxkmv.results.shards import read_shards
from approxkmv.results.tables import ModelTables, masks_of
from approxkmv.statistics.growth import FLOOR, fit_growth, size, trend
from approxkmv.steps.summary import read_prefixes

PLACE = ["layer", "head"]


def measure_growth(study: Study, model: str, texts: Path, statistics: Path, tables: Path) -> pd.DataFrame:
    """Write growth_MODEL.csv and growth_curves_MODEL.csv from the shards' prefixes or lengths; returns the first.

    growth: per layer and head the fields of Growth (texts, length, start, ratio, exponent, predicted_ratio, each with
    its interval; see there), size (of c at `length` against the model's bound) and trend (of c from `start` to
    `length`). growth_curves: per layer, head and prefix, texts, ratio (the geometric mean over texts) and
    adjusted_ratio: the same at the shortest prefix, and from each prefix to the next the mean factor of those texts
    that reach both, since the texts that reach long prefixes are not those that make up the short ones. For a causal
    model each column of both is repeated with the prefix masked_.
    """
    if study.lengths:
        kinds = "lengths.parquet", "contexts.csv"
        values, _ = read_shards(statistics, model, texts, study.shard_contexts, *kinds)
        if values.empty:
            raise TableError(f"model {model}: no text reaches any of lengths: shorten them")
        values = values.rename(columns={"length": "prefix"})
    else:
        values = read_prefixes(study, model, texts, statistics)
    names = ModelTables(tables, model)
    growth, curves = growth_of(values, study.models[model].paper_bound)
    write_csv(names.growth, growth)
    write_csv(names.growth_curves, curves)
    return growth


def growth_of(values: pd.DataFrame, bound: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables from c at the prefixes (context, layer, head, prefix, ratio)."""
    growth, curves = [], []
    for before in masks_of(values, "ratio"):
        # One row per text and prefix, one column per head.
        wide = values.pivot(index=["context", "prefix"], columns=PLACE, values=f"{before}ratio").sort_index(axis=1)
        contexts, lengths = (wide.index.get_level_values(name).to_numpy() for name in ("context", "prefix"))
        fit = fit_growth(contexts, lengths, wide.to_numpy())
        part = pd.DataFrame({field.name: getattr(fit, field.name) for field in fields(fit)}, index=wide.columns)
        part = part.assign(size=size(fit, bound), trend=trend(fit)).add_prefix(before)
        growth.append(part)
        curves.append(_curves(wide).add_prefix(before))
    return pd.concat(growth, axis=1).reset_index(), pd.concat(curves, axis=1).reset_index()


def _curves(wide: pd.DataFrame) -> pd.DataFrame:
    logs = wide.clip(lower=FLOOR).apply(np.log)
    by_prefix = logs.groupby(level="prefix")
    mean = by_prefix.mean()
    # nan at the first prefix of each text.
    steps = logs.groupby(level="context").diff().groupby(level="prefix").mean()
    steps.iloc[0] = mean.iloc[0]
    columns = {"texts": by_prefix.count(), "ratio": mean.apply(np.exp), "adjusted_ratio": steps.cumsum().apply(np.exp)}
    table = pd.DataFrame({name: part.stack(PLACE, future_stack=True) for name, part in columns.items()})
    return table.reorder_levels([*PLACE, "prefix"]).sort_index()
