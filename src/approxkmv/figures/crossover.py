"""The length from which each method is faster than the fastest exact one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from approxkmv.figures.style import footnote, headline, new_figure, save
from approxkmv.figures.sweep_table import conditions, contenders, count_of, looks, of_what, read_sweep, select
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


def draw(table: Path, output_stem: Path) -> list[Path]:
    """Write for each workload and method the n from which it is faster than the fastest exact one, as PDF and PNG.

    Extrapolated crossings, which nothing confirms, stand apart, below the measured ones. Only rows that reach the
    target on other inputs count, of methods that reach it at the longest n; a gain there within the quartiles of the
    times is none. Raises TableError when the table is missing or not from a sweep.
    """
    frame = read_sweep(table)
    target, workloads = frame.attrs["target"], conditions(frame)
    kinds = dict(zip(frame["method"], frame["kind"], strict=True))
    able = contenders(frame)
    methods = [method for method in looks(frame) if kinds[method] != "exact"]
    found: dict[tuple[int, int], tuple[float, str]] = {}
    for column, workload in enumerate(workloads):
        some = workload.rows(frame)
        for row, method in enumerate(methods):
            line = select(some, method, target)
            held = line[line["reached"].eq("yes") & line["times_faster"].notna()].drop_duplicates("n")
            line = held[held["kind"].eq("trivial") | held.index.isin(able.index)]
            n, how = crossover(*line[["n", "times_faster"]].to_numpy(np.float64).T)
            last = line[line["n"] == some["n"].max()]
            if last.empty:
                how = "every pair" if (held["n"] == some["n"].max()).any() else "missed"
            elif how in ("measured", "below") and not (last["times_faster_q1"] > 1).any():
                how = "as fast"
            found[row, column] = n, how
    rows = {"measured": list(range(len(methods)))}
    if extrapolated := sorted({row for (row, _), (_, how) in found.items() if how == "extrapolated"}):
        rows["extrapolated"] = extrapolated
    lines = sum(map(len, rows.values()))
    figure = new_figure(max(6.0, 2.0 + 0.95 * len(workloads)), 2.2 + 0.24 * lines + 0.3 * len(rows))
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=list(map(len, rows.values())))
    for axes, (side, shown) in zip(panels.ravel(), rows.items(), strict=True):
        for (row, column), (n, how) in found.items():
            if how == "extrapolated" or side == "measured":
                words = _words(n, how) if how != "extrapolated" or side == how else "not yet"
                axes.text(column, shown.index(row), words, ha="center", va="center", fontsize=7)
            if how in ("measured", "below") and side == "measured":
                cell: dict[str, Any] = {"facecolor": "#DCEBF5", "edgecolor": "#0072B2", "linewidth": 0.8}
                axes.add_patch(Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, zorder=0, **cell))
        axes.set_xlim(-0.5, len(workloads) - 0.5)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_yticks(range(len(shown)), [methods[row] for row in shown], fontsize=7.5)
        axes.set_xticks(range(len(workloads)), [workload.workload for workload in workloads], fontsize=7.5)
        axes.tick_params(length=0)
        # Rows are far from their names.
        for row in range(1, len(shown)):
            axes.axhline(row - 0.5, color="0.9", linewidth=0.6, zorder=0)
        axes.set_title(_TITLES[side], fontsize=8, loc="left")
        axes.set_ylabel("method", fontsize=8)
        for spine in axes.spines.values():
            spine.set_visible(False)
    panels[-1, 0].set_xlabel("workload", fontsize=8)
    approximate = [row for row, method in enumerate(methods) if kinds[method] == "approximate"]
    crossed = {
        row: sum(found[row, c][1] in ("measured", "below") for c in range(len(workloads))) for row in approximate
    }
    most = max(crossed.values(), default=0)
    best = [methods[row] for row in approximate if crossed[row] == most]
    finding = "no approximate method becomes faster than exact attention"
    if most:
        where = count_of(most, len(workloads), "workload")
        who = f"{' and '.join(best)} become{'s' if len(best) == 1 else ''}"
        if len(best) > 2:
            of = "all" if len(best) == len(approximate) else f"{len(best)} of"
            who = f"{of} {len(approximate)} approximate methods become"
        finding = f"{who} faster than exact attention on {where}"
        finding += ", no other approximate method on as many" if len(best) < len(approximate) else ""
    texts = [text for axes in panels.ravel() for text in axes.texts]
    headline(figure, f"At an error of {target:g} {of_what(frame)}, with n up to {int(frame['n'].max()):,}, {finding}")
    notes = [words for word, words in _NOTES.items() if any(text.get_text().startswith(word) for text in texts)]
    notes += sorted({workload.title.partition(", ")[2] for workload in workloads})
    footnote(figure, "; ".join(notes))
    return save(figure, output_stem)


_TITLES = {
    "measured": "faster than the fastest exact method from n =",
    "extrapolated": "extrapolated from the last lengths that reach the error, not measured",
}
_NOTES = {
    "≤": "≤: faster at every n that reaches the error",
    "as fast": "as fast: within the quartiles of the times",
    "slower": "slower: at the longest n",
    "not yet": "not yet: slower, but catching up",
    "missed": "missed: the error, at the longest n",
    "every pair": "every pair: reached by computing every score",
}


def _words(n: float, how: str) -> str:
    if how in ("never", "missed", "every pair", "as fast"):
        return "slower" if how == "never" else how
    if how == "extrapolated":
        return f"{float(f'{n:.2g}'):,.0f}"
    return f"{'≤ ' if how == 'below' else ''}{n:,.0f}"
