"""The length from which each method is faster than each exact baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from approxkmv.figures.sweep_table import (
    baselines,
    colours,
    conditions,
    new_panels,
    of_what,
    read_sweep,
    save,
    select,
)
from approxkmv.slopes import log_log_line

_FARTHEST = 2.0**24


def crossover(n: np.ndarray, ratio: np.ndarray) -> tuple[float, str]:
    """The n from which ratio (exact over method) stays above one, and 'measured', 'below', 'extrapolated' or 'never'.

    Between two lengths log ratio is interpolated linearly in log n; beyond the last it follows the line through the
    last three lengths, if that rises. 'below': already faster at the first length, so its n is an upper bound.
    """
    if len(n) == 0:
        return float("nan"), "never"
    logs, x = np.log(ratio), np.log(n)
    slower = np.flatnonzero(logs <= 0)
    if len(slower) == 0:
        return float(n[0]), "below"
    last = slower[-1]
    if last + 1 < len(n):
        part = -logs[last] / (logs[last + 1] - logs[last])
        return float(np.exp(x[last] + part * (x[last + 1] - x[last]))), "measured"
    if len(n) < 2:
        return float("nan"), "never"
    slope, intercept, _ = log_log_line(n[-3:], ratio[-3:])
    # With almost no slope the crossing is too far out to be meaningful.
    if slope <= 1e-6 or -intercept / slope > np.log(_FARTHEST):
        return float("nan"), "never"
    return float(np.exp(max(-intercept / slope, x[-1]))), "extrapolated"


def draw(table: Path, output_stem: Path, target: float = 0.10) -> list[Path]:
    """Draw for each workload and exact baseline the n at which each method overtakes it, as PDF and PNG.

    Only rows that reach the target on other inputs count. Raises TableError when the table is missing or not from a
    sweep.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    frame = read_sweep(table)
    workloads = conditions(frame)
    ratios = baselines(frame)
    methods = [m for m in colours(frame) if not m.startswith("exact")]
    figure, axes = new_panels(len(workloads), sharey=True, height=1.0 + 0.16 * len(methods))
    longest = float(frame["n"].max())
    for axis, workload in zip(axes, workloads, strict=True):
        some = workload.rows(frame)
        axis.set_xscale("log", base=2)
        for place, method in enumerate(methods):
            line = select(some, method, target)
            for offset, ratio in enumerate(ratios):
                both = line[line["reached"].eq("yes") & line[ratio].notna()]
                n, how = crossover(*both[["n", ratio]].to_numpy(np.float64).T)
                y = place + (offset - (len(ratios) - 1) / 2) * 0.22
                colour = f"C{offset}"
                if how == "never":
                    axis.plot(float(some["n"].min()), y, "x", color=colour, markersize=5)
                elif how == "below":
                    axis.plot(n, y, "<", color=colour, markersize=5)
                else:
                    face = colour if how == "measured" else "white"
                    axis.plot(n, y, "o", color=colour, markerfacecolor=face, markersize=5)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_title(workload.title, fontsize=8)
        axis.set_xlabel("n")
    for offset, against in enumerate(ratios.values()):
        axes[0].plot([], [], "s", color=f"C{offset}", label=f"against {against}")
    limits = [axis.get_xlim() for axis in axes]
    shortest, farthest = min(low for low, _ in limits) / 1.1, max(high for _, high in limits) * 1.1
    for axis in axes:
        axis.set_xlim(shortest, farthest)
        if farthest > longest:
            axis.axvspan(longest, farthest, color="0.93", zorder=0)
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}K" if n < 2**20 else f"{n / 2**20:g}M")
    note = "Disc: measured; circle: extrapolated;\ntriangle: faster at every length; cross: never, or not reached"
    return save(figure, axes, output_stem, f"Error target {target:g} {of_what(frame)}. {note}")
