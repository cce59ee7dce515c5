"""Queries and keys to c under several readings of its definition."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd

from approxkmv.config import Study
from approxkmv.errors import InputError, NonFiniteError, TableError
from approxkmv.files import read_table
from approxkmv.progress import progress
from approxkmv.results.activations import Activations, Shard, read_activations
from approxkmv.results.shards import joined, write_shard
from approxkmv.statistics.readings import Reading, even_places, readings
from approxkmv.steps.statistics import seen_by
from approxkmv.steps.texts import TEXTS

VALUES = [field.name for field in fields(Reading)]
COLUMNS = {"context": "int32", "layer": "int16", "head": "int16", "reading": "str", "entries": "str"}
COLUMNS |= dict.fromkeys(("ratio", "log_next", "log_double"), "float64") | {"underflows": "bool", "undefined": "bool"}


def measure_readings(study: Study, model: str, activations: Path, texts: Path, out: Path) -> tuple[int, int]:
    """Write a Parquet table with a row per text, layer, head, reading and entries; returns how many texts, and kernels
    whose ratio K_(n)/K_(2n) is 0/0 in float32.

    Raises NonFiniteError for a query or key that is not finite; TableError for activations of other texts.
    """
    shard = read_activations(activations, model)
    known = read_table(texts, TEXTS)["index"].tolist()
    if not set(shard.numbers) <= set(known):
        raise TableError(f"{activations} has texts that {texts} does not have: run extract again")
    wanted = set(even_places(shard.count, share_of(study, known, shard)))
    parts = []
    with progress(total=len(wanted), unit="context", title=f"readings   {model}") as bar:
        for place, item in enumerate(shard.contexts):
            if place in wanted:
                parts += _of_text(study, model, item, shard)
                bar.update(1)
    table = joined(parts, COLUMNS)
    write_shard(out, table, shard.origin)
    return len(wanted), int(table.loc[table["reading"] == "float32", "undefined"].sum())


def share_of(study: Study, texts: list[int], shard: Shard) -> int:
    """How many of a shard's texts are measured, so that over all shards it is `readings_texts`."""
    if study.readings_texts is None or not shard.count:
        return shard.count
    start = texts.index(shard.numbers[0]) // study.shard_contexts * study.shard_contexts
    before, after = (
        min(place, len(texts)) * min(study.readings_texts, len(texts)) // len(texts)
        for place in (start, start + study.shard_contexts)
    )
    return after - before


def _of_text(study: Study, model: str, item: Activations, shard: Shard) -> list[pd.DataFrame]:
    layers, heads, n = item.queries.shape[:3]
    rows = []
    for layer in range(layers):
        masks: dict[str, np.ndarray | None] = {"all": None}
        if shard.masked:
            own = np.tri(n, dtype=bool) if item.spans is None else seen_by(item.spans[layer]).numpy()
            masks["causal" if item.spans is None else "masked"] = own
        for entries, mask in masks.items():
            try:
                q, k, scale = item.queries[layer], item.keys[layer], float(shard.scales[layer])
                found = readings(q, k, study.min_prefix, scale, mask=mask, special=item.special.numpy())
            except InputError as error:
                raise NonFiniteError(f"model {model}, context {item.context}, layer {layer}: {error}") from error
            place = {"context": item.context, "layer": layer, "head": np.arange(heads), "entries": entries}
            rows += [
                pd.DataFrame(place | {"reading": name} | {value: getattr(one, value) for value in VALUES})
                for name, one in found.items()
            ]
    return rows
