"""What the code of the CUDA kernels needs, compiled ahead of time for an H100: python benchmarks/gpu_code.py

No GPU is needed. Writes results/reference/gpu/tables/code.csv: registers of a thread, bytes of its stack (spills),
shared memory of a program, and, of kernels that walk over pairs of a query (or centre) and a key, the instructions that
a thread runs for a pair in their loop. Rows of other versions of Triton stay.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import triton
from reference import REFERENCE

from approxkmv.files import write_csv, write_json
from approxkmv.provenance import describe

OUT = REFERENCE / "gpu" / "tables" / "code.csv"
SIZES = ((64, 1), (64, 64), (100, 1), (100, 100))
# A step of their loops takes BM x BN pairs.
OF_PAIRS = ("nearest_kernel", "far_kernel", "rows_kernel")


def measured(name: str, d: int, d_v: int) -> dict[str, Any]:
    """A row of the table."""
    import ahead_of_time

    made = ahead_of_time.of_the_fused_form(name, d, d_v, summing=name == "rows_kernel")
    registers, stack = ahead_of_time.resources(made)
    row = {"triton": triton.__version__, "kernel": name, "d": d, "d_v": d_v, "registers": registers, "stack": stack}
    row |= {"shared": made.metadata.shared, "threads": 32 * made.metadata.num_warps, "instructions_per_pair": None}
    if name in OF_PAIRS:
        launched = ahead_of_time.fused.launches(d, d_v, clusters=64)[name]
        pairs = launched["BM"] * launched["BN"]
        row["instructions_per_pair"] = ahead_of_time.instructions_of_the_loop(made) * row["threads"] / pairs
    return row


def main() -> None:
    """Write the table and print it."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "gpu"))
    import ahead_of_time

    table = pd.DataFrame([measured(name, *size) for name in ahead_of_time.FUSED for size in SIZES])
    if OUT.exists():
        others = pd.read_csv(OUT, dtype={"triton": str})
        table = pd.concat([others[others["triton"] != triton.__version__], table], ignore_index=True)
    # Before the table is written, which is a change of the checkout
    record = describe({"target": "sm_90", "clusters": 64})
    write_csv(OUT, table.sort_values("triton", kind="stable"))
    write_json(OUT.with_suffix(".json"), record)
    print(table.to_string(index=False, float_format=lambda x: f"{x:.1f}"))


if __name__ == "__main__":
    main()
