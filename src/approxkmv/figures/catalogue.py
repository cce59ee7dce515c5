"""The figures by name. To add one, write a module with a function `draw` and add a line here."""

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
# Those whose draw takes (table, stem), with the table's name.
PER_TABLE = {
    "complexity": "complexity.csv",
    "operator": "operator.csv",
    "speedup": "sweep.csv",
    "error_vs_time": "sweep.csv",
    "crossover": "sweep.csv",
}


def draw(name: str, tables: Path, models: Sequence[str], stem: Path) -> list[Path]:
    """Draw the figure `name` from a folder of tables, for the given models if it shows models.

    Returns the paths of the PDF and the PNG. Raises ConfigError for an unknown name or a wrong number of models.
    """
    if name not in (*PER_MODEL, *PER_STUDY, *PER_TABLE):
        raise ConfigError(f"there is no figure {name!r}; choose from {', '.join([*PER_MODEL, *PER_STUDY, *PER_TABLE])}")
    if name in PER_MODEL and len(models) != 1:
        raise ConfigError(f"the figure {name} shows one model: give --model once")
    if name in PER_STUDY and not models:
        raise ConfigError(f"the figure {name} shows models: give --model at least once")
    if name in PER_TABLE and models:
        raise ConfigError(f"the figure {name} shows no model: leave out --model")
    # Imported on demand: some modules import torch, which takes longer than drawing.
    module = importlib.import_module(f"approxkmv.figures.{name}")
    if name in PER_TABLE:
        return module.draw(tables / PER_TABLE[name], stem)
    return module.draw(tables, models[0] if name in PER_MODEL else models, stem)
