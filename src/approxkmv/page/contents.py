"""What a page has in reading order: figures with their titles, captions and tables. Also for Snakemake's report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
CAPTIONS = Path(__file__).resolve().parent / "captions"
# What the page is made of that is not Python.
PAGE_FILES = sorted((*ASSETS.iterdir(), *CAPTIONS.iterdir()))


@dataclass(frozen=True)
class FigureOfPage:
    """A figure of the catalogue as it stands on the page."""

    title: str
    chapter: str
    """Where Snakemake's report has it; it sorts chapters by name."""
    caption: str
    """A file of CAPTIONS."""
    tables: tuple[str, ...]
    """What it is drawn from, {} standing for the model."""


HEADS, LENGTH, DEFINITION, METHODS = "1. Heads", "2. Length", "3. Definition", "4. Methods"
GROWTH = ("growth_{}.csv", "growth_curves_{}.csv")
READINGS = ("readings_{}.csv", "readings_path_{}.csv")
SWEEP = ("sweep.csv",)
FIGURES = {
    name: FigureOfPage(*about)
    for name, about in {
        "max_ratios": ("Largest c per head (Figures 1 and 3)", HEADS, "max_ratios", ("heads_{}.csv",)),
        "order_ratios": ("Order ratios per head (Figure 2)", HEADS, "order_ratios", ("heads_{}.csv",)),
        "attention_support": ("Rows of the softmax per head", HEADS, "attention", ("attention_{}.csv",)),
        "context_scaling": ("c against length (Figure 4)", LENGTH, "context_scaling", ("context_scaling_{}.csv",)),
        "growth": ("Growth of c per head", LENGTH, "growth", GROWTH),
        "growth_curves": ("c against length, typical heads", LENGTH, "growth_curves", GROWTH),
        "length_scaling": ("Long texts", LENGTH, "length_scaling", ("length_scaling_{}.csv",)),
        "readings": ("Readings of the definition", DEFINITION, "readings", READINGS),
        "gauge": ("The gauge", DEFINITION, "gauge", ("gauge_{}.csv",)),
        "speedup": ("Speed at equal error (Figure 5)", METHODS, "sweep", SWEEP),
        "error_vs_time": ("Error against time", METHODS, "sweep", SWEEP),
        "crossover": ("Where methods overtake exact attention", METHODS, "sweep", SWEEP),
        "operator": ("Kernel products: error against time", METHODS, "operator", ("operator.csv",)),
        "complexity": ("Cost of ApproxKMV as printed", METHODS, "complexity", ("complexity.csv",)),
    }.items()
}
