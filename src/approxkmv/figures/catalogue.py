"""The figures by name; a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from approxkmv.errors import ConfigError
from approxkmv.figures import (
    complexity,
    context_scaling,
    crossover,
    error_vs_time,
    growth,
    growth_curves,
    length_scaling,
    max_ratios,
    order_ratios,
    speedup,
)

PER_MODEL = {
    "max_ratios": max_ratios.draw,
    "order_ratios": order_ratios.draw,
    "growth": growth.draw,
    "growth_curves": growth_curves.draw,
    "length_scaling": length_scaling.draw,
}
PER_STUDY = {
    "context_scaling": context_scaling.draw,
    "complexity": lambda tables, _, stem: complexity.draw(tables / "complexity.csv", stem),
    "speedup": lambda tables, _, stem: speedup.draw(tables / "sweep.csv", stem),
    "error_vs_time": lambda tables, _, stem: error_vs_time.draw(tables / "sweep.csv", stem),
    "crossover": lambda tables, _, stem: crossover.draw(tables / "sweep.csv", stem),
}


def draw(name: str, tables: Path, models: Sequence[str], stem: Path) -> list[Path]:
    """Draw the figure `name` for the given models. Raises ConfigError for an unknown name or more than one model."""
    if name in PER_STUDY:
        return PER_STUDY[name](tables, models, stem)
    if name not in PER_MODEL:
        raise ConfigError(f"there is no figure {name!r}: there is {', '.join([*PER_MODEL, *PER_STUDY])}")
    if len(models) != 1:
        raise ConfigError(f"the figure {name} is of one model: give --model once")
    return PER_MODEL[name](tables, models[0], stem)
