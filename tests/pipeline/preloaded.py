"""What each command of a study would import and set up for itself: the package's modules, numba and fonts."""

import importlib
import io
import pkgutil

from matplotlib.figure import Figure
from numba import njit

import approxkmv.figures
import approxkmv.steps

for package in (approxkmv.steps, approxkmv.figures):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
# The first function that numba compiles or loads takes half a second longer than any other.
njit(lambda x: x)(1)
figure = Figure()
figure.text(0, 0, "1")
for kind in ("pdf", "png"):
    figure.savefig(io.BytesIO(), format=kind)
