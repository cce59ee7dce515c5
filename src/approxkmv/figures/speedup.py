"""Figure 5 at equal error: time of each exact baseline over the time of each method, against n."""

from __future__ import annotations

from pathlib import Path

from approxkmv.figures.sweep_table import (
    baselines,
    colours,
    conditions,
    new_figure,
    new_panels,
    of_what,
    read_sweep,
    save,
    select,
)


def draw(table: Path, output_stem: Path, target: float = 0.10) -> list[Path]:
    """Draw the ratios of a sweep's table, one panel per exact baseline and workload, as PDF and PNG.

    A band is the ratio at the first and third quartiles of both times. A row whose 95th percentile of the error is
    beyond the target is drawn hollow. Raises TableError when the table is missing or not from a sweep.
    """
    frame = read_sweep(table)
    workloads = conditions(frame)
    methods = colours(frame)
    ratios = baselines(frame)
    if len(ratios) == 1:
        figure, axes = new_panels(len(workloads), sharey=False)
        places = [[axis] for axis in axes]
    else:
        figure, axes = new_figure(len(workloads), len(ratios), sharey="row")
        places = list(axes)
    for row, workload in enumerate(workloads):
        for column, (ratio, against) in enumerate(ratios.items()):
            axis = places[row][column]
            some = workload.rows(frame)
            for method, colour in methods.items():
                line = select(some, method, target)
                line = line[line[ratio].notna()]
                if line.empty:
                    continue
                n, times = line["n"].to_numpy(), line[ratio].to_numpy()
                style = "--" if line["kind"].iloc[0] != "approximate" else "-"
                if ratio == "times_faster":
                    low, high = line["times_faster_q1"].to_numpy(), line["times_faster_q3"].to_numpy()
                    axis.fill_between(n, low, high, color=colour, alpha=0.15, linewidth=0)
                axis.plot(n, times, style, color=colour, linewidth=1.3)
                reached = line["reached"].eq("yes").to_numpy()
                axis.plot(n[reached], times[reached], "o", color=colour, markersize=4, label=method)
                axis.plot(n[~reached], times[~reached], "o", markerfacecolor="white", color=colour, markersize=4)
                if not reached.any():
                    axis.plot([], [], "o", markerfacecolor="white", color=colour, markersize=4, label=method)
            axis.axhline(1, color="0.4", linewidth=0.8)
            axis.set_yscale("log")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}K")
            axis.set_xticks(sorted(some["n"].unique())[:: max(1, -(-some["n"].nunique() // 5))])
            axis.set_xticks([], minor=True)
            axis.set_title(f"{workload.title}\nagainst {against}", fontsize=8)
            axis.set_xlabel("n")
            if column == 0:
                axis.set_ylabel("times faster")
    of = of_what(frame)
    return save(figure, axes, output_stem, f"error target {target:g} {of}; hollow: target missed; dashed: trivial")
