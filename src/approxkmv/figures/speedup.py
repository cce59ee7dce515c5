"""Figure 5 at equal error: time of the fastest exact method over the time of each method, against n."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from approxkmv.figures import sweep_table
from approxkmv.figures.style import draw_points, headline, label_ends, logarithmic_ticks, short
from approxkmv.words import counted

if TYPE_CHECKING:
    import pandas as pd

# Lines in a panel; more cannot be told apart.
MOST = 7
# Drawn wherever it reached the target: it is the method of the paper's own figure.
PAPER = "approxkmv-paper"


def draw(table: Path, output_stem: Path) -> list[Path]:
    """Draw the ratios of a sweep's table, one panel per workload, as PDF and PNG.

    A panel has the methods that reach the target somewhere, at most MOST of them: the fastest at their longest n. Where
    a method misses the target, its best setting is a hollow point. A band is the ratio at the first and third quartiles
    of both times. Raises TableError when the table is missing or not from a sweep.
    """
    frame = sweep_table.read_sweep(table)
    workloads = sweep_table.conditions(frame)
    look = sweep_table.looks(frame)
    figure, axes = sweep_table.new_panels(len(workloads), sharey=False, width=3.4)
    left_out = 0
    spans = set()
    ends = []
    for axis, workload in zip(axes, workloads, strict=True):
        some = workload.rows(frame)
        lines = {method: _ratios(some, method, frame.attrs["target"]) for method in look}
        reached = {method: line[line["held"]] for method, line in lines.items()}
        known = sorted((m for m in look if len(reached[m])), key=lambda m: -reached[m]["times_faster"].iloc[-1])
        shown = [method for method in known if method == PAPER][:1]
        shown += [method for method in known if method != PAPER][: MOST - len(shown)]
        left_out += len(known) - len(shown)
        for method in shown:
            line, drawn = lines[method], look[method]
            band = {"where": line["held"], "color": drawn["color"], "alpha": 0.15, "linewidth": 0}
            axis.fill_between(line.index, line["times_faster_q1"], line["times_faster_q3"], **band)
            spans.add("bars" if len(line) == 1 else "bands")
            if len(line) == 1:  # which has no band
                axis.vlines(line.index, line["times_faster_q1"], line["times_faster_q3"], color=drawn["color"])
            draw_points(axis, line.index, line["times_faster"], line["held"], linewidth=1.3, markersize=4.5, **drawn)
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
        axis.set_xticks(sorted(some["n"].unique())[:: max(1, -(-some["n"].nunique() // 4))])
        axis.set_xticks([], minor=True)
        axis.set_title(workload.title, fontsize=8, loc="left")
        few = some.loc[some["queries"].notna() & (some["queries"] != some["n"]), "queries"].unique()
        of = f"keys (queries: {', '.join(f'{count:,.0f}' for count in few)})" if len(few) else "queries and keys"
        axis.set_xlabel(f"n, {of}", fontsize=8)
        axis.set_ylabel("times faster than the fastest exact", fontsize=8)
        logarithmic_ticks(axis.yaxis)
        last = {m: lines[m].iloc[-1]["times_faster"] for m in shown}
        ends.append([(float(lines[m].index[-1]), float(last[m]), m, look[m]["color"]) for m in shown])
    headline(figure, f"Figure 5: {finding(frame)}")
    label_ends(figure, zip(axes, ends, strict=True))
    more = f"; {counted(left_out, 'slower line')} in the table only" if left_out else ""
    note = f"Methods that reach the target somewhere, at most {MOST} in a panel{more}. "
    note += "Hollow: target missed; dashed: trivial"
    note += f"; {' and '.join(sorted(spans))}: quartiles of the times" if spans else ""
    note += sweep_table.uncounted(frame)
    return sweep_table.save(figure, axes, output_stem, note)


def finding(frame: pd.DataFrame) -> str:
    """Who is fastest at the target, on how many workloads at their longest n, and where a trivial method reaches it."""
    target, workloads = frame.attrs["target"], sweep_table.conditions(frame)
    ratios: list[float] = []
    winners: list[str] = []
    easy = beaten = doubted = 0
    for workload in workloads:
        some = workload.rows(frame)
        some = some[(some["n"] == some["n"].max()) & (some["reached"] == "yes")]
        some = some[(some["target"] - target).abs() < 1e-9].sort_values("times_faster", ascending=False)
        able, trivial = sweep_table.contenders(some), some[some["kind"] == "trivial"].head(1)
        # Beyond the noise, as the documents count
        won = able[able["times_faster_q1"] > 1].head(1)
        ratios += won["times_faster"].tolist()
        winners += won["method"].tolist()
        # Another is faster, but within the noise
        doubted += len(won) and won.index[0] != able.index[0]
        easy += bool(len(trivial))
        beaten += bool((trivial["times_faster"] > max(1.0, won["times_faster"].max())).any())
    words = "no approximate method is faster than the fastest exact one at the longest n"
    if winners:
        best = max(winners, key=winners.count)
        times = " to ".join(dict.fromkeys(short(end(ratios)) for end in (min, max)))
        what, it = "the best approximate method is", "it"
        if doubted:
            what, it = "an approximate method is clearly", "the fastest such"
        words = (
            f"{what} faster than the fastest exact one{_on(len(winners), workloads)} at the "
            f"longest n, {times} times; {it} is {best}{_on(winners.count(best), workloads)}"
        )
    trivially = f"; a trivial method reaches the error too{_on(easy, workloads)}" if easy else ""
    trivially += f", and is faster still{_on(beaten, workloads)}" if beaten else ""
    return f"at an error of {target:g} {sweep_table.of_what(frame)} {words}{trivially}"


def _on(count: int, workloads: Sequence[Any]) -> str:
    """On how many of the workloads; nothing where there is one."""
    return f" on {sweep_table.count_of(count, len(workloads), 'workload')}" if len(workloads) > 1 else ""


def _ratios(some: pd.DataFrame, method: str, target: float) -> pd.DataFrame:
    """The rows of a method with a ratio, by n; `held` says whether its target is reached."""
    line = sweep_table.select(some, method, target).drop_duplicates("n").set_index("n")
    return line[line["times_faster"].notna()].assign(held=line["reached"] == "yes")
