"""Queries and keys to what the rows of the softmax look like: one shard of one model, every context, layer and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from approxkmv.errors import InputError
from approxkmv.progress import Times, progress
from approxkmv.results.activations import Activations, Shard, read_activations
from approxkmv.results.shards import joined, write_shard
from approxkmv.results.tables import ATTENTION, MASKED
from approxkmv.statistics import AttentionStatistics, attention_statistics

PLACE = {"context": "int32", "layer": "int16", "head": "int16", "tokens": "int32"}


def measure_attention(model: str, activations: Path, out: Path, times: Times | None = None) -> int:
    """Write a Parquet table with a row per text, layer and head; returns how many. `times` gets the seconds.

    Columns: means over the rows of the softmax of entropy (nats), support (its exponential), keys_90 and keys_99 (the
    fewest keys that hold these shares), first_mass and sink_mass (on the first token and on the learned sink) and
    largest_weight; column_norm and stable_rank of its matrix (see AttentionStatistics). They are of the softmax of
    scale q k^T over every key; where a layer has a mask, cap, bias or sink they are repeated with the prefix masked_,
    with all of these, as the model computes it.
    """
    times = Times() if times is None else times
    shard = read_activations(activations, model)
    tables = []
    own = shard.masked
    with progress(total=shard.count, unit="context", title=f"attention  {model}") as bar:
        for item in shard.contexts:
            layers, heads, n = item.queries.shape[:3]
            layer, head = (index.ravel() for index in np.indices((layers, heads), dtype=np.int16))
            values: dict[str, Any] = {"context": item.context, "layer": layer, "head": head, "tokens": n}
            own = shard.masked or not _is_plain(item)
            with times.of("softmax"):
                try:
                    values |= _every_key(item, shard)
                    values |= {f"{MASKED}{name}": value for name, value in _own(item, shard).items()} if own else {}
                except InputError as error:
                    raise InputError(f"model {model}, context {item.context}: {error}") from error
            tables.append(pd.DataFrame(values))
            bar.update(1)
    masks = ("", MASKED) if own else ("",)
    columns = PLACE | {f"{before}{name}": "float64" for before in masks for name in ATTENTION}
    with times.of("tables"):
        table = joined(tables, columns)
        write_shard(out, table, shard.origin)
    return len(table)


def _every_key(item: Activations, shard: Shard) -> dict[str, np.ndarray]:
    if bool((shard.scales == shard.scales[0]).all()):
        return _values(attention_statistics(item.queries, item.keys, scale=float(shard.scales[0])))
    layers = zip(item.queries, item.keys, shard.scales.tolist(), strict=True)
    return _joined([_values(attention_statistics(q, k, scale=scale)) for q, k, scale in layers])


def _own(item: Activations, shard: Shard) -> dict[str, np.ndarray]:
    """With each layer's own mask and what else it has; one call for all layers where they have causal masks alone."""
    mask = "causal" if shard.causal else "none"
    if _is_plain(item) and item.spans is None and bool((shard.scales == shard.scales[0]).all()):
        return _values(attention_statistics(item.queries, item.keys, scale=float(shard.scales[0]), mask=mask))
    masks = [mask] * len(shard.scales) if item.spans is None else item.spans
    layers = zip(item.queries, item.keys, shard.scales.tolist(), masks, item.beside, strict=True)
    return _joined([_values(attention_statistics(q, k, scale=s, mask=own, **more)) for q, k, s, own, more in layers])


def _is_plain(item: Activations) -> bool:
    """Whether no layer has a cap, a bias or sinks."""
    return all(value is None for layer in item.beside for value in layer.values())


def _values(found: AttentionStatistics) -> dict[str, np.ndarray]:
    """(layers x heads,) of each column, or (heads,) of one layer."""
    rows = ("support", "first_mass", "sink_mass", "largest_weight")
    values = {name: np.asarray(getattr(found, name)).mean(-1).ravel() for name in rows}
    keys = np.asarray(found.keys_per_share).mean(-2).reshape(-1, 2)
    values |= {"entropy": np.asarray(found.mean_entropy).ravel(), "keys_90": keys[:, 0], "keys_99": keys[:, 1]}
    return values | {name: np.asarray(getattr(found, name)).ravel() for name in ("column_norm", "stable_rank")}


def _joined(layers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([layer[name] for layer in layers]) for name in layers[0]}
