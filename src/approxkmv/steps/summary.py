"""From shards of statistics to the tables of one model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from approxkmv.config import ModelEntry, Study, corpus_of
from approxkmv.errors import TableError
from approxkmv.files import write_csv, write_json
from approxkmv.results.shards import read_shards
from approxkmv.results.tables import ModelTables, facts_of_attention, masks_of

# exp(709) is about half of the largest float64, so two such values still have a mean.
LARGEST_LOG = 709.0


def summarise(
    study: Study, model: ModelEntry, texts: Path, statistics: Path, out: Path, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Write the per-head summary, the scaling with length (A.1.3) and the overview of one model; returns the overview.

    `statistics` is the folder with the files of the shards: heads.parquet, prefixes.parquet and contexts.csv of each.
    """
    tables = ModelTables(out, model.name)
    of_study = statistics, model.name, texts, study.shard_contexts
    taken, values = read_shards(*of_study, "contexts.csv", "heads.parquet")
    if values.empty:
        raise TableError(
            f"model {model.name}: none of {len(taken)} texts has {study.min_tokens} tokens: lower min_tokens "
            "(and min_prefix), or take a longer unit of text"
        )
    table = per_head(values)
    # Read before anything is written: without a prefix there is nothing to say about growth.
    scaling = scaling_with_length(read_prefixes(study, model.name, texts, statistics))
    write_csv(tables.heads, table)
    write_csv(tables.context_scaling, scaling)
    used = taken[taken["used"]]
    overview = {
        "model": model.name,
        "label": model.label,
        # Of the archive and of single files: checked before the weights were read.
        "source": model.source,
        "sha256": {**({"archive": model.sha256} if model.sha256 else {}), **model.files},
        "corpus": corpus_of(study).label,
        "unit": study.unit,
        "texts": len(taken),
        "texts_used": len(used),
        "texts_too_short": int((~taken["used"]).sum()),
        "texts_cut": int((used["cut"] > 0).sum()),
        "tokens_median": float(used["tokens"].median()),
        "tokens_max": int(used["tokens"].max()),
        "layers": int(table["layer"].max()) + 1,
        "heads": int(table["head"].max()) + 1,
        "paper_bound": model.paper_bound,
        **facts_of_attention(taken),
        "provenance": provenance,
    }
    for before in masks_of(table, "max_ratio"):
        overview |= _largest_and_median(table, before, model.paper_bound)
    write_json(tables.overview, overview)
    return overview


def _largest_and_median(heads: pd.DataFrame, before: str, bound: float) -> dict[str, Any]:
    """What the overview says about c over heads; its keys are prefixed with `before`."""
    ratios = heads[f"{before}max_ratio"]
    worst = heads.iloc[int(ratios.to_numpy().argmax())]
    return {
        f"{before}largest_ratio": float(ratios.max()),
        f"{before}largest_ratio_layer": int(worst["layer"]),
        f"{before}largest_ratio_head": int(worst["head"]),
        f"{before}median_ratio": float(ratios.median()),
        f"{before}heads_within_bound": int((ratios <= bound).sum()),
    }


def read_prefixes(study: Study, model: str, texts: Path, statistics: Path) -> pd.DataFrame:
    """c at the prefixes of every text: context, layer, head, prefix, ratio and, for a causal model, masked_ratio.

    Raises TableError when no text reaches any prefix: then neither scaling with length nor growth has a value.
    """
    # The contexts are read to check that all come from the same weights and texts.
    kinds = "prefixes.parquet", "contexts.csv"
    values, _ = read_shards(statistics, model, texts, study.shard_contexts, *kinds)
    if values.empty:
        shortest = min(prefix for prefix in study.prefixes if prefix >= study.min_prefix)
        raise TableError(
            f"model {model}: no text reaches the shortest of prefixes, {shortest} tokens: put a shorter one there "
            f"(min_prefix is {study.min_prefix}), or take a longer unit of text"
        )
    return values


def per_head(values: pd.DataFrame) -> pd.DataFrame:
    """One row per (layer, head), over contexts.

    max_ratio: the maximum of c over contexts and prefixes (Experiment (i)), with the context and prefix where it is
    reached; median_ratio and p95_ratio: of the contexts' maxima; next_ratio and double_ratio: medians over contexts
    of K_(n)/K_(n+1) and K_(n)/K_(2n) (Experiment (ii)), beside their natural logarithms, which never overflow.
    At full length, medians over contexts: last_ratio is c, softmax_ratio is c of D^-1 A, without the row factor, and
    the two exponents are those of the stronger assumption (see HeadStatistics). If the model's layers hide keys, each
    column is repeated with the prefix masked_, over the entries that each layer's mask leaves.
    """
    groups = values.groupby(["layer", "head"], sort=True)
    table = pd.DataFrame({"contexts": groups.size()})
    for before in masks_of(values, "max_ratio"):
        table = table.join(_over_contexts(values, before))
    return table.reset_index()


def _over_contexts(values: pd.DataFrame, before: str) -> pd.DataFrame:
    """The columns of per_head with the prefix `before`, indexed by (layer, head)."""
    groups = values.groupby(["layer", "head"], sort=True)
    worst = values.loc[groups[f"{before}max_ratio"].idxmax()].set_index(["layer", "head"])
    table = pd.DataFrame(
        {
            "max_ratio": worst[f"{before}max_ratio"],
            "max_ratio_context": worst["context"],
            "max_ratio_prefix": worst[f"{before}max_prefix"],
            "median_ratio": groups[f"{before}max_ratio"].median(),
            "p95_ratio": groups[f"{before}max_ratio"].quantile(0.95),
            "median_log_next": groups[f"{before}log_next"].median(),
            "median_log_double": groups[f"{before}log_double"].median(),
        }
    )
    for name in ("next", "double"):
        # Medians of the ratios as in the paper, each capped so that none is infinite; the median of the logarithms
        # above has no cap, and differs if the median is the mean of two middle values.
        ratios = values[f"{before}log_{name}"].clip(upper=LARGEST_LOG).map(math.exp)
        table[f"median_{name}_ratio"] = ratios.groupby([values["layer"], values["head"]], sort=True).median()
    for name in ("last_ratio", "softmax_ratio", "tail_exponent", "column_exponent"):
        if f"{before}{name}" in values:
            table[f"median_{name}"] = groups[f"{before}{name}"].median()
    if f"{before}softmax_ratio" in values:
        table["max_softmax_ratio"] = groups[f"{before}softmax_ratio"].max()
    return table.add_prefix(before)


def scaling_with_length(values: pd.DataFrame) -> pd.DataFrame:
    """A.1.3: per prefix length, the mean and standard deviation over contexts of the maximum of c over all heads.

    median_of_heads is the mean over contexts of the median head, which the paper does not report. For a causal model
    each column except contexts is repeated with the prefix masked_.
    """
    table = pd.DataFrame({"contexts": values.groupby("prefix", sort=True)["context"].nunique()})
    for before in masks_of(values, "ratio"):
        per_context = values.groupby(["prefix", "context"])[f"{before}ratio"].agg(["max", "median"]).reset_index()
        groups = per_context.groupby("prefix", sort=True)
        columns = {
            "mean": groups["max"].mean(),
            # Of the texts at hand, not an estimate for others: a single text has deviation 0, not NaN.
            "std": groups["max"].std(ddof=0),
            "min": groups["max"].min(),
            "max": groups["max"].max(),
            "median_of_heads": groups["median"].mean(),
        }
        table = table.join(pd.DataFrame(columns).add_prefix(before))
    return table.reset_index()
