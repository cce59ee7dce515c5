"""The reference results, and the format of their tables and numbers in documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from approxkmv.files import read_json

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"
# In it: studies on a processor with matrix units for bfloat16, where exact products and exact attention are faster.
ELSEWHERE = "amx"


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table of strings."""
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(path: Path) -> str:
    """One line with the machine and the versions that produced a table."""
    record = read_json(path)
    record = record.get("provenance", record)
    versions = record["versions"]
    instructions = record["machine"].get("instructions", [])
    matrix = " with AMX" if "amx_bf16" in instructions else " without AMX" if instructions else ""
    told = "".join(f" under {name}={value}" for name, value in record["machine"].get("settings", {}).items())
    return (
        f"{record['machine']['cores']} cores of {record['machine']['processor']}{matrix}{told}, "
        f"Python {versions['python']}, torch {versions['torch']}, NumPy {versions['numpy']}"
    )


def number(value: float) -> str:
    """Two to three digits."""
    if not np.isfinite(value):
        return "∞" if value == np.inf else "–"
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.1e}"
