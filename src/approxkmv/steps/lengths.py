"""From the queries and keys of long texts to c, order ratios and keys per row at every length, without n x n arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from approxkmv.config import Study
from approxkmv.errors import ApproxKMVError, NonFiniteError, TableError
from approxkmv.progress import Times, progress
from approxkmv.results.activations import Activations, Shard, read_activations
from approxkmv.results.shards import joined, origin_of, own_origin, write_shard
from approxkmv.results.tables import KEYS, read_shard_table
from approxkmv.statistics.streaming import LengthStatistics, length_statistics
from approxkmv.steps.devices import check_device

PLACE = {"context": "int32", "layer": "int16", "head": "int16", "length": "int32"}
NUMBERS = ["ratio", "log_next", "log_double", "softmax_ratio", "tail_exponent"]
VALUES = [*NUMBERS, *KEYS]


def measure_lengths(
    study: Study, model: str, activations: Path, contexts: Path, out: Path, times: Times | None = None
) -> list[str]:
    """Write a Parquet table with a row per text, layer, head and length; returns a line per text that is too short.

    The statistics are computed on the study's device; `times` receives the seconds of each length, over all texts. They
    are for the log only: in a table they would make every run write other bytes.

    In a causal model the queries and keys of the first n tokens are those of a text of n tokens; in other models they
    come from the whole text, as in the paper's prefixes. Columns: see length_scaling; if the model's layers hide keys,
    each value is repeated with the prefix masked_. Raises ConfigError for a device that does not exist.
    """
    check_device(study)
    times = Times() if times is None else times
    shard = read_activations(activations, model)
    made_of = own_origin(contexts, origin_of(contexts), model)
    if made_of and made_of != own_origin(activations, shard.origin, model):
        raise TableError(f"{contexts} and {activations} come from different weights or texts: run extract again")
    taken = read_shard_table(contexts, "contexts.csv")
    cut = dict(zip(taken["context"], taken["cut"], strict=True))
    tables: list[pd.DataFrame] = []
    missing: list[str] = []
    with progress(total=shard.count * len(study.lengths), unit="length", title=f"lengths    {model}") as bar:
        for item in shard.contexts:
            n = item.queries.shape[2]
            if item.context not in cut:
                raise TableError(f"{contexts} has no text {item.context}, which {activations} has: run extract again")
            fitting = [length for length in study.lengths if length <= n]
            if len(fitting) < len(study.lengths):
                missing.append(too_short(item.context, n, bool(cut[item.context]), study.lengths))
            for length in fitting:
                with times.of(f"{length:,} tokens"):
                    tables.append(_one_length(model, item, shard, length, study.device))
                bar.update(1)
    columns = PLACE | {f"{before}{name}": "float64" for before in shard.masks for name in VALUES}
    write_shard(out, joined(tables, columns), shard.origin)
    return missing


def too_short(context: int, n: int, cut: bool, lengths: tuple[int, ...]) -> str:
    """A line that says which lengths are beyond a text of n tokens, and why."""
    left_out = ", ".join(f"{length:,}" for length in lengths if length > n)
    why = f"the model's positions or max_tokens end at {n:,}" if cut else f"it has {n:,} tokens"
    return f"text {context}: no {left_out}, {why}"


def _one_length(model: str, item: Activations, shard: Shard, length: int, device: str) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for layer, (q, k, scale) in enumerate(zip(item.queries, item.keys, shard.scales.tolist(), strict=True)):
        try:
            # One layer at a time: all layers of a long text might not fit on the device.
            q_here, k_here = (x[:, :length].to(device) for x in (q, k))
            spans = None if item.spans is None else item.spans[layer, :length].clamp(max=length)
            heads = length_statistics(q_here, k_here, scale, causal=shard.causal, spans=spans)
        except ApproxKMVError as error:
            raise NonFiniteError(f"model {model}, context {item.context}, layer {layer}: {error}") from error
        for head, masks in enumerate(heads):
            row: dict[str, Any] = {"context": item.context, "layer": layer, "head": head, "length": length}
            for found, before in zip(masks, shard.masks, strict=True):
                row |= {f"{before}{name}": value for name, value in _values(found).items()}
            rows.append(row)
    return pd.DataFrame(rows)


def _values(found: LengthStatistics) -> dict[str, float]:
    counts = np.array([found.mean_keys, found.median_keys, found.largest_keys], np.float64).T.ravel()
    return {name: getattr(found, name) for name in NUMBERS} | dict(zip(KEYS, counts, strict=True))
