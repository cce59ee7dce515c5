"""Error against time of kernel products, one panel an x, at the greatest n of each."""

from __future__ import annotations

from pathlib import Path

from approxkmv.errors import TableError
from approxkmv.figures.style import headline, legend_below, logarithmic_ticks, look, new_figure, save
from approxkmv.files import read_table

_NUMBERS = ("n", "seconds", "error")
# Which the operator's own rows have.
_OF_OPERATOR = ("epsilon", "times_best_exact")
_TITLES = {"ones": "x = 1", "smooth": "x = k·u", "signs": "x = ±1"}
# The operator's own rows, and the rows of trivial answers, which take no time.
_OPERATOR, _TRIVIAL = "KernelOperator", ("zero", "mean")
# The rounding errors of exact rows would stretch the axis over six decades.
_LEAST = 1e-3


def draw(table_path: Path, output_stem: Path) -> list[Path]:
    """Draw the table of the study `operator` as PDF and PNG. Raises TableError if it is missing or of another kind."""
    kinds = dict.fromkeys(_NUMBERS, "at least 0") | dict.fromkeys(("x", "method"), "text")
    kinds |= dict.fromkeys(_OF_OPERATOR, "at least 0 or empty")
    table = read_table(Path(table_path), kinds)
    found = [kind for kind in _TITLES if kind in set(table["x"])]
    if not found:
        raise TableError(f"{table_path} has none of the x {', '.join(_TITLES)}: delete it and run again")
    table = table[table["n"] == table.groupby("x")["n"].transform("max")]
    figure = new_figure(3.6 * len(found) + 0.6, 4.4)
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    methods = [name for name in dict.fromkeys(table["method"]) if name not in _TRIVIAL]
    gains = []
    least = table["error"].min() < _LEAST
    for axis, kind in zip(axes, found, strict=True):
        rows = table[table["x"] == kind]
        n = int(rows["n"].iloc[0])
        for i, method in enumerate(methods):
            points = rows[rows["method"] == method].sort_values("epsilon")
            own = look(i, linestyle="-" if method == _OPERATOR else "none", label=method)
            axis.plot(points["seconds"], points["error"].clip(lower=_LEAST), **own)
        for name in _TRIVIAL:
            trivial = rows[rows["method"] == name]
            if len(trivial) and trivial["error"].iloc[0] < 0.99:
                axis.axhline(trivial["error"].iloc[0], color="0.7", lw=0.8, label=f"{name} of the answer")
        ours = rows[rows["method"] == _OPERATOR].sort_values("epsilon")
        gains += ours["times_best_exact"].tail(1).tolist()
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{_TITLES[kind]}, n = {n:,}", fontsize=9, loc="left")
        axis.set_xlabel("time in seconds", fontsize=8)
        for ticks in (axis.xaxis, axis.yaxis):
            logarithmic_ticks(ticks)
    axes[0].set_ylabel("error relative to Kx", fontsize=8)
    finding = "Kernel products to within an error, against exact ones"
    if gains:
        finding = (
            f"At the largest epsilon products after the first are {min(gains):.2g} to {max(gains):.2g} times as fast "
            "as the fastest exact one"
        )
    headline(figure, finding)
    note = "KernelOperator: a point for each epsilon, the time of a product after the first"
    note += f"; errors below {_LEAST:g} are drawn there" if least else ""
    legend_below(figure, note, handles=axes[0].get_legend_handles_labels()[0], ncols=3)
    return save(figure, Path(output_stem))
