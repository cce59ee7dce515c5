"""How long studies took, by the logs of their steps: python benchmarks/study_times.py results/STUDY ...

The last line of a step's log has its seconds. Writes results/reference/benchmarks/study_times.csv, a row per study: its
steps and their seconds one after the other, which is a little more than a run takes that makes figures side by side.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd
from reference import REFERENCE

from approxkmv.files import write_csv, write_json
from approxkmv.provenance import describe

OUT = REFERENCE / "benchmarks" / "study_times.csv"
# Date, time and the title of a step; details are indented.
STEP = re.compile(r"^\S+ \S+ \S.*? +(\d+\.\d) s(?=  |$)", re.MULTILINE)


def seconds_of(logs: Path) -> list[float]:
    """The seconds of each step that left a log in this folder."""
    return [float(found) for path in logs.glob("*.log") for found in STEP.findall(path.read_text(encoding="utf-8"))]


def main() -> None:
    """Write the table and print it."""
    found = {Path(folder).name: seconds_of(Path(folder, "logs")) for folder in sys.argv[1:]}
    lines = [{"study": study, "steps": len(some), "seconds": round(sum(some))} for study, some in found.items()]
    table = pd.DataFrame(lines)
    write_csv(OUT, table)
    write_json(OUT.with_suffix(".json"), describe())
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
