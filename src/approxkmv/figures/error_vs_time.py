"""Error against time for every method at one length."""

from __future__ import annotations

from pathlib import Path

from approxkmv.figures.sweep_table import colours, conditions, new_panels, of_what, read_sweep, save


def draw(table: Path, output_stem: Path, n: int | None = None) -> list[Path]:
    """Draw every row of a sweep's table at length n (by default the longest), one panel per workload, as PDF and PNG.

    Bars are the quartiles of the time and, for the error, the median to the 95th percentile; rows that miss their
    target are hollow. Raises TableError when the table is missing or not from a sweep.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    frame = read_sweep(table)
    workloads = conditions(frame)
    methods = colours(frame)
    figure, axes = new_panels(len(workloads), sharey=False)
    for axis, workload in zip(axes, workloads, strict=True):
        some = workload.rows(frame)
        length = n if n is not None and n in set(some["n"]) else int(some["n"].max())
        some = some[(some["n"] == length) & some["seconds"].notna()]
        for method, colour in methods.items():
            points = some[some["method"] == method].drop_duplicates("parameters").sort_values("seconds")
            if points.empty:
                continue
            # The rounding errors of exact rows would stretch the axis over six decades.
            error, high = (points[f"{frame.attrs['error']}_{name}"].clip(lower=1e-3) for name in ("median", "p95"))
            axis.errorbar(
                points["seconds"],
                error,
                xerr=[points["seconds"] - points["seconds_q1"], points["seconds_q3"] - points["seconds"]],
                yerr=[error * 0, (high - error).clip(lower=0)],
                color=colour,
                marker="s" if points["kind"].iloc[0] == "exact" else "o",
                markersize=4,
                linewidth=1,
                linestyle="-" if points["kind"].iloc[0] == "approximate" else "none",
                label=method,
            )
            missed = points["reached"].eq("no").to_numpy()
            axis.plot(
                points["seconds"][missed], error[missed], "o", color=colour, markerfacecolor="white", markersize=4
            )
        for target in sorted(some["target"].dropna().unique()):
            axis.axhline(target, color="0.75", linewidth=0.7, zorder=0)
        axis.set_xscale("log")
        axis.set_yscale("log")
        for ticks in (axis.xaxis, axis.yaxis):
            low, high = ticks.get_view_interval()
            if high < 15 * low:
                # Within about one decade the labels of all minor ticks would overlap.
                ticks.set_major_locator(LogLocator(subs=(1.0, 3.0)))
                ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter(NullFormatter())
        axis.set_title(f"{workload.title}\nn = {length:,}", fontsize=8)
        axis.set_xlabel("seconds")
    axes[0].set_ylabel(f"error, {of_what(frame)}")
    note = "Bars: quartiles of the time, error up to its 95th percentile;\n"
    return save(
        figure,
        axes,
        output_stem,
        note + "errors below 0.001 are drawn there; grey lines: targets; hollow: missed",
    )
