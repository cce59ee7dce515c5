"""From one text to what the gauge changes and how large an error in K attention tolerates, head by head."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from approxkmv.config import Study
from approxkmv.errors import ConfigError, TableError
from approxkmv.files import read_table, write_csv
from approxkmv.progress import LOG, progress
from approxkmv.results.tables import ModelTables
from approxkmv.statistics.gauge import FACTORS, Gauge, gauge
from approxkmv.steps.fetch import load_model
from approxkmv.steps.statistics import seen_by
from approxkmv.steps.texts import TEXTS


def measure_gauge(study: Study, model_name: str, location: Path, texts: Path, tables: Path) -> pd.DataFrame:
    """Write and return gauge_MODEL.csv: a row per layer, head and factor t, of the study's longest text.

    Columns: layer, head, tokens, entries, t (0: the limit, the matrix A itself), ratio (c at full length),
    participation, and as log10 largest_row, norm (|K|_2), zero_for_ones, sufficient, bound (see Gauge); mean_error. The
    column of values is the head's first that is not 0; a head without one is left out. Entries are those that the
    model's attention uses, since what it tolerates depends on its rows: `all`, `causal`, or `masked` for a model with
    masks of its own. Raises ConfigError for texts that are too short, TableError for a model whose values are all 0.
    """
    model = load_model(study, model_name, location)
    limit = study.max_tokens if model.max_positions is None else min(study.max_tokens, model.max_positions)
    ids = max((model.tokenize(text, limit) for text in read_table(texts, TEXTS)["text"]), key=len)
    if len(ids) < study.min_tokens:
        raise ConfigError(f"model {model_name}: no text has min_tokens {study.min_tokens}: lower it")
    captured = model.capture([ids], values=True)[0]
    assert captured.values is not None
    entries = "masked" if model.has_own_masks else "causal" if model.is_causal else "all"
    parts = []
    with progress(total=model.n_layers, unit="layer", title=f"gauge      {model_name}") as bar:
        for layer, (q, k, v) in enumerate(zip(captured.queries, captured.keys, captured.values, strict=True)):
            seen = seen_by(captured.spans[layer])
            there = (v != 0).any(1)
            heads = there.any(-1).nonzero()[:, 0]
            if len(heads) < len(v):
                LOG.info("gauge: of %d heads of layer %d all values are 0: left out", len(v) - len(heads), layer)
            if len(heads):
                column = v[heads, :, there.int().argmax(-1)[heads]]
                found = gauge(q[heads], k[heads], column, float(captured.scales[layer]), mask=seen)
                parts.append(_rows(found, heads.numpy()).assign(layer=layer, tokens=len(ids), entries=entries))
            bar.update(1)
    if not parts:
        raise TableError(f"model {model_name}: all its values are 0, so that no error in K attention can be named")
    table = pd.concat(parts, ignore_index=True)
    place = ["layer", "head", "tokens", "entries", "t"]
    table = table[[*place, *(name for name in table if name not in place)]]
    write_csv(ModelTables(tables, model_name).gauge, table)
    return table


def _rows(found: Gauge, heads: np.ndarray) -> pd.DataFrame:
    columns = {"ratio": found.ratio, "participation": found.participation}
    for name in ("largest_row", "norm", "zero_for_ones", "sufficient", "bound"):
        columns[f"log10_{name}"] = getattr(found, f"log_{name}") / math.log(10.0)
    place = {"head": np.repeat(heads, len(FACTORS)), "t": np.tile(FACTORS, len(heads))}
    rows = pd.DataFrame(place | {name: values.ravel() for name, values in columns.items()})
    limit = {"ratio": found.limit_ratio, "participation": found.limit_participation}
    rows["mean_error"] = np.repeat(found.mean_error, len(FACTORS))
    limits = pd.DataFrame({"head": heads, "t": 0.0, "mean_error": found.mean_error} | limit)
    return pd.concat([rows, limits], ignore_index=True).sort_values(["head", "t"])
