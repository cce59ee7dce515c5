"""The figures by name; a new one is a file with a function `draw`, and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from approxkmv.errors import ConfigError

# Modules of this package whose draw takes (folder of tables, model, stem).
PER_MODEL = (
    *("max_ratios", "order_ratios", "readings", "gauge", "growth", "growth_curves", "attention_support"),
    "length_scaling",
)
# Those whose draw takes (folder of tables, models, stem).
PER_STUDY = ("context_scaling",)
# Those whose draw takes (table, stem), and the table's name.
PER_TABLE = {
    "complexity": "complexity.csv",
    "speedup": "sweep.csv",
    "error_vs_time": "sweep.csv",
    "crossover": "sweep.csv",
}


def draw(name: str, tables: Path, models: Sequence[str], stem: Path) -> list[Path]:
    """Draw the figure `name` from a folder of tables; for the figures of models, of the given ones.

    Returns the PDF and the PNG. Raises ConfigError for an unknown name, or for other than one model where it is of one.
    """
    if name not in (*PER_MODEL, *PER_STUDY, *PER_TABLE):
        raise ConfigError(f"there is no figure {name!r}: there is {', '.join([*PER_MODEL, *PER_STUDY, *PER_TABLE])}")
    if name in PER_MODEL and len(models) != 1:
        raise ConfigError(f"the figure {name} is of one model: give --model once")
    if name in PER_STUDY and not models:
        raise ConfigError(f"the figure {name} is of models: give --model at least once")
    # On demand: some figures' modules import torch, which takes longer than drawing.
    module = importlib.import_module(f"approxkmv.figures.{name}")
    if name in PER_TABLE:
        return module.draw(tables / PER_TABLE[name], stem)
    return module.draw(tables, models[0] if name in PER_MODEL else models, stem)
