"""The paper's claims beside what was measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from approxkmv.errors import TableError
from approxkmv.files import read_table, write_csv
from approxkmv.results.tables import ModelTables, masks_of, read_heads, read_overview, read_statistics
from approxkmv.slopes import log_log_line
from approxkmv.statistics.entries import CAUSAL
from approxkmv.statistics.growth import ENOUGH_TEXTS, FLAT
from approxkmv.words import counted

# Columns of the table of heads that claims are judged by.
JUDGED = ("max_ratio", "median_next_ratio", "median_double_ratio")
# Columns of the table of readings.
READ = {"reading": "text", "entries": "text", "heads": "whole"} | dict.fromkeys(
    ("largest_ratio", "median_double"), "at least 0 or empty"
)
# A ratio of neighbours at most this large is "about 1".
ABOUT_ONE = 1.05


def compare(tables: Path, models: Sequence[str], out: Path) -> pd.DataFrame:
    """Write and return paper_comparison.csv: claim, criterion, paper, model, entries, ours, holds.

    entries is `all`, which the paper's claims are about; a causal model has further rows with `causal` (`masked` if it
    has windows or chunks): the same criterion over the entries that the model uses. The paper says nothing about these,
    so its column is empty there.
    """
    rows = []
    for model in models:
        names = ModelTables(tables, model)
        overview = read_overview(names.overview, "model", "layers", "heads", "texts_used", "paper_bound")
        heads = read_heads(names.heads, overview, dict.fromkeys(JUDGED, "at least 0"))
        scaling = read_statistics(
            names.context_scaling, {"prefix": "whole", "contexts": "whole"}, {"mean": "at least 0"}
        )
        for before in masks_of(heads, "max_ratio"):
            if before and f"{before}mean" not in scaling:
                raise TableError(
                    f"{names.context_scaling} has no masked values, and {names.heads} has: run summary again"
                )
            rows += claims(overview, heads, scaling, before)
        readings = read_table(names.readings, READ)
        rows += claims_as_read(overview, readings[readings["entries"] == "all"])
    table = pd.DataFrame(rows)
    write_csv(out, table)
    return table


def claims(overview: Mapping, heads: pd.DataFrame, scaling: pd.DataFrame, before: str = "") -> list[dict]:
    """The paper's claims for one model; each row says by which criterion it is judged.

    `before` is the prefix of the tables' columns: "" for all entries, MASKED for those that a causal model uses.
    """
    bound = overview["paper_bound"]
    n_heads = len(heads)
    largest = float(heads[f"{before}max_ratio"].max())
    within = float((heads[f"{before}max_ratio"] <= bound).mean())
    near_one = float((heads[f"{before}median_next_ratio"] <= ABOUT_ONE).mean())
    below_20 = float((heads[f"{before}median_double_ratio"] <= 20).mean())
    slope, lengths = growth_exponent(scaling, before)
    entries = "all" if not before else "causal" if overview["mask"] == CAUSAL else "masked"
    rows: list[dict] = []

    def judge(claim: str, criterion: str, paper: float | None, ours: float, holds: bool) -> None:
        paper = None if before else paper
        row = {"claim": claim, "criterion": criterion, "paper": paper, "model": overview["model"], "entries": entries}
        rows.append(row | {"ours": ours, "holds": verdict(ours, holds)})

    claim = "c is at most a small constant for every head and text (Figures 1, 3)"
    criterion = f"largest c over {counted(n_heads, 'head')} and {counted(overview['texts_used'], 'text')} <= {bound:g}"
    judge(claim, criterion, bound, largest, largest <= bound)
    claim = "share of heads whose largest c is within that constant"
    judge(claim, "all of them", 1.0, within, within == 1.0)
    claim = "K_(n)/K_(n+1) is about 1 for almost all heads (Figure 2)"
    criterion = f"share of heads with median <= {ABOUT_ONE:g} is at least 0.95"
    judge(claim, criterion, None, near_one, near_one >= 0.95)
    claim = "K_(n)/K_(2n) is about 20 or less for most heads (Figure 2)"
    judge(claim, "share of heads with median <= 20 is above 0.5", None, below_20, below_20 > 0.5)
    claim = "c does not grow with the length of the context (Figure 4)"
    criterion = f"exponent of mean largest c against length {lengths} is at most {FLAT:g}"
    judge(claim, criterion, 0.0, slope, slope <= FLAT)
    return rows


def verdict(ours: float, holds: bool) -> str:
    """`yes` or `no`, but `undecided` of what could not be measured."""
    return "undecided" if math.isnan(ours) else "yes" if holds else "no"


def claims_as_read(overview: Mapping, readings: pd.DataFrame) -> list[dict]:
    """Whether c is small, and whether K_(n)/K_(2n) is, under each reading of the definition."""
    bound = overview["paper_bound"]
    place = {"model": overview["model"], "entries": "all"}
    rows = []
    for row in readings.to_dict("records"):
        for claim, criterion, paper, ours in (
            ("c is at most a small constant", f"largest c over heads and texts <= {bound:g}", bound, "largest_ratio"),
            ("K_(n)/K_(2n) is about 20 or less", "median over heads <= 20", 20.0, "median_double"),
        ):
            found = {"claim": f"{claim}, read as {row['reading']}", "criterion": criterion, "paper": paper}
            rows.append(found | place | {"ours": row[ours], "holds": verdict(row[ours], row[ours] <= paper)})
    return rows


def growth_exponent(scaling: pd.DataFrame, before: str = "") -> tuple[float, str]:
    """Least-squares slope of log(mean) against log(prefix), over lengths with enough texts; nan with fewer than two."""
    part = scaling[scaling["contexts"] >= ENOUGH_TEXTS]
    mean = f"{before}mean"
    part = part[part[mean] > 0]
    if len(part) < 2:
        return float("nan"), "(too few texts or lengths)"
    slope, *_ = log_log_line(part["prefix"], part[mean])
    return slope, f"{int(part['prefix'].min())} to {int(part['prefix'].max())}"
