"""Queries and keys to statistics: one shard of one model, every context, layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from approxkmv.errors import InputError, NonFiniteError
from approxkmv.files import write_parquet
from approxkmv.progress import progress
from approxkmv.statistics import HeadStatistics, head_statistics
from approxkmv.steps.activations import Activations, read_activations


def measure(
    model_name: str, activations: Path, min_prefix: int, prefixes: Sequence[int], heads_out: Path, prefixes_out: Path
) -> int:
    """Write two Parquet tables; returns the number of heads measured.

    heads: context, layer, head, tokens, max_ratio (Experiment (i): the maximum of c_i over prefixes), max_prefix
    (where it is reached), last_ratio (c at full length), log_next and log_double (Experiment (ii), natural logs).
    prefixes: context, layer, head, prefix, ratio: c_i at the given prefixes that the context reaches.
    """
    scales, count, contexts = read_activations(activations)
    heads, curves = [], []
    with progress(total=count, unit="context", title=f"statistics {model_name}") as bar:
        for item in contexts:
            result = _statistics(model_name, item, scales, min_prefix)
            layers, n_heads, n = item.queries.shape[:3]
            layer, head = (index.ravel() for index in np.indices((layers, n_heads), dtype=np.int16))
            ratios = result.ratios.reshape(layers * n_heads, -1)
            best = ratios.argmax(-1)
            heads.append(
                pd.DataFrame(
                    {
                        "context": np.int32(item.context),
                        "layer": layer,
                        "head": head,
                        "tokens": np.int32(n),
                        "max_ratio": ratios[np.arange(len(best)), best],
                        "max_prefix": (best + min_prefix).astype(np.int32),
                        "last_ratio": ratios[:, -1],
                        "log_next": result.log_next.ravel(),
                        "log_double": result.log_double.ravel(),
                    }
                )
            )
            reached = [i for i in prefixes if min_prefix <= i <= n]
            curves.append(
                pd.DataFrame(
                    {
                        "context": np.int32(item.context),
                        "layer": np.repeat(layer, len(reached)),
                        "head": np.repeat(head, len(reached)),
                        "prefix": np.tile(np.array(reached, dtype=np.int32), len(layer)),
                        "ratio": ratios[:, [i - min_prefix for i in reached]].ravel(),
                    }
                )
            )
            bar.update(1)
    write_parquet(heads_out, pd.concat(heads, ignore_index=True) if heads else _empty(HEADS))
    write_parquet(prefixes_out, pd.concat(curves, ignore_index=True) if curves else _empty(PREFIXES))
    return sum(len(part) for part in heads)


# Column types of the two tables, for a shard whose texts are all too short.
HEADS = {
    "context": "int32",
    "layer": "int16",
    "head": "int16",
    "tokens": "int32",
    "max_ratio": "float64",
    "max_prefix": "int32",
    "last_ratio": "float64",
    "log_next": "float64",
    "log_double": "float64",
}
PREFIXES = {"context": "int32", "layer": "int16", "head": "int16", "prefix": "int32", "ratio": "float64"}


def _empty(columns: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})


def _statistics(model_name: str, item: Activations, scales: torch.Tensor, min_prefix: int) -> HeadStatistics:
    """One call for all layers when they share a scale, as nearly all models do; else one per layer."""
    for name, tensor in (("query", item.queries), ("key", item.keys)):
        if not bool(torch.isfinite(tensor).all()):
            layer, head = (int(i) for i in (~torch.isfinite(tensor)).nonzero()[0][:2])
            raise NonFiniteError(
                f"model {model_name}, layer {layer}, head {head}, context {item.context}: a {name} is NaN or infinite"
            )
    try:
        if bool((scales == scales[0]).all()):
            return head_statistics(item.queries, item.keys, min_prefix, float(scales[0]))
        parts = [
            head_statistics(q, k, min_prefix, float(s))
            for q, k, s in zip(item.queries, item.keys, scales.tolist(), strict=True)
        ]
    except InputError as error:
        raise InputError(f"model {model_name}, context {item.context}: {error}") from error
    return HeadStatistics(
        np.stack([part.ratios for part in parts]),
        np.stack([part.log_next for part in parts]),
        np.stack([part.log_double for part in parts]),
    )
