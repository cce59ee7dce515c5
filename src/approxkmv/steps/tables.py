"""Names of the tables that a study's steps hand to each other, and how the overview is read."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.errors import TableError
from approxkmv.statistics.entries import CAUSAL, EVERY_KEY

if TYPE_CHECKING:
    import pandas as pd

# In front of a column: the same statistic over the entries that each layer's own mask leaves.
MASKED = "masked_"


def masks_of(table: Container[str], column: str) -> list[str]:
    """What stands before `column` in a table (or among a dict's keys): nothing and, of a causal model, MASKED."""
    return [before for before in ("", MASKED) if f"{before}{column}" in table]


def facts_of_attention(contexts: pd.DataFrame) -> dict[str, Any]:
    """What an overview says of a model's attention, from the contexts of its shards: `mask` and `left_out`."""
    left_out = contexts["left_out"].iloc[0]
    return {"mask": contexts["mask"].iloc[0], "left_out": left_out.split("; ") if isinstance(left_out, str) else []}


@dataclass(frozen=True)
class ModelTables:
    """The tables of one model."""

    heads: Path
    """CSV, one row per layer and head."""
    scaling: Path
    """CSV, one row per prefix length."""
    overview: Path
    """JSON: counts, the largest c, and who made the tables."""
    growth: Path
    """CSV, one row per layer and head."""
    curves: Path
    """CSV, one row per layer, head and prefix length."""


def model_tables(folder: Path, model: str) -> ModelTables:
    """Where the summary step puts a model's tables."""
    return ModelTables(
        folder / f"heads_{model}.csv",
        folder / f"context_scaling_{model}.csv",
        folder / f"overview_{model}.json",
        folder / f"growth_{model}.csv",
        folder / f"growth_curves_{model}.csv",
    )


@dataclass(frozen=True)
class LengthTables:
    """The tables of one model on long texts."""

    scaling: Path
    """CSV, one row per layer, head and length."""
    facts: Path
    """JSON: which lengths were run and which not, and who made the table."""


def length_tables(folder: Path, model: str) -> LengthTables:
    """Where the length-scaling step puts a model's tables."""
    return LengthTables(folder / f"length_scaling_{model}.csv", folder / f"lengths_{model}.json")


def read_overview(path: Path) -> dict[str, Any]:
    """The overview JSON of one model. Raises TableError when missing or cut short."""
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise TableError(f"{path} cannot be read ({error}): run summary again") from error
    # The reference tables of before these were recorded are of models that have neither windows nor anything left out.
    return {"mask": CAUSAL if facts.get("causal") else EVERY_KEY, "left_out": []} | facts
