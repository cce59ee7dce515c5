"""c at the prefixes of every text to growth with the length, head by head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from approxkmv.config import Study
from approxkmv.files import write_csv
from approxkmv.results.tables import masks_of, model_tables, read_statistics
from approxkmv.statistics.growth import FLOOR, Growth, fit_growth, verdict
from approxkmv.steps.summary import read_prefixes

PLACE = ["layer", "head"]


def measure_growth(study: Study, model: str, texts: Path, statistics: Path, tables: Path) -> pd.DataFrame:
    """Write growth_MODEL.csv and growth_curves_MODEL.csv from the shards' prefixes; returns the first.

    growth: per layer and head, texts (that reach two lengths), exponent with exponent_low and exponent_high,
    coefficient (c = coefficient n^exponent for the average text), largest_ratio, far_ratio and far_ratio_high
    (extrapolated), verdict and reason. growth_curves: per layer, head and prefix, texts, ratio (the geometric mean
    over texts) and adjusted_ratio (the same with every text brought to the average text's level, since fewer texts
    reach long prefixes). Of a causal model both have each column again as masked_...
    """
    values = read_prefixes(study, model, texts, statistics)
    names = model_tables(tables, model)
    heads = read_statistics(names.heads, dict.fromkeys(PLACE, "whole"), {"max_ratio": "number"}).sort_values(PLACE)
    growth, curves = growth_of(values, heads, study.seed)
    write_csv(names.growth, growth)
    write_csv(names.curves, curves)
    return growth


def growth_of(values: pd.DataFrame, heads: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables from c at the prefixes (context, layer, head, prefix, ratio) and the per-head summary."""
    growth = heads[PLACE].reset_index(drop=True)
    # One row per text and prefix, one column per head: the index is the same for masked and unmasked.
    tables = {
        before: values.pivot(index=["context", "prefix"], columns=PLACE, values=f"{before}ratio").sort_index(axis=1)
        for before in masks_of(values, "ratio")
    }
    curves = None
    for before, wide in tables.items():
        contexts = wide.index.get_level_values("context").to_numpy()
        lengths = wide.index.get_level_values("prefix").to_numpy()
        fit = fit_growth(contexts, lengths, wide.to_numpy(), seed=seed)
        largest = heads[f"{before}max_ratio"].to_numpy()
        verdicts = [verdict(fit, head, float(largest[head])) for head in range(len(growth))]
        growth[f"{before}texts"] = fit.texts
        growth[f"{before}exponent"] = fit.exponent
        growth[f"{before}exponent_low"] = fit.exponent_low
        growth[f"{before}exponent_high"] = fit.exponent_high
        growth[f"{before}coefficient"] = np.exp(fit.log_coefficient)
        growth[f"{before}largest_ratio"] = largest
        growth[f"{before}far_ratio"] = fit.far_ratio
        growth[f"{before}far_ratio_high"] = fit.far_ratio_high
        growth[f"{before}verdict"] = [word for word, _ in verdicts]
        growth[f"{before}reason"] = [reason for _, reason in verdicts]
        part = _curves(wide, fit, before)
        curves = part if curves is None else curves.merge(part, on=[*PLACE, "prefix"])
    assert curves is not None
    return growth, curves


def _curves(wide: pd.DataFrame, fit: Growth, before: str) -> pd.DataFrame:
    logs = wide.clip(lower=FLOOR).apply(np.log)
    x = np.log(wide.index.get_level_values("prefix").to_numpy(dtype=np.float64))[:, None]
    levels = (logs - fit.exponent * x).groupby(level="context").transform("mean")
    adjusted = logs - levels + fit.log_coefficient
    columns = {f"{before}texts": logs.groupby(level="prefix").count().stack(PLACE, future_stack=True)}
    for name, table in (("ratio", logs), ("adjusted_ratio", adjusted)):
        mean = table.groupby(level="prefix").mean().apply(np.exp)
        columns[f"{before}{name}"] = mean.stack(PLACE, future_stack=True)
    return pd.DataFrame(columns).reset_index().sort_values([*PLACE, "prefix"])[[*PLACE, "prefix", *columns]]
