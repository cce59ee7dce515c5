"""Error against time for every method at one length."""

from __future__ import annotations

from pathlib import Path

from approxkmv.figures import sweep_table
from approxkmv.figures.style import draw_points, headline, logarithmic_ticks


def draw(table: Path, output_stem: Path) -> list[Path]:
    """Draw every row of a sweep's table at its longest n, one panel per workload, as PDF and PNG.

    Bars are the quartiles of the time and, for the error, the median to the 95th percentile; rows that miss their
    target are hollow. Raises TableError when the table is missing or not from a sweep.
    """
    frame = sweep_table.read_sweep(table)
    workloads = sweep_table.conditions(frame)
    look = sweep_table.looks(frame)
    winners: list[str] = []
    doubted: set[str] = set()
    figure, axes = sweep_table.new_panels(len(workloads), sharey=True)
    for axis, workload in zip(axes, workloads, strict=True):
        some = workload.rows(frame)
        length = int(some["n"].max())
        some = some[(some["n"] == length) & some["seconds"].notna()]
        for method, drawn in look.items():
            points = some[some["method"] == method].drop_duplicates("parameters").sort_values("seconds")
            if points.empty:
                continue
            # The rounding errors of exact rows would stretch the axis over six decades.
            error, high = (points[f"{frame.attrs['error']}_{name}"].clip(lower=1e-3) for name in ("median", "p95"))
            own = drawn if points["kind"].iloc[0] == "approximate" else drawn | {"linestyle": "none"}
            seconds, reached = points["seconds"], points["reached"] != "no"
            draw_points(axis, seconds, error, reached, linewidth=1, label=method, markersize=4.5, **own)
            beside = [seconds - points["seconds_q1"], points["seconds_q3"] - seconds]
            above = [error * 0, (high - error).clip(lower=0)]
            axis.errorbar(seconds, error, above, beside, fmt="none", ecolor=drawn["color"], elinewidth=1)
        for target in sorted(some["target"].dropna().unique()):
            axis.axhline(target, color="0.75", linewidth=0.7, zorder=0)
        axis.set_xscale("log")
        axis.set_yscale("log")
        able = sweep_table.contenders(some)
        held = able[able["reached"].eq("yes") & ((able["target"] - frame.attrs["target"]).abs() < 1e-9)]
        held = held.sort_values("seconds")
        clear = held[held["times_faster_q1"] > 1].head(1)
        winners += list(clear["method"])
        # Another is faster, but within the noise
        doubted |= {*clear["method"]} if len(clear) and clear.index[0] != held.index[0] else set()
        axis.set_title(f"{workload.title}\nn = {length:,}", fontsize=8, loc="left")
        axis.set_xlabel("time in seconds", fontsize=8)
        axis.set_ylabel(f"median error, {sweep_table.of_what(frame)}", fontsize=8)
    for ticks in (ticks for axis in axes for ticks in (axis.xaxis, axis.yaxis)):
        logarithmic_ticks(ticks)
    best = max(winners, key=winners.count, default="")
    finding = "no approximate method is faster than exact attention"
    if best:
        faster = " that is clearly" if best in doubted else ", and"
        finding = f"{best} is the fastest approximate method{faster} faster than exact attention, on "
        finding += sweep_table.count_of(winners.count(best), len(workloads), "workload")
    headline(figure, f"At an error of {frame.attrs['target']:g} {sweep_table.of_what(frame)}, {finding}")
    note = "Bars: quartiles of the time, error up to its 95th percentile; errors below 0.001 are drawn there; "
    note += "grey lines: targets; hollow: the 95th percentile misses the target, or too many rows were recomputed "
    note += "exactly" + sweep_table.uncounted(frame)
    return sweep_table.save(figure, axes, output_stem, note)
