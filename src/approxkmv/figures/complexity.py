"""Cost of ApproxKMV with the printed constants against n, with fitted exponents and the n at which it beats n^2."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from approxkmv.errors import TableError
from approxkmv.figures import style
from approxkmv.figures.style import headline, logarithmic_ticks, new_figure, save
from approxkmv.files import read_table
from approxkmv.kmv.complexity import COLUMNS, FITTED, PAPER_EXPONENT, fit_exponents

_LABELS = {
    "total": "all kernel evaluations",
    "total_printed": "the same, line 7 as printed",
    "heavy": "Algorithm 1 (heavy keys)",
    "hash": "hash evaluations",
    "density_printed": "densities, Theorem 2.2",
}


def draw(table_path: str | Path, output_stem: str | Path) -> list[Path]:
    """Draw the cost study from its table.

    >>> draw("complexity.csv", "complexity")  # doctest: +SKIP
    [PosixPath('complexity.pdf'), PosixPath('complexity.png')]

    Args:
        table_path: CSV from `kmv.complexity.measure_costs`. output_stem: path without suffix.
    Returns:
        The PDF and the PNG that were written.
    Raises:
        TableError: the table is missing or lacks a column.
    """
    path = Path(table_path)
    table = read_table(path, {column: "text" if column == "kernel" else "at least 0" for column in COLUMNS})
    if not (table[["n", *FITTED]] > 1).all().all():
        raise TableError(f"{path} has numbers of evaluations that are below 1: delete it and run again")
    fits = fit_exponents(table)
    figure = new_figure(11.5, 5.4)
    costs, exponents = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_costs(costs, table)
    _draw_exponents(exponents, fits)
    headline(figure, *_verdict(table, fits))
    return save(figure, Path(output_stem))


def _draw_costs(axes: Axes, table: pd.DataFrame) -> None:
    means = table.groupby(["kernel", "n"], sort=False).mean(numeric_only=True).reset_index()
    n = np.sort(means["n"].unique()).astype(float)
    for i, (name, group) in enumerate(means.groupby("kernel", sort=False)):
        label = f"asked for: {name}".replace("$", r"\$")
        axes.plot(group["n"], group["total"], label=label, **style.look(i, markersize=4.5))
        axes.plot(group["n"], group["heavy"], **style.look(i, markersize=3, linestyle=":", linewidth=1))
    hashes = means.groupby("n")["hash"].mean()
    axes.plot(hashes.index, hashes.to_numpy(), "x--", color="0.45", ms=4, lw=1, label="hash evaluations")
    axes.plot([], [], ":", color="0.3", lw=1, label="kernel evaluations of Algorithm 1")
    axes.plot(n, n**2, "k-", lw=2, label=r"exact product, $n^2$")
    anchor = means.loc[means["n"] == means["n"].min(), "total"].min() / 2.5
    axes.plot(n, anchor * (n / n[0]) ** PAPER_EXPONENT, "k--", lw=0.9, label=rf"slope {PAPER_EXPONENT}")
    axes.set(xscale="log", yscale="log", xlabel="n (queries and keys)", ylabel="evaluations")
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [f"{int(v):,}" for v in n])
    axes.set_ylim(top=axes.get_ylim()[1] * 30)
    logarithmic_ticks(axes.yaxis)
    axes.legend(fontsize=8, ncols=2, frameon=False, loc="upper left")


def _draw_exponents(axes: Axes, fits: pd.DataFrame) -> None:
    kernels = list(fits["kernel"].unique())
    height = len(kernels) + 1.2
    ticks, labels = [], []
    for place, quantity in enumerate(FITTED):
        rows = fits[fits["quantity"] == quantity].set_index("kernel")
        for offset, name in enumerate(kernels):
            row = rows.loc[name]
            y = -(place * height + offset)
            spread = [[row["exponent"] - row["exponent_low"]], [row["exponent_high"] - row["exponent"]]]
            look = style.look(offset, linestyle="none", markersize=4.5)
            axes.errorbar(row["exponent"], y, xerr=np.maximum(spread, 0.0), capsize=2, **look)
            axes.annotate(
                _power(row["log10_crossing"]), (1.0, y), xycoords=("axes fraction", "data"), fontsize=8, va="center"
            )
        ticks.append(-(place * height + (len(kernels) - 1) / 2))
        labels.append(_LABELS[quantity])
    axes.axvline(PAPER_EXPONENT, color="k", ls="--", lw=0.9)
    axes.axvline(2.0, color="k", lw=2)
    for value, text, side, shift in ((PAPER_EXPONENT, str(PAPER_EXPONENT), "right", -3), (2.0, "$n^2$", "left", 3)):
        axes.annotate(text, (value, 1.4), ha=side, fontsize=8, xytext=(shift, 0), textcoords="offset points")
    axes.annotate("below $n^2$\nbeyond", (1.0, 1.1), xycoords=("axes fraction", "data"), fontsize=8)
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-(len(FITTED) * height) + 0.8, 2.4)
    axes.set_xlim(right=max(2.08, float(fits["exponent_high"].max()) + 0.04))
    axes.set_xlabel("fitted a in cost = C $n^a$ ln n, with 95 % interval")


def _verdict(table: pd.DataFrame, fits: pd.DataFrame) -> list[str]:
    total = fits[fits["quantity"] == "total"]
    low, high = total["log10_crossing_low"].min(), total["log10_crossing_high"].max()
    least, most = total["over_n_squared"].min(), total["over_n_squared"].max()
    words = [
        f"At n = {int(table['n'].max()):,} the printed constants (line 7 mended) ask for {least:,.0f} to {most:,.0f} "
        r"times the $n^2$ kernel evaluations of the exact product.",
    ]
    if math.isinf(total["log10_crossing"].min()):
        words.append(r"The fitted exponents do not stay below 2: no n is found at which they would win.")
    else:
        size = " (astronomical)" if low > 12 else ""
        where = f"between {_power(low)} and {_power(high)}" if math.isfinite(high) else f"of {_power(low)}, if at all"
        words.append(f"Extrapolated, they win only beyond an n {where}{size}: 95 % intervals, all kernels together.")
    return words


def _power(exponent: float) -> str:
    if math.isinf(exponent):
        return "never"
    return f"{10**exponent:,.0f}" if exponent < 5 else rf"$10^{{{exponent:.0f}}}$"
