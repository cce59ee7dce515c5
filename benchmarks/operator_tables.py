"""The tables of docs/operator.md, from the study `operator` and benchmarks/density.py."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from reference import REFERENCE, machine, markdown, number

from approxkmv.steps.operator import REFERENCE as PLAIN


def gains() -> str:
    """Every product of the study: its error and bound, and its time relative to exact ones."""
    path = REFERENCE / "operator" / "tables" / "operator.csv"
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
            once = row["seconds"] / (row["seconds"] + row["preparation"])
            lines[-1] |= {"the first product": number(row["times_best_exact"] * once)}
    exact = table[table["method"].str.startswith("exact")]
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
        f"{machine(path.with_suffix('.json'))}.\n"
    )


def density() -> str:
    """Densities of word vectors beside scikit-learn's."""
    path = REFERENCE / "benchmarks" / "density.csv"
    lines = []
    for row in pd.read_csv(path).to_dict("records"):
        done = isinstance(row["way"], str)
        lines.append({"queries": f"{row['queries']:,}", "method": row["method"], "how": row["way"] if done else ""})
        lines[-1] |= {"kernel evaluated": f"{row['evaluated']:.0%}" if done else "", "s": number(row["seconds"])}
        lines[-1] |= {"error": number(row["error"]), "bound": number(row["bound"]) if done else ""}
        lines[-1] |= {"speed-up over torch": number(row["times_faster"])}
    return (
        f"{markdown(pd.DataFrame(lines))}\n\n100,000 points. KernelOperator without its first product, which makes "
        f"the blocks. Kernel evaluated: with pilot and error bar. One thread of {machine(path.with_suffix('.json'))}, "
        "`python benchmarks/density.py`.\n"
    )


TABLES: dict[str, Callable[[], str]] = {"operator-gains": gains, "operator-density": density}
