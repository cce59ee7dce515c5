"""Queries and keys to statistics: one shard of one model, every context, layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from approxkmv.errors import InputError, NonFiniteError
from approxkmv.progress import Times, progress
from approxkmv.results.activations import Activations, read_activations
from approxkmv.results.shards import joined, write_shard
from approxkmv.statistics import HeadStatistics, head_statistics, unmasked_and_masked_statistics

# One value per context and head; for a model with masks each is repeated with the prefix MASKED.
PLACE = {"context": "int32", "layer": "int16", "head": "int16"}
# Fields of HeadStatistics that are written unchanged, besides those derived from c at all prefixes.
TAKEN = ("log_next", "log_double", "softmax_ratio", "tail_exponent", "column_exponent")
VALUES = {"max_ratio": "float64", "max_prefix": "int32", "last_ratio": "float64", **dict.fromkeys(TAKEN, "float64")}


def measure(
    model_name: str,
    activations: Path,
    min_prefix: int,
    prefixes: Sequence[int],
    heads_out: Path,
    prefixes_out: Path,
    times: Times | None = None,
) -> int:
    """Write two Parquet tables; returns the number of heads measured. `times` gets the seconds of each part.

    heads: context, layer, head, tokens, max_ratio (Experiment (i): the maximum of c_i over prefixes), max_prefix
    (where it is reached), last_ratio (c at full length), log_next and log_double (Experiment (ii), natural logs),
    softmax_ratio (c at full length of D^-1 A), tail_exponent and column_exponent (see HeadStatistics).
    prefixes: context, layer, head, prefix, ratio: c_i at the given prefixes that the context reaches.

    As in the paper, every query meets every key. If the model's layers hide keys, both tables repeat each value as
    masked_max_ratio and so on, over the entries that each layer's mask leaves: no key after its query, none outside
    its window.
    """
    times = Times() if times is None else times
    shard = read_activations(activations, model_name)
    heads, curves = [], []
    with progress(total=shard.count, unit="context", title=f"statistics {model_name}") as bar:
        for item in shard.contexts:
            layers, n_heads, n = item.queries.shape[:3]
            layer, head = (index.ravel() for index in np.indices((layers, n_heads), dtype=np.int16))
            reached = [i for i in prefixes if min_prefix <= i <= n]
            values: dict[str, Any] = {"context": item.context, "layer": layer, "head": head, "tokens": n}
            curve: dict[str, Any] = {
                "context": item.context,
                "layer": np.repeat(layer, len(reached)),
                "head": np.repeat(head, len(reached)),
                "prefix": np.tile(np.array(reached, dtype=np.int32), len(layer)),
            }
            with times.of("kernels"):
                found = _statistics(model_name, item, shard.scales, min_prefix, shard.masked)
            for result, before in zip(found, shard.masks, strict=True):
                ratios = result.ratios.reshape(layers * n_heads, -1)
                best = ratios.argmax(-1)
                values[f"{before}max_ratio"] = ratios[np.arange(len(best)), best]
                values[f"{before}max_prefix"] = best + min_prefix
                values[f"{before}last_ratio"] = ratios[:, -1]
                for name in TAKEN:
                    values[f"{before}{name}"] = getattr(result, name).ravel()
                curve[f"{before}ratio"] = ratios[:, [i - min_prefix for i in reached]].ravel()
            heads.append(pd.DataFrame(values))
            curves.append(pd.DataFrame(curve))
            bar.update(1)
    measured = {f"{before}{name}": kind for before in shard.masks for name, kind in VALUES.items()}
    ratios_of = {f"{before}ratio": "float64" for before in shard.masks}
    with times.of("tables"):
        write_shard(heads_out, joined(heads, PLACE | {"tokens": "int32"} | measured), shard.origin)
        write_shard(prefixes_out, joined(curves, PLACE | {"prefix": "int32"} | ratios_of), shard.origin)
    return sum(len(table) for table in heads)


def _statistics(
    model_name: str, item: Activations, scales: torch.Tensor, min_prefix: int, masked: bool
) -> list[HeadStatistics]:
    """Unmasked and, where there are masks, masked; one call for all layers when they share a scale and are causal."""
    for name, tensor in (("query", item.queries), ("key", item.keys)):
        if not bool(torch.isfinite(tensor).all()):
            layer, head = (int(i) for i in (~torch.isfinite(tensor)).nonzero()[0][:2])
            raise NonFiniteError(
                f"model {model_name}, layer {layer}, head {head}, context {item.context}: a {name} is NaN or infinite"
            )

    def both(q: torch.Tensor, k: torch.Tensor, scale: float, spans: torch.Tensor | None) -> list[HeadStatistics]:
        if masked:
            mask = None if spans is None else seen_by(spans)
            return list(unmasked_and_masked_statistics(q, k, min_prefix, scale, mask=mask))
        return [head_statistics(q, k, min_prefix, scale)]

    try:
        if item.spans is None and bool((scales == scales[0]).all()):
            return both(item.queries, item.keys, float(scales[0]), None)
        all_spans = [None] * len(scales) if item.spans is None else item.spans
        parts = [both(*layer) for layer in zip(item.queries, item.keys, scales.tolist(), all_spans, strict=True)]
    except InputError as error:
        raise InputError(f"model {model_name}, context {item.context}: {error}") from error
    return [
        HeadStatistics(
            **{f.name: np.stack([getattr(layer, f.name) for layer in of_mask]) for f in fields(HeadStatistics)}
        )
        for of_mask in zip(*parts, strict=True)
    ]


def seen_by(spans: torch.Tensor) -> torch.Tensor:
    """(n, n) bool: which keys each query sees, by the spans (n, 2) of a layer."""
    place = torch.arange(len(spans))
    return (place >= spans[:, :1]) & (place < spans[:, 1:])
