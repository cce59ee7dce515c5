"""The tables of docs/operator.md, from the study `operator` and benchmarks/density.py."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from reference import ELSEWHERE, REFERENCE, machine, markdown, number

from approxkmv.files import read_json
from approxkmv.steps.operator import REFERENCE as PLAIN

OPERATOR = Path("operator", "tables", "operator.csv")


def _first(row: Mapping[Hashable, Any]) -> float:
    """How many times faster than the best exact product the first one is, which makes the blocks."""
    return float(row["times_best_exact"] * row["seconds"] / (row["seconds"] + row["preparation"]))


def gains() -> str:
    """Every product of the study: its error and bound, and its time relative to exact ones."""
    path = REFERENCE / OPERATOR
    table = pd.read_csv(path)
    lines = []
    for (x, n), rows in table.groupby(["x", "n"], sort=False):
        trivial = rows[rows["method"].isin(["zero", "mean"])]["error"].min()
        for at, row in enumerate(rows[rows["epsilon"].notna()].to_dict("records")):
            bound = number(row["bound"]) if row["bound"] == row["bound"] else "unknown"
            how = f"{row['near']:,.0f} near keys" if row["way"] == "blocks" else row["way"]
            first = {"x": x, "n": f"{n:,}", "trivial error": number(trivial)}
            lines.append(first if at == 0 else dict.fromkeys(first, ""))
            lines[-1] |= {"asked": f"{row['epsilon']:g}", "error (bound)": f"{number(row['error'])} ({bound})"}
            lines[-1] |= {"how": how, "speed-up over torch": number(row["times_faster"])}
            lines[-1] |= {"over the best exact": number(row["times_best_exact"])}
            lines[-1] |= {"the first product": number(_first(row))}
    exact = table[table["method"].str.startswith(("exact", PLAIN))]
    long = exact[exact["n"] == exact["n"].max()].sort_values("seconds")
    keops = table[table["method"] == "KeOps"]
    found = ", ".join(f"{row['times_faster']:.2g} (x {row['x']})" for row in keops.to_dict("records"))
    beside = f"KeOps, at n = {keops['n'].max():,}: {found} times the speed of torch."
    fastest = long.iloc[0]
    return (
        f"{markdown(pd.DataFrame(lines))}\n\nErrors are relative to |Kx|; trivial error: of the better one of y = 0 "
        f"and the answer's mean. Speed-ups are of products after the first: over {PLAIN}, and over the best exact "
        "product; last, of the first product over the best exact one. The best exact product at the longest n is "
        f"`{fastest['method']}`, {fastest['times_faster']:.2g} times torch. {beside} One thread of "
        f"{machine(path.with_suffix('.json'))}.\n\n{_there()}"
    )


def single() -> str:
    """At each n, how many times as fast as the best exact product a first one is, over x and epsilon."""
    table = pd.read_csv(REFERENCE / OPERATOR)
    ours = table[table["epsilon"].notna()]
    ours = ours.assign(first=ours.apply(_first, axis=1))
    found = [f"{_range(rows['first'])} at n = {n:,}" for n, rows in ours.groupby("n")]
    return f"{', '.join(found[:-1])} and {found[-1]}"


def _range(values: pd.Series) -> str:
    """Without digits that would differ in the next run."""
    least, most = f"{values.min():.2g}", f"{values.max():.2g}"
    return least if least == most else f"{least} to {most}"


def _there() -> str:
    """The same study on the other machine: the speed-up over the best exact product, at each x's longest n."""
    path = REFERENCE / ELSEWHERE / OPERATOR
    table = pd.read_csv(path)
    ours, gains = table[table["epsilon"].notna()], []
    for x, rows in ours.groupby("x", sort=False):
        longest = rows[rows["n"] == rows["n"].max()]
        later, first = _range(longest["times_best_exact"]), _range(longest.apply(_first, axis=1))
        gains.append(f"x {x}, n = {longest['n'].iloc[0]:,}: {later} (the first product: {first})")
    where = machine(path.with_suffix(".json")).split(", Python")[0]
    return f"Over the best exact product on {where} (`results/reference/{ELSEWHERE}`): {'; '.join(gains)}.\n"


def density() -> str:
    """Densities of word vectors beside scikit-learn's."""
    path = REFERENCE / "benchmarks" / "density.csv"
    points, lines = read_json(path.with_suffix(".json"))["settings"]["points"], []
    for row in pd.read_csv(path).to_dict("records"):
        done = isinstance(row["way"], str)
        lines.append({"queries": f"{row['queries']:,}", "method": row["method"], "how": row["way"] if done else ""})
        lines[-1] |= {"kernel evaluated": f"{row['evaluated']:.0%}" if done else "", "s": number(row["seconds"])}
        lines[-1] |= {"error": number(row["error"]), "bound": number(row["bound"]) if done else ""}
        lines[-1] |= {"speed-up over torch": number(row["times_faster"])}
        lines[-1] |= {"the first product": number(row["times_faster_first"]) if done else ""}
    return (
        f"{markdown(pd.DataFrame(lines))}\n\n{points:,} points. Times of KernelOperator are of later products; last, "
        "the speed-up of the first, which makes the blocks, and of making the operator, which scales the points; torch "
        "has them scaled. Kernel evaluated: with pilot and error bar. One thread of "
        f"{machine(path.with_suffix('.json'))}, `python benchmarks/density.py`.\n"
    )


TABLES: dict[str, Callable[[], str]] = {"operator-gains": gains, "operator-density": density}
NUMBERS: dict[str, Callable[[], str]] = {"operator-single": single}
