"""How long studies took, by the logs of their steps: python benchmarks/study_times.py results/STUDY ...

The last line of a step's log has its end and its seconds. Writes results/reference/benchmarks/study_times.csv, a row a
study: its steps, the seconds in which any of them ran, with pauses of at most 15 seconds, when the next ones start, and
the processor and commit. Rows of studies that are not given stay.
"""

from __future__ import annotations

import json
import math
import re
import sys
from datetime import datetime
from pathlib import Path

import pandas as pd
from reference import REFERENCE

from approxkmv.files import write_csv, write_json
from approxkmv.provenance import describe

OUT = REFERENCE / "benchmarks" / "study_times.csv"
# Date, time and the title of a step; details are indented.
STEP = re.compile(r"^(\S+ \S+),(\d{3}) \S.*? +(\d+\.\d) s(?=  |$)", re.MULTILINE)
PAUSE = 15.0


def spans_of(logs: Path) -> list[tuple[float, float]]:
    """Start and end of each step that left a log in this folder, in seconds of the same clock."""
    found = [step for path in logs.glob("*.log") for step in STEP.findall(path.read_text(encoding="utf-8"))]
    ends = [datetime.fromisoformat(f"{when}.{after}").timestamp() for when, after, _ in found]
    return [(end - float(took), end) for end, (_, _, took) in zip(ends, found, strict=True)]


def seconds_in(spans: list[tuple[float, float]]) -> float:
    """The seconds in which any of the spans lasts, and those between two that are at most PAUSE apart."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        begin = max(until, start) if start > until + PAUSE else until
        total += max(0.0, end - begin)
        until = max(until, end)
    return total


def origin(study: Path) -> dict[str, str]:
    """Processor and commit of a study, by the record beside one of its tables."""
    for path in sorted(study.glob("tables/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        record = record.get("provenance", record)
        if "commit" in record and "machine" in record:
            return {"processor": record["machine"]["processor"], "commit": record["commit"]}
    raise SystemExit(f"{study}: none of its tables says how it was made")


def main() -> None:
    """Write the table and print it."""
    found = {folder: spans_of(Path(folder, "logs")) for folder in sys.argv[1:]}
    # Before the table is written, which is a change of the checkout.
    record = describe()
    lines = [
        {"study": Path(folder).name, "steps": len(some), "seconds": round(seconds_in(some)), **origin(Path(folder))}
        for folder, some in found.items()
    ]
    kept = [pd.read_csv(OUT)] if OUT.exists() else []
    table = pd.concat([*kept, pd.DataFrame(lines)]).drop_duplicates("study", keep="last")
    write_csv(OUT, table)
    write_json(OUT.with_suffix(".json"), record)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
