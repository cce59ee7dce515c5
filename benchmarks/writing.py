"""The tables that benchmarks write, and times of calls for them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from approxkmv.files import write_csv, write_json
from approxkmv.provenance import describe


def out_of(document: str | None, name: str) -> Path:
    """Where a script with this docstring writes its table: results/benchmarks/NAME.csv unless --out says otherwise."""
    parser = argparse.ArgumentParser(description=(document or "").split(":", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(f"results/benchmarks/{name}.csv"))
    given: Path = parser.parse_args().out
    return given


def write(out: Path, table: pd.DataFrame, settings: dict[str, Any]) -> None:
    """Write a table, and as .json beside it how it was made."""
    write_csv(out, table)
    write_json(out.with_suffix(".json"), describe(settings))


def times(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each call by the clock, in turn over rounds, after one warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if r:
                found[name].append(clock() - start)
    return found
