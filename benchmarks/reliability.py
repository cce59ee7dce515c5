"""Count how bad inputs and random calls end: python benchmarks/reliability.py [fuzz | bad-inputs]

Every bad input of tests/bad_inputs must end with one line and exit code 2; every call of tests/fuzz.py must be answered
correctly or refused in one line. Writes fuzz.csv and bad_inputs.csv to results/reliability, each with its provenance as
.json; --out changes the folder. Failures are printed, and the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pandas as pd
import torch
from writing import write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bad_inputs import all_cases, is_one_line
from fuzz import call, kinds


def fuzz(calls: int) -> pd.DataFrame:
    """Make at least this many random calls, equally many of each kind; count answered, refused and failed ones."""
    each = -(-calls // len(kinds()))
    rows = []
    for kind in kinds():
        ends: dict[str, list[str]] = defaultdict(list)
        for seed in range(each):
            end, why = call(kind, seed)
            ends[end].append(f"seed {seed}: {why}")
        counts = {end: len(ends[end]) for end in ("answered", "refused", "failed")}
        rows.append({"kind": kind, "calls": each, **counts, "failures": "; ".join(ends["failed"])})
        print(*rows[-1].values(), flush=True)
    return pd.DataFrame(rows)


def bad_inputs() -> pd.DataFrame:
    """Try every bad input of the catalogue; count how many of each kind ended with one line."""
    found: dict[str, list[str]] = {}
    failed: dict[str, list[str]] = defaultdict(list)
    for case in all_cases():
        with tempfile.TemporaryDirectory() as folder:
            code, printed = case.run(Path(folder))
        found.setdefault(case.kind, []).append(case.name)
        if not is_one_line(code, printed):
            failed[case.kind].append(case.name)
    rows = [(kind, len(some), len(some) - len(failed[kind]), "; ".join(failed[kind])) for kind, some in found.items()]
    table = pd.DataFrame(rows, columns=["kind", "tried", "one_line", "failures"])
    print(table.to_string(index=False))
    return table


def main() -> int:
    """Run the requested parts and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["fuzz", "bad-inputs"], help="run only this part; both by default")
    parser.add_argument("--calls", type=int, default=10_000, help="minimum number of random calls")
    parser.add_argument("--out", type=Path, default=Path("results/reliability"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    for part, name, count in (("bad-inputs", "bad_inputs", bad_inputs), ("fuzz", "fuzz", lambda: fuzz(given.calls))):
        if given.part not in (None, part):
            continue
        table = count()
        failures += int((table["failures"] != "").sum())
        write(given.out / f"{name}.csv", table, {"calls": given.calls} if part == "fuzz" else {})
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
