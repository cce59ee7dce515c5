"""What the explorer shows of a model's heads: statistics with intervals, c against the length, readings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from approxkmv.files import read_table
from approxkmv.page.verdict import is_on_long_texts
from approxkmv.results.tables import ModelTables, masks_of, read_heads
from approxkmv.statistics.readings import PRINTED


@dataclass(frozen=True)
class Statistic:
    """A number per head. `tables` are where it comes from: the kind of table and its column, in order of preference."""

    key: str
    title: str
    tables: tuple[tuple[str, str], ...]
    about: str = ""
    log: bool = True
    low: float | None = None
    """Ends of the colours; where there are none, those of the data."""
    high: float | None = None
    interval: bool = False


STATISTICS = (
    Statistic(
        "c",
        "largest c",
        (("heads", "max_ratio"), ("lengths", "largest_ratio")),
        "The head-to-tail ratio: the largest over texts and prefixes; of long texts, at the longest length.",
        low=0.05,
        high=100.0,
    ),
    Statistic(
        "c_n",
        "c at the longest length",
        (("growth", "ratio"),),
        "The geometric mean over texts at the longest length that five of them reach, with its 95 % interval.",
        low=0.05,
        high=100.0,
        interval=True,
    ),
    Statistic(
        "exponent",
        "exponent of c",
        (("growth", "exponent"),),
        "How c grows from about n/2 to the longest length n: 0 is flat, 1 in proportion to n; with its 95 % interval.",
        log=False,
        low=-0.5,
        high=1.0,
        interval=True,
    ),
    Statistic("next", "K(n)/K(n+1)", (("heads", "median_next_ratio"), ("lengths", "next_ratio")), "Median over texts."),
    Statistic(
        "double", "K(n)/K(2n)", (("heads", "median_double_ratio"), ("lengths", "double_ratio")), "Median over texts."
    ),
    Statistic(
        "softmax",
        "c of the softmax matrix",
        (("heads", "median_softmax_ratio"), ("lengths", "softmax_ratio")),
        "The same ratio of the attention matrix itself at full length, median over texts.",
        low=0.05,
        high=100.0,
    ),
    Statistic(
        "entropy",
        "entropy of a row",
        (("attention", "entropy"),),
        "Of the softmax's rows, in nats, mean over rows and texts.",
        log=False,
        low=0.0,
    ),
    Statistic(
        "keys_90",
        "keys for 90 %",
        (("attention", "keys_90"), ("lengths", "keys_90_mean")),
        "The fewest keys that hold 90 % of a row of the softmax, mean over rows and texts.",
        low=1.0,
    ),
    Statistic(
        "first",
        "weight on the first token",
        (("attention", "first_mass"),),
        "Mean over rows and texts.",
        log=False,
        low=0.0,
        high=1.0,
    ),
    Statistic(
        "rank", "stable rank", (("attention", "stable_rank"),), "Of the softmax matrix, mean over texts.", low=1.0
    ),
)
# What each reading is, in the order of the list.
IN_WORDS = {
    PRINTED: "Lemma 4.1",
    "sigma": "section 1's exponent",
    "unscaled": "scale 1",
    "float32": "entries as float32",
    "softmax": "the attention matrix",
    "centred": "keys less their mean",
    "balanced": "q and k of equal size",
    "no-special": "without CLS, SEP, BOS",
    "sentences": "texts are sentences",
}
# Statistics that there are under each reading, with their columns.
OF_READINGS = {"c": "ratio", "next": "next_ratio", "double": "double_ratio"}


def explorer(models: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the explorer reads: models as of_model has them, and what statistics and readings are."""
    statistics = [{name: value for name, value in asdict(one).items() if name != "tables"} for one in STATISTICS]
    return {"statistics": statistics, "readings": IN_WORDS, "models": models}


def of_model(tables: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A model's heads as the explorer reads them, and which tables are not there.

    Values are lists over heads, layer by layer. `sets` are kinds of entries: `all` and, of a model whose layers hide
    keys, `own`. Raises TableError for a table that is there and cannot be read.
    """
    names = ModelTables(tables, facts["model"])
    long = is_on_long_texts(facts)
    paths = {"growth": names.growth, "curves": names.growth_curves}
    if long:
        paths["lengths"] = names.length_scaling
    else:
        paths |= {"heads": names.heads, "attention": names.attention, "readings": names.readings_heads}
    missing = [path.name for path in paths.values() if not path.is_file()]
    found = {kind: _read(kind, path, facts) for kind, path in paths.items() if path.is_file()}
    model: dict[str, Any] = {"key": facts["model"] + (", long texts" if long else "")}
    model |= {name: facts[name] for name in ("label", "corpus", "layers", "heads", "mask", "left_out")}
    model["bound"] = facts["paper_bound"]
    model["values"] = {}
    # Statistics whose own values are of attention as the model computes it, with what K leaves out.
    model["whole"] = [one.key for one in STATISTICS if one.tables[0][0] == "attention" and "attention" in found]
    for one in STATISTICS:
        for kind, column in one.tables:
            if kind in found:
                values = _values(found[kind], column)
                if one.interval:
                    for end in ("low", "high"):
                        for part, numbers in _values(found[kind], f"{column}_{end}").items():
                            values[part] |= {end: numbers["v"]}
                if values:
                    model["values"][one.key] = values
                break
    model["sets"] = ["all", *(["own"] if any("own" in values for values in model["values"].values()) else [])]
    if "growth" in found:
        model |= _growth(found["growth"])
    if "curves" in found:
        model["curves"] = _curves(found["curves"])
    if "readings" in found:
        model["readings"] = _readings(found["readings"])
    return model, missing


def _read(kind: str, path: Path, facts: dict[str, Any]) -> pd.DataFrame:
    along = {"curves": "prefix", "lengths": "length"}.get(kind)
    if kind == "readings":
        words = dict.fromkeys(("reading", "entries"), "text")
        numbers = dict.fromkeys(OF_READINGS.values(), "at least 0 or empty")
        return read_table(path, {"layer": "whole", "head": "whole"} | words | numbers)
    columns = {column: "at least 0" for one in STATISTICS for of, column in one.tables if of == kind}
    if kind == "heads":
        # Older tables have no softmax.
        columns.pop("median_softmax_ratio")
    if kind == "growth":
        columns |= {"size": "text", "trend": "text", "length": "whole", "start": "whole"}
        for column, what in (("ratio", "at least 0 or empty"), ("exponent", "number")):
            columns |= dict.fromkeys((column, f"{column}_low", f"{column}_high"), what)
    if kind == "curves":
        columns = {"texts": "whole", "adjusted_ratio": "at least 0 or empty"}
    table = read_heads(path, facts, columns, along=along).sort_values(["layer", "head"], kind="stable")
    if kind == "lengths":
        # At the longest length alone, as the table of heads.
        table = table[table["length"] == table["length"].max()]
    return table


def _set(before: str) -> str:
    return "own" if before else "all"


def _values(table: pd.DataFrame, column: str) -> dict[str, dict[str, list[Any]]]:
    return {_set(before): {"v": rounded(table[f"{before}{column}"])} for before in masks_of(table, column)}


def _growth(table: pd.DataFrame) -> dict[str, Any]:
    masks = masks_of(table, "size")
    words = {name: {_set(before): table[f"{before}{name}"].tolist() for before in masks} for name in ("size", "trend")}
    octave = {_set(before): [int(table[f"{before}{name}"].iloc[0]) for name in ("start", "length")] for before in masks}
    return words | {"octave": octave}


def _curves(table: pd.DataFrame) -> dict[str, Any]:
    lengths = sorted(table["prefix"].unique().tolist())
    curves: dict[str, Any] = {"lengths": lengths}
    for before in masks_of(table, "adjusted_ratio"):
        wide = table.pivot(index=["layer", "head"], columns="prefix", values=f"{before}adjusted_ratio").sort_index()
        texts = table.groupby("prefix")[f"{before}texts"].max().reindex(lengths)
        curves[_set(before)] = {"c": [rounded(row) for row in wide[lengths].to_numpy()], "texts": texts.tolist()}
    return curves


def _readings(table: pd.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (reading, entries), part in table.groupby(["reading", "entries"], sort=False):
        part = part.sort_values(["layer", "head"])
        numbers = {key: rounded(part[column]) for key, column in OF_READINGS.items()}
        found.setdefault(str(reading), {})["all" if entries == "all" else "own"] = numbers
    # The printed one is what the other tables have.
    return {name: values for name, values in found.items() if name != PRINTED}


def rounded(values: Iterable[float]) -> list[float | str | None]:
    """Four significant digits; None for what is not a number and the words inf and -inf, which JSON does not have."""
    return [
        None if math.isnan(value) else str(value) if math.isinf(value) else float(f"{value:.4g}") for value in values
    ]
