"""The tables and sentences of docs/methods.md and README.md about speed, from the sweeps in results/reference/."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
from reference import ELSEWHERE, REFERENCE, machine, markdown, number
from scipy.special import stdtrit

from approxkmv.attention.blocks.chunks import chunk_length
from approxkmv.figures.crossover import crossover
from approxkmv.figures.sweep_table import contenders, of_what, read_sweep
from approxkmv.files import read_json
from approxkmv.statistics.growth import PAPER_BOUND
from approxkmv.sweep.exponents import fit_exponent

# The studies of docs/methods.md, in its order, and what is asked of each.
ASKED = {
    "rows": "every method, one value column",
    "long": "one value column",
    "columns": "all value columns of a head",
    "columns-long": "all value columns; of heads, rotary positions scaled beyond the trained length",
    "causal": "all value columns, with the mask of a language model",
    "causal-long": "all value columns, with that mask; of heads, rotary positions scaled beyond the trained length",
    "few": "the last queries only",
}
# `causal` once more, on another kind of text and in another model: whose heads, on what.
OTHERS = {
    "causal-articles": "SmolLM2, paragraphs of SQuAD, tuned on a novel",
    "causal-gemma": "Gemma 3, a novel",
}
# A cell is counted once, in whichever study comes first.
CELL = ["workload", "n", "batch", "columns", "mask", "target"]
_NOT_YET = "Not measured yet: `snakemake --cores all --config study={}`.\n"


@cache
def _sweep(study: str, relative_to: str | None = None) -> pd.DataFrame | None:
    """The reference table of a study, with its ratios; None where there is none."""
    path = REFERENCE / study / "tables" / "sweep.csv"
    return read_sweep(path, relative_to).assign(study=study) if path.exists() else None


def _studies() -> dict[str, pd.DataFrame]:
    return {study: table for study in ASKED if (table := _sweep(study)) is not None}


def _record(study: str) -> Any:
    return json.loads((REFERENCE / study / "tables" / "sweep.json").read_text(encoding="utf-8"))


def _where(study: str) -> str:
    return f"{_clocked(_record(study))} on {machine(REFERENCE / study / 'tables' / 'sweep.json')}"


def _about(study: str, where: str = "", table: pd.DataFrame | None = None) -> str:
    """How a study was run, and where, as `_where` says; the sentence under each of its tables."""
    asked = ASKED | OTHERS
    record, table = _record(study), _sweep(study) if table is None else table
    assert table is not None
    shared = "; * inputs shared with tuning" if table["tuning_inputs"].eq("shared").any() else ""
    return (
        f"`{study}` ({asked.get(study, 'batches of 8')}): errors {of_what(table)}; {where}{'; ' if where else ''}"
        f"the sweep alone took {record['seconds'] / 60:.1f} minutes{shared}{_one_input(record, table)}."
    )


def _clocked(record: Any) -> str:
    threads = "one thread" if record["settings"]["threads"] == 1 else "all threads"
    return f"{threads}, {'its processor' if record['settings']['clock'] == 'cpu' else 'wall'} time,"


def _one_input(record: Any, table: pd.DataFrame) -> str:
    """Says so where a capture is no longer than the longest n: all seeds then see one input of each head."""
    capture = record["settings"].get("capture") or {}
    longest = table.loc[table["workload"].str.startswith("model-qk"), "n"].max()
    return f"; of heads at n = {longest:,} one input" if capture.get("tokens") == longest else ""


def _everywhere() -> str:
    """The machine and the clock of all these studies."""
    said = dict.fromkeys(f"{_clocked(_record(study))} on {_on(study)}" for study in _studies())
    return f"Times: {'; '.join(said)}."


def _named(workload: str) -> str:
    return workload.replace("model-qk-", "head ").replace("-causal", ", causal").replace("-q", ", queries: ")


def _raced(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that could win: of `contenders`, within the target, with an exact row to beat."""
    able = contenders(table)
    return able[able["times_faster"].notna() & able["reached"].eq("yes")]


def _won(table: pd.DataFrame) -> pd.DataFrame:
    """Those that are faster than exact attention beyond the noise: by the first quartile of the gain too."""
    raced = _raced(table)
    return raced[raced["times_faster_q1"] > 1]


def _apart(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with a target whose inputs are not those of tuning: what is counted."""
    return table[table["target"].notna() & table["tuning_inputs"].eq("apart")]


def _mark(row: Any) -> str:
    return "*" if row["tuning_inputs"] == "shared" else ""


def _trivial(rows: pd.DataFrame) -> bool:
    """Whether a trivial method reaches the target of these rows, of one cell, which then says little about others.

    Where the study leaves `uniform` out, what that reaches at the longest n of another study counts.
    """
    reached = rows["kind"].eq("trivial") & rows["reached"].eq("yes")
    if reached.any() or rows["method"].eq("uniform").any():
        return bool(reached.any())
    every = pd.concat(_studies().values(), ignore_index=True)
    same = [name for name in CELL if name != "n"]
    found = every[every["method"].eq("uniform") & every[same].eq(rows.iloc[0][same]).all(axis=1)]
    return bool(found[found["n"] == found["n"].max()]["reached"].eq("yes").any())


def _winner(rows: pd.DataFrame) -> str:
    """The fastest method of one cell and its gain with quartiles, or the exact row that none beats."""
    fastest = _won(rows)
    if fastest.empty:
        names = rows["fastest_exact"].dropna()
        return (names.iloc[0] if len(names) else "–") + " †" * _trivial(rows)
    row = fastest.loc[fastest["times_faster"].idxmax()]
    return (
        f"**{row['method']}** {row['times_faster']:.1f} "
        f"({row['times_faster_q1']:.1f} to {row['times_faster_q3']:.1f}) against {row['fastest_exact']}, "
        f"{_in_the_other(row)}{' †' * _trivial(rows)}"
    )


def _in_the_other(row: Any) -> str:
    """The speed relative to the fastest exact row of the precision that the winner is not compared with."""
    other = "float32" if str(row["fastest_exact"]).endswith("-bf16") else "bfloat16"
    return f"{row[f'times_faster_{other}']:.1f} against {other}"


def winners() -> str:
    """Who wins where: a row per workload at its longest n, a column per target."""
    parts = []
    # Said once, if it is the same for all
    places = list(dict.fromkeys(_where(study) for study in _studies()))
    for study in ASKED:
        table = _sweep(study)
        if table is None:
            elsewhere = _sweep(f"{ELSEWHERE}/{study}") is not None
            parts.append(f"`{study}` was measured with AMX only.\n" if elsewhere else _NOT_YET.format(study))
            continue
        about = _about(study, _where(study) if len(places) > 1 else "")
        parts.append(f"{markdown(pd.DataFrame(_lines_of_winners(table)))}\n\n{about}\n")
    return "\n".join([*parts, *(f"Times: {place}.\n" for place in places if len(places) == 1)])


def others() -> str:
    """Who wins on another kind of text and in another model, and how many settings keep their error there."""
    parts = []
    for study in OTHERS:
        if (table := _sweep(study)) is None:
            parts.append(_NOT_YET.format(study))
            continue
        parts.append(
            f"{markdown(pd.DataFrame(_lines_of_winners(table)))}\n\n{_about(study, _where(study))} "
            f"Kept: {' and '.join(map(_kept, _tuned(table)))}.\n"
        )
    if _sweep("causal") is not None:
        kept = " and ".join(map(_kept, _tuned(_longest_heads("causal"))))
        parts.append(f"In `causal` at its longest n: {kept}. Settings that compute every pair are left out.\n")
    return "\n".join(parts)


def _tuned(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The settings that tuning accepts and that leave pairs out, and in each cell the fastest of them.

    The latter, where it beats exact attention, is what a user takes, who knows no more than tuning does.
    """
    tuned = contenders(table[table["status"].eq("ok")])
    faster = tuned[tuned["times_faster"].gt(1)]
    return tuned, faster.loc[faster.groupby(CELL, dropna=False)["times_faster"].idxmax()]


def _kept(rows: pd.DataFrame) -> str:
    """How many settings reach their error on other inputs."""
    return f"{rows['reached'].eq('yes').sum()} of {len(rows)}"


def _longest_heads(study: str) -> pd.DataFrame:
    """The rows of a study's heads at its longest n."""
    table = _sweep(study)
    assert table is not None
    return table[table["workload"].str.startswith("model-qk") & (table["n"] == table["n"].max())]


def _lines_of_winners(table: pd.DataFrame) -> list[dict[str, str]]:
    """A row per workload at its longest n, with the winner at each target."""
    error = table.attrs["error"]
    targets = sorted(table["target"].dropna().unique(), reverse=True)
    longest = table[table["n"] == table.groupby("workload")["n"].transform("max")]
    lines = []
    for (workload, n), rows in longest.groupby(["workload", "n"], sort=False):
        mean = rows[f"mean_{error}"].dropna() if f"mean_{error}" in rows else []
        line = {"workload": _named(workload) + _mark(rows.iloc[0]), "n": f"{n:,}"}
        line["mean errs"] = f"{mean.iloc[0]:.2f}" if len(mean) else "–"
        lines.append(line | {f"at {target:g}": _winner(rows[rows["target"] == target]) for target in targets})
    return lines


def elsewhere() -> str:
    """The exact row that counts and the fastest method at the middle error, here and on the other machine."""
    lines = []
    for study in ASKED:
        here, there = _sweep(study), _sweep(f"{ELSEWHERE}/{study}")
        if there is None:
            continue
        target = sorted(there["target"].dropna().unique(), reverse=True)[1]
        longest = there[there["n"] == there.groupby("workload")["n"].transform("max")]
        for (workload, n), rows in longest.groupby(["workload", "n"], sort=False):
            line = {"workload": f"{_named(workload)} ({study})", "n": f"{n:,}"}
            for name, side in (("", here), ("AMX: ", rows)):
                line |= {f"{name}exact": "–", f"{name}fastest at {target:g}": "–"}
                if side is None:
                    continue
                asked = side[side["workload"].eq(workload) & side["n"].eq(n) & side["target"].eq(target)]
                # The denominator: the fastest whose own error is small enough
                fast = asked["fastest_exact"].dropna().iloc[0]
                same = side["workload"].eq(workload) & side["n"].eq(n) & side["method"].eq(fast)
                seconds = side.loc[same, "seconds"].iloc[0]
                line[f"{name}exact"] = f"{number(1000 * seconds)} ms, `{fast}`"
                line[f"{name}fastest at {target:g}"] = _winner(asked)
            lines.append(line)
    about = f"First {_on(next(iter(ASKED)))}, then (AMX) {_on(f'{ELSEWHERE}/columns')}; one thread, its processor time."
    return f"{markdown(pd.DataFrame(lines))}\n\n{about}\n"


def of_the_values() -> str:
    """Who wins at errors of |v|, the paper's measure, with one value column: as `winners`, of the study `long`."""
    table = _sweep("long", "values")
    assert table is not None
    return f"{markdown(pd.DataFrame(_lines_of_winners(table)))}\n\n{_about('long', _where('long'), table)}\n"


def passing() -> str:
    """At which n each method passes the fastest exact row, at the loosest target that every study has."""
    lines = []
    for study in ("long", "columns", "causal"):
        table = _sweep(study)
        if table is None:
            lines.append({"study": study, "workload": "not measured yet"})
            continue
        target = 0.1
        for workload, rows in table.groupby("workload", sort=False):
            line: dict[str, Any] = {"study": study, "workload": _named(workload)}
            for method in ("approxkmv", "local-expansion", "window", "hyperattention", "approxkmv-paper", "balancekv"):
                mine = rows[(rows["method"] == method) & (rows["target"] == target)]
                line[method] = "" if mine.empty else _passes(mine, rows["n"].min())
            lines.append(line)
    return (
        f"{markdown(pd.DataFrame(lines).fillna(''))}\n\nAt error 0.1, the n from which a method is faster. ≤ n: at the "
        "shortest n already. > n: not clearly at the longest. –: at the longest n it does not reach the error by the "
        "rules above, or computes every pair. Empty: not in the study. "
        f"{_everywhere()}\n"
    )


def _passes(rows: pd.DataFrame, shortest: int) -> str:
    longest = rows["n"].max()
    rows = _raced(rows).sort_values("n")
    if rows.empty or rows["n"].iloc[-1] < longest:
        return "–"
    n, how = crossover(*rows[["n", "times_faster"]].to_numpy(np.float64).T)
    mark = "*" if rows["tuning_inputs"].eq("shared").any() else ""
    if how not in ("below", "measured") or rows["times_faster_q1"].iloc[-1] <= 1:
        return f"> {longest:,}{mark}"
    # Between two lengths no more than two digits are known.
    n = n if how == "below" else float(f"{n:.2g}")
    return f"{'≤ ' if how == 'below' and n == shortest else ''}{n:,.0f}{mark}"


def costs() -> str:
    """What an answer costs: exact attention in either precision, and the fastest method at the middle target."""
    lines = []
    for study in ("long", "columns", "columns-long", "causal", "causal-long"):
        table = _sweep(study)
        if table is None:
            # What the other machine ran stands in its own table.
            if _sweep(f"{ELSEWHERE}/{study}") is None:
                lines.append({"workload": f"study {study}", "n": "not measured yet"})
            continue
        longest = table[table["n"] == table.groupby("workload")["n"].transform("max")]
        target = sorted(table["target"].dropna().unique(), reverse=True)[1]
        for (workload, n), rows in longest.groupby(["workload", "n"], sort=False):
            exact = rows[rows["kind"] == "exact"].dropna(subset="seconds")
            half = exact["method"].str.endswith("-bf16")
            won = _won(rows[rows["target"] == target])
            best = won.loc[won["times_faster"].idxmax()] if len(won) else None
            lines.append(
                {
                    "workload": f"{_named(workload)}{_mark(rows.iloc[0])} ({study})",
                    "n": f"{n:,}",
                    "exact, float32": _milliseconds(exact[~half], table.attrs["error"]),
                    "exact, bfloat16": _milliseconds(exact[half], table.attrs["error"]),
                    f"fastest at {target:g}": "–" if best is None else best["method"],
                    "ms": "–" if best is None else _quartiles(best),
                    "error, of the answer": "–" if best is None else f"{best['error_exact_p95']:.3f}",
                    "of the values": "–" if best is None else f"{best['error_v_p95']:.3f}",
                }
            )
    return (
        f"{markdown(pd.DataFrame(lines).fillna(''))}\n\nMedians with quartiles, the exact rows with their own error in "
        "brackets; –: no method wins; errors are 95th percentiles over seeds and over inputs, where there is more than "
        f"one. {_everywhere()}\n"
    )


def _quartiles(row: Any) -> str:
    low, middle, high = (1000 * row[name] for name in ("seconds_q1", "seconds", "seconds_q3"))
    return f"{number(middle)} ({number(low)} to {number(high)})"


def _milliseconds(exact: pd.DataFrame, error: str) -> str:
    if exact.empty:
        return "–"
    row = exact.loc[exact["seconds"].idxmin()]
    return f"{number(1000 * row['seconds'])} ms [{row[f'{error}_p95']:.1g}]"


def rising() -> str:
    """Slope of log times_faster on log n at error 0.1, with the 95 % interval of a line through so few points."""
    lines = []
    for study in ("long", "columns", "causal"):
        table = _sweep(study)
        if table is None:
            lines.append({"study": study, "workload": "not measured yet"})
            continue
        raced = _raced(table[table["target"] == 0.1])
        for (workload, method), rows in raced.groupby(["workload", "method"], sort=False):
            rows = rows.sort_values("n")
            slope, error = fit_exponent(rows["n"].tolist(), rows["times_faster"].tolist())
            if slope is None or error is None:
                continue
            half = float(stdtrit(len(rows) - 2, 0.975)) * error
            lines.append(
                {
                    "study": study,
                    "workload": _named(workload),
                    "method": method,
                    "n": " to ".join(f"{rows['n'].iloc[i]:,}" for i in (0, -1)),
                    "slope": f"{slope:+.2f}",
                    "95 % interval": f"{slope - half:+.2f} to {slope + half:+.2f}",
                    "rises": "yes" if slope - half > 0 else "no" if slope + half < 0 else "undecided",
                }
            )
    return f"{markdown(pd.DataFrame(lines).fillna(''))}\n\nTimes as above.\n"


def counts() -> str:
    """In how many distinct cells each method reaches the error, beats exact attention, and is the first of all."""
    table = _apart(pd.concat(_studies().values(), ignore_index=True)).drop_duplicates([*CELL, "method"])
    raced = _raced(table)
    won = _won(table)
    first = won.loc[won.groupby(CELL, dropna=False)["times_faster"].idxmax()]
    lines = []
    for method, rows in table.groupby("method", sort=False):
        trivial = rows["kind"].iloc[0] == "trivial"
        reached = rows[rows["reached"] == "yes"]
        mine = reached if trivial else raced[raced["method"] == method]
        gain = mine["times_faster"].max()
        lines.append(
            {
                "method": method,
                "cells": len(rows),
                "error reached": len(reached),
                "faster than exact": int((mine["times_faster_q1"] > 1).sum()),
                "than exact in float32": int((mine["times_faster_float32"] > 1).sum()),
                "the fastest, and faster": int((first["method"] == method).sum()),
                "largest gain": "–" if mine.empty else f"{gain:.1f}" if gain >= 0.05 else "< 0.05",
            }
        )
    return (
        f"{markdown(pd.DataFrame(lines))}\n\nCells whose inputs tuning has not seen. Faster than exact: beyond the "
        "quartiles of the times; than exact in float32: by medians. Largest gain: also where a trivial method reaches "
        f"the error. {_everywhere()}\n"
    )


def figure5() -> str:
    """The paper's Figure 5 at error 0.1 of |v|: speed relative to the matrix stored, and to each precision."""
    table = _sweep("figure5")
    assert table is not None
    naive = table[table["method"] == "exact-naive"].set_index("n")["seconds"]
    lines = []
    for method, rows in table[table["kind"] != "exact"].groupby("method", sort=False):
        line = {"method": method}
        for _, row in rows.dropna(subset="seconds").iterrows():
            ratios = [naive[row["n"]] / row["seconds"], row["times_faster_float32"], row["times_faster_bfloat16"]]
            cells = " / ".join(f"{ratio:.1f}" if np.isfinite(ratio) else "–" for ratio in ratios)
            line[f"n = {row['n']:,}"] = (cells if row["reached"] == "yes" else f"missed ({cells})") + _mark(row)
        lines.append(line)
    return (
        f"{markdown(pd.DataFrame(lines).fillna('–'))}\n\nError at most 0.1 |v|. Speed relative to "
        f"`exact-naive` / the fastest exact row in float32 / in bfloat16. {_about('figure5', _where('figure5'))}\n"
    )


def perplexity() -> str:
    """Perplexity with a method in place of a model's attention, and the attention's seconds: median and quartiles."""
    path = REFERENCE / "perplexity" / "tables" / "perplexity.csv"
    table = pd.read_csv(path)
    lines = []
    for tokens, rows in table.groupby("tokens"):
        first = rows.iloc[0]
        lines.append({"tokens": f"{tokens:,}", "method": "the model's own", "settings": ""})
        lines[-1] |= {"perplexity": f"{first['exact_perplexity']:.2f}"}
        lines[-1] |= {"pass, s": _seconds(first, "exact_"), "attention, s": _seconds(first, "exact_attention_")}
        for _, row in rows.iterrows():
            given = json.loads(row["parameters"])
            chosen = ("window", "sinks", "block", "near", "directions", "top", "samples", "exact_below")
            settings = ", ".join(f"{name} {given[name]:,}" for name in chosen if name in given)
            if row["method"] == "plan":
                settings = ", ".join(f"{name} {number}" for name, number in given["heads"].items())
            exact = tokens <= _all_pairs(row["method"], given, tokens)
            lines.append({"tokens": "", "method": row["method"] + " ‡" * exact, "settings": settings})
            lines[-1] |= {"perplexity": f"{row['perplexity']:.2f}", "pass, s": _seconds(row)}
            lines[-1] |= {"attention, s": _seconds(row, "attention_")}
            lines[-1] |= {"recomputed": f"{100 * share:.2g} %" if (share := row["recomputed_share"]) else ""}
    about = machine(path.with_suffix(".json"))
    said = f"On {about.split(', Python')[0]}: {_plan_wins(table)}"
    there = REFERENCE / ELSEWHERE / "perplexity" / "tables" / "perplexity.csv"
    if there.exists():
        place = machine(there.with_suffix(".json")).split(", Python")[0]
        said += f"\n\nOn {place}: {_plan_wins(pd.read_csv(there))}"
    return (
        f"{said}\n\n{markdown(pd.DataFrame(lines).fillna(''))}\n\nSeconds of a pass and of the attention in it: "
        f"median and quartiles of {table['repeats'].iloc[0]:.0f} interleaved passes; of a plan, how many heads each "
        "method computes; recomputed: rows that were made again exactly; ‡: exact at this length. Wall time, all "
        f"threads of {about}.\n"
    )


def _all_pairs(method: str, given: dict[str, Any], tokens: int) -> int:
    """The length up to which a causal method computes every pair."""
    if method in ("local-expansion", "approxkmv"):
        return chunk_length(tokens, given["near"])
    return 2 * given["window"] if method == "window" else given.get("exact_below", 0)


def _seconds(row: Any, prefix: str = "") -> str:
    """Median and quartiles, such as "4.31 (4.22–4.52)"."""
    median, first, third = (f"{row[f'{prefix}seconds{end}']:.3g}" for end in ("", "_q1", "_q3"))
    return f"{median} ({first}–{third})"


def _plan_wins(table: pd.DataFrame) -> str:
    """What is fastest end to end at the longest text with a perplexity within 1 % of the model's own, and the plan."""
    longest = table[table["tokens"] == table["tokens"].max()]
    planned = longest["method"] == "plan"
    rows = longest[~planned & ((longest["ratio"] - 1).abs() <= 0.01)]
    best, exact = (some.loc[some["seconds"].idxmin()] for some in (rows, rows[rows["method"].str.startswith("exact")]))
    text = (
        f"at {best['tokens']:,} tokens the fastest whole pass of one method with a perplexity within 1 % of the "
        f"model's own is that of `{best['method']}`, {_seconds(best)} s."
    )
    for _, plan in longest[planned].iterrows():
        asked = json.loads(plan["parameters"])
        names, total = sorted(asked["heads"]), sum(asked["heads"].values())
        text += f" On another excerpt of {asked['tokens']:,} tokens `plan` found"
        if all(name.startswith("exact") for name in names):
            text += (
                f" exact attention to be the best choice for every one of {total} heads (`{'`, `'.join(names)}`): no "
                f"method wins within an error of {asked['target']:g} there, and the plan's pass "
                f"({_seconds(plan)} s) is exact attention again."
            )
        else:
            faster = total - sum(asked["heads"][name] for name in names if name.startswith("exact"))
            text += (
                f" a faster method for {faster} of {total} heads; with it a pass takes {_seconds(plan)} s, at "
                f"{exact['seconds'] / plan['seconds']:.2f} times the speed of `{exact['method']}` and "
                f"{plan['ratio']:.3f} times the model's own perplexity."
            )
    return text


def _count(table: pd.DataFrame) -> tuple[int, int, int]:
    """Distinct cells, in how many a method that reaches the error beats exact attention, in how many of those † too."""
    cells = [rows for _, rows in _apart(table).groupby(CELL, dropna=False)]
    won = [rows for rows in cells if len(_won(rows))]
    return len(cells), len(won), sum(map(_trivial, won))


def _largest(table: pd.DataFrame) -> Any:
    """The largest gain on inputs other than those of tuning where no trivial method reaches the target, or None."""
    cells = [(_won(rows), rows) for _, rows in _apart(table).groupby(CELL, dropna=False)]
    raced = pd.concat([table[:0], *(won for won, rows in cells if len(won) and not _trivial(rows))])
    least = raced[["times_faster", "times_faster_bfloat16"]].min(axis=1)
    return raced.loc[least.idxmax()] if least.max() > 1 else None


def _gain(row: Any) -> dict[str, str]:
    """One measured gain with its denominators, error and inputs."""
    return {
        "largest gain": f"`{row['method']}`",
        "over bfloat16": f"{row['times_faster_bfloat16']:.1f}",
        "over float32": f"{row['times_faster_float32']:.1f}",
        "where": f"{_named(row['workload'])}, n = {row['n']:,}, error {row['target']:g}",
    }


def _on(study: str) -> str:
    return machine(REFERENCE / study / "tables" / "sweep.json").split(", Python")[0]


def answer() -> str:
    """What a practitioner should do, as far as the reference sweeps say."""
    studies = _studies()
    places = {"rows": "one value column, few keys", "long": "one value column, more keys"}
    places |= {"columns": "all value columns", "columns-long": "all value columns, 32,768 keys"}
    places |= {"causal": "all columns, mask of a language model"}
    places |= {"causal-long": "that mask, 32,768 keys", "few": "few queries"}
    one, seen = next(iter(studies)), pd.DataFrame()
    said = [f"Errors {of_what(studies[one])}; each cell (workload, n and error) counts once. One thread of {_on(one)}."]
    if (causal := studies.get("causal")) is not None:
        at, found = _in_a_model(causal)
        said.insert(
            0,
            f"**In SmolLM2 with its mask, on a novel, {at}, the fastest is {found}.** `approxkmv plan` finds which for "
            f"each head. The same on each text and machine (one thread):\n\n{markdown(_in_models())}\n\n",
        )
    lines = []
    for study, table in studies.items():
        known = seen[CELL].drop_duplicates() if len(seen) else table[:0][CELL]
        new = table.merge(known, how="left", on=CELL, indicator="known")["known"].eq("left_only").to_numpy()
        seen = pd.concat([seen, table])
        asked, won, trivially = _count(table[new])
        best = _largest(table)
        line = {"with": places[study], "cells": str(asked), "won": str(won), "of these †": str(trivially)}
        lines.append(line | ({} if best is None else _gain(best)))
    said.append(f"\n\n{markdown(pd.DataFrame(lines).fillna('–'))}\n\n")
    said.append(
        "Heads 0 to 4 of SmolLM2-135M-Instruct are diffuse to sharp. Won: some method is faster than exact attention; "
        "†: a trivial method reaches the error too. Gains: over the fastest exact method in each precision, in cells "
        "without †."
    )
    missing = [study for study in places if study not in studies and _sweep(f"{ELSEWHERE}/{study}") is None]
    if missing:
        said.append(f" Not measured yet: {'; '.join(places[study] for study in missing)}.")
    return f"{''.join(said)}\n"


def _in_models() -> pd.DataFrame:
    """The fastest methods in language models with their masks, of each study and machine that has been measured."""
    lines = []
    for study, what in {"causal": "SmolLM2, a novel", **OTHERS}.items():
        for place in (study, f"{ELSEWHERE}/{study}"):
            if (table := _sweep(place)) is not None:
                lacks = f" ({found})" if place != study and (found := _untimed(table, study)) else ""
                line = {"model, text": what, "study": f"`{study}`", "machine": f"{_on(place)}{lacks}"}
                lines.append(line | {"fastest": _in_a_model(table)[1]})
    return pd.DataFrame(lines)


def _in_a_model(table: pd.DataFrame) -> tuple[str, str]:
    """Length and error, and which method is the fastest in a language model on how many heads, and by how much."""
    heads, _, gains = _of_heads(table)
    total = heads["workload"].nunique()
    easy = sum(_trivial(rows) for _, rows in heads.groupby("workload"))
    exact = total - easy - sum(map(len, gains.values()))
    at = f"at {heads['n'].max():,} keys and an error of {heads['target'].max():g} {of_what(table)}"
    if not gains:
        return at, f"exact attention on {exact} of {total} heads"
    parts = [f"`{name}` on {len(some)} of {total} heads ({_range(some)} times)" for name, some in gains.items()]
    parts += [f"exact attention on {exact}"] if exact else []
    more = f"; on {easy} a trivial method reaches the error too" if easy else ""
    return at, f"{_listed(parts)}{more}"


def _range(gains: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{end(gains):.1f}" for end in (min, max)))


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def claim() -> str:
    """Speed in a model, with denominator, precision, error and machine: of all heads, not the best."""
    lines, targets, untimed = [], set(), []
    for place in ("", f"{ELSEWHERE}/"):
        for study in ("columns", "columns-long", "causal", "causal-long", *OTHERS):
            if (table := _sweep(place + study)) is None:
                continue
            heads, exact, gains = _of_heads(table)
            targets.add(f"{heads['target'].max():g} {of_what(table)}")
            untimed += [f" On {_on(place + study)} {found}."] if place and (found := _untimed(table, study)) else []
            times = [time for some in gains.values() for time in some]
            names = sorted(gains, key=lambda name: -len(gains[name]))
            lines.append(
                {
                    "one thread of": _on(place + study),
                    "model, text": OTHERS.get(study, "SmolLM2, a novel"),
                    "mask": "causal" if study.startswith("causal") else "none",
                    "keys": f"{heads['n'].max():,}",
                    "heads won": _heads_won(heads, gains),
                    "by": ", ".join(f"`{name}` {len(gains[name])}" for name in names) or "–",
                    "times faster": _range(times) if times else "–",
                    "than": ", ".join(f"`{name}`" for name in sorted(exact)),
                }
            )
    return (
        f"{markdown(pd.DataFrame(lines))}\n\nA few heads, from diffuse (weight on many keys) to sharp (on few), each "
        "on one text. Won: the fastest method within the error is faster than the fastest exact attention, beyond the "
        f"quartiles of both times, and no trivial method is within it. Error: {' or '.join(sorted(targets))} (95th "
        "percentile over seeds). All value columns of a head, with rotary positions of SmolLM2 scaled beyond 8,192 "
        f"tokens; without the mask this is not what the model computes.{''.join(untimed[:1])}\n"
    )


def _heads_won(heads: pd.DataFrame, gains: dict[str, list[float]]) -> str:
    return f"{sum(map(len, gains.values()))} of {heads['workload'].nunique()}"


def _spread(studies: list[str]) -> float:
    """What the middle half of a row's times spans, in per cent of their median: the median over these sweeps' rows."""
    tables = [table for study in studies if (table := _sweep(study)) is not None]
    rows = pd.concat(tables, ignore_index=True).dropna(subset="seconds")
    return float(100 * ((rows["seconds_q3"] - rows["seconds_q1"]) / rows["seconds"]).median())


def _noise() -> str:
    """How noisy the machine with AMX was, beside the other, in the sweeps that both ran."""
    both = [
        study for study in (*ASKED, *OTHERS) if _sweep(study) is not None and _sweep(f"{ELSEWHERE}/{study}") is not None
    ]
    here, there = _spread(both), _spread([f"{ELSEWHERE}/{study}" for study in both])
    return f"{there:.0f} % of their median there, {here:.0f} % without AMX (medians over rows)"


def _again() -> str:
    """What a second run on the machine with AMX won, beside the first."""
    said = []
    for study in ("columns", "causal"):
        won = []
        for place in (f"{ELSEWHERE}-again/{study}", f"{ELSEWHERE}/{study}"):
            table = _sweep(place)
            assert table is not None
            heads, _, gains = _of_heads(table)
            won.append(_heads_won(heads, gains))
        said.append(f"{won[0]} heads of `{study}` (the first: {won[1]})")
    return " and ".join(said)


def _untimed(table: pd.DataFrame, study: str) -> str:
    """Which exact methods of the reference (of `columns`, if it lacks the study) a table of the other machine lacks."""
    here = _sweep(study) if _sweep(study) is not None else _sweep("columns")
    assert here is not None
    known = here.loc[here["kind"].eq("exact"), "method"].unique()
    return ", ".join(f"`{name}` was not timed" for name in known if not table["method"].eq(name).any())


def _of_heads(table: pd.DataFrame) -> tuple[pd.DataFrame, set[str], dict[str, list[float]]]:
    """Rows at the longest n and the middle error, their fastest exact methods, and by winner the gains of heads."""
    asked = table[table["target"].notna()]
    of_models = asked["workload"].str.startswith("model-qk")
    heads = asked[of_models] if of_models.any() else asked
    targets = sorted(heads["target"].unique())
    heads = heads[(heads["n"] == heads["n"].max()) & (heads["target"] == targets[(len(targets) - 1) // 2])]
    gains: dict[str, list[float]] = {}
    for _, rows in heads.groupby("workload"):
        won = _won(rows)
        if len(won) and not _trivial(rows):
            best = won.loc[won["times_faster"].idxmax()]
            gains.setdefault(best["method"], []).append(best["times_faster"])
    return heads, set(heads["fastest_exact"].dropna()), gains


def against_paper() -> str:
    """Speed of approxkmv relative to approxkmv-paper, in the cells where both reach the error."""
    table = _apart(pd.concat(_studies().values(), ignore_index=True))
    # Without rows that compute every pair
    table = contenders(table)
    table = table[table["reached"].eq("yes")].drop_duplicates([*CELL, "method"])
    ours, paper = (
        table[table["method"] == name].set_index(CELL)["seconds"] for name in ("approxkmv", "approxkmv-paper")
    )
    times = (paper / ours).dropna()
    lines = [
        {
            "n": f"{n:,}",
            "cells that both reach": len(some),
            "approxkmv is faster: lowest": f"{some.min():.1f} times",
            "median": f"{some.median():.1f} times",
            "at least twice as fast": int((some >= 2).sum()),
        }
        for n, some in times.groupby(level="n")
    ]
    return (
        f"{markdown(pd.DataFrame(lines))}\n\n{_cost_of_no_bias()}Without rows that compute every pair; by the medians "
        f"of the times. {_everywhere()}\n"
    )


def _cost_of_no_bias() -> str:
    """How much longer the unbiased method takes than the biased one, with all columns of heads at the longest n."""
    table = _sweep("columns")
    assert table is not None
    rows = table[table["reached"].eq("yes") & table["n"].eq(table["n"].max())]
    keys = ["workload", "target"]
    ours, other = (rows[rows["method"] == name].set_index(keys)["seconds"] for name in ("approxkmv", "local-expansion"))
    times = (ours / other).dropna()
    if times.empty:
        return ""
    return (
        f"`approxkmv`, whose sums are unbiased, takes {times.min():.1f} to {times.max():.1f} times as long as "
        f"`local-expansion` (median {times.median():.1f}; the {len(times)} cells of `columns` at {rows['n'].max():,} "
        "keys that both reach). "
    )


def evaluations() -> str:
    """Exponents of kernel evaluations in n, per method: the range over workloads and errors."""
    table = pd.read_csv(REFERENCE / "long" / "tables" / "sweep_exponents.csv")
    lines = []
    for method, rows in table.groupby("method", sort=False):
        e = rows["evaluation_exponent"].dropna()
        if e.empty:
            continue
        below = rows["evaluation_exponent"] + 2 * rows["evaluation_exponent_error"] < 2
        lines.append(
            {
                "method": method,
                "fits": len(e),
                "lowest": f"{e.min():.2f}",
                "median": f"{e.median():.2f}",
                "highest": f"{e.max():.2f}",
                "below 2 by two standard errors": int(below.sum()),
                "with all inner products: median": f"{rows['product_exponent'].median():.2f}",
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


def workload_ratios() -> str:
    """c of the workloads' kernels against n."""
    table = pd.concat([_studies()["rows"], _studies()["long"]], ignore_index=True)
    table = table[table["head_to_tail"].notna()].drop_duplicates(["workload", "n"], keep="last").sort_values("n")
    lines = []
    for workload, rows in table.groupby("workload"):
        largest = int(rows["head_to_tail"].argmax())
        shown = sorted({0, largest, len(rows) - 1})
        ends = [f"{rows['head_to_tail'].iloc[i]:.3g} (n = {rows['n'].iloc[i]:,})" for i in shown]
        lines.append(
            {
                "workload": _named(workload),
                "c at the shortest and longest n, and where it is largest": " → ".join(ends),
                f"c stays below {PAPER_BOUND:g}": "yes" if rows["head_to_tail"].max() < PAPER_BOUND else "no",
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


def _of_a_plan(place: str = "") -> str:
    """How much faster a pass over the longest text is with a plan than with exact attention, and whom it takes."""
    table = pd.read_csv(REFERENCE / place / "perplexity" / "tables" / "perplexity.csv")
    longest = table[table["tokens"] == table["tokens"].max()]
    plan = longest[longest["method"] == "plan"].iloc[0]
    exact = longest[longest["method"].str.startswith("exact")]["seconds"].min()
    heads = sorted(json.loads(plan["parameters"])["heads"].items(), key=lambda item: -item[1])
    taken = ", ".join(f"`{name}` {count}" for name, count in heads)
    return f"{exact / plan['seconds']:.2f} times as fast as with exact attention (heads: {taken})"


def _papers_wins() -> str:
    """In how many of its cells the paper's own recipe wins."""
    table = _apart(pd.concat(_studies().values(), ignore_index=True)).drop_duplicates([*CELL, "method"])
    mine = table[table["method"] == "approxkmv-paper"]
    return f"{len(_won(mine)) or 'none'} of {len(mine)}"


def _papers_figure() -> str:
    """At how many lengths of the paper's own Figure 5 it wins, and at how many of these the mean is faster still."""
    table = _sweep("figure5")
    assert table is not None
    mine, mean = (table[table["method"] == name] for name in ("approxkmv-paper", "mean"))
    won = _won(mine).set_index("n")["times_faster"]
    faster = (mean[mean["reached"].eq("yes")].set_index("n")["times_faster"].reindex(won.index) > won).sum()
    more = f" (the mean of all values, also within the error, is faster still at {faster} of them)" if faster else ""
    return f"{len(won) or 'none'} of {len(mine)} lengths{more}"


def _printed_cost() -> str:
    """How much the printed constants cost at the longest n, beside the exact product."""
    folder = REFERENCE / "complexity" / "tables"
    fits, n = pd.read_csv(folder / "complexity_fits.csv"), pd.read_csv(folder / "complexity.csv")["n"].max()
    over = fits[fits["quantity"] == "total"]["over_n_squared"]
    epsilon = read_json(folder / "complexity.json")["settings"]["epsilon"]
    return (
        f"{over.min():,.0f} to {over.max():,.0f} times as often as the exact product (n = {n:,}, "
        f"epsilon = {epsilon:g}, {len(over)} synthetic kernels)"
    )


NUMBERS: dict[str, Callable[[], str]] = {
    "plan": _of_a_plan,
    "plan-amx": partial(_of_a_plan, ELSEWHERE),
    "paper-wins": _papers_wins,
    "paper-wins-figure5": _papers_figure,
    **{f"kept-{study}": lambda study=study: _kept(_tuned(_longest_heads(study))[1]) for study in ("causal", *OTHERS)},
    "printed-cost": _printed_cost,
    "noise-amx": _noise,
    "again-amx": _again,
}


TABLES: dict[str, Callable[[], str]] = {
    "race-answer": answer,
    "race-claim": claim,
    "race-winners": winners,
    "race-others": others,
    "race-elsewhere": elsewhere,
    "race-values": of_the_values,
    "race-passing": passing,
    "race-costs": costs,
    "race-rising": rising,
    "race-counts": counts,
    "race-against-paper": against_paper,
    "methods-figure5": figure5,
    "methods-evaluations": evaluations,
    "methods-workloads": workload_ratios,
    "methods-perplexity": perplexity,
}
