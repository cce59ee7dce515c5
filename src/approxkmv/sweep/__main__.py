"""Run a sweep on a machine with little but torch: python -m approxkmv.sweep --settings FILE.json --out TABLE.csv

Equivalent to `approxkmv sweep --settings`, whose other options need the pipeline's packages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from approxkmv.errors import ApproxKMVError
from approxkmv.sweep.settings_file import read_settings


def main() -> int:
    """Run the sweep given on the command line; a user error is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m approxkmv.sweep", description=(__doc__ or "").split(":", 1)[0])
    parser.add_argument("--settings", type=Path, required=True, help="JSON file with the keys of one entry of `sweeps`")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write; its record goes beside it as JSON")
    given = parser.parse_args()
    try:
        settings = read_settings(given.settings, given.out)
        from approxkmv.provenance import describe
        from approxkmv.sweep import run_sweep

        run_sweep(settings, given.out, describe())
    except ApproxKMVError as error:
        print(f"approxkmv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("approxkmv: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
