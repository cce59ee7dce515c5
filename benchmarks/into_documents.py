"""Put the reference tables into the documents, between their markers: python benchmarks/into_documents.py

A document has `<!-- table: NAME -->` and `<!-- end -->`; what stands between is replaced by what NAME's function makes
of the files in results/reference/. With --check nothing is written and the exit code says whether all is up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table of strings."""
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(path: Path) -> str:
    """One line about the machine and the versions that made a table."""
    record = json.loads(path.read_text(encoding="utf-8"))
    record = record.get("provenance", record)
    versions = record["versions"]
    return (
        f"{record['machine']['cores']} cores of {record['machine']['processor']}, Python {versions['python']}, "
        f"torch {versions['torch']}, NumPy {versions['numpy']}"
    )


def statistics_speed() -> str:
    """The benchmark of the statistics."""
    folder = REFERENCE / "benchmarks"
    table = pd.read_csv(folder / "statistics.csv")
    single = table[table["against"].notna()]
    shown = pd.DataFrame(
        {
            "one head, one thread": single["what"].str.extract(r"one (\w+) head")[0]
            + " head, n = "
            + single["n"].astype(str)
            + ", d = "
            + single["d"].astype(str),
            "compared with": "torch.topk of every prefix, " + single["against"].str.removeprefix("topk "),
            "ours": single["ours_ms"].map("{:.2f} ms".format),
            "torch.topk": single["other_ms"].map("{:.0f} ms".format),
            "times faster (median, lowest to highest)": [
                f"{m:.0f} ({low:.0f} to {high:.0f})"
                for m, low, high in zip(single["times_faster"], single["lowest"], single["highest"], strict=True)
            ],
        }
    )
    whole = table[table["against"].isna()].iloc[0]
    return (
        f"{markdown(shown)}\n\n{whole['what']}: {whole['ours_ms'] / 1e3:.0f} s. "
        f"Measured on {machine(folder / 'statistics.json')} by `make benchmarks`.\n"
    )


def embedded_study() -> str:
    """What the default study found."""
    lines = []
    for path in sorted((REFERENCE / "embedded" / "tables").glob("overview_*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        heads = facts["layers"] * facts["heads"]
        lines.append(
            {
                "model": facts["label"],
                "texts": facts["texts_used"],
                "heads with c ≤ 4.6": f"{facts['heads_within_bound']} of {heads}",
                "median c over heads": f"{facts['median_ratio']:.2f}",
                "largest c": f"{facts['largest_ratio']:.0f} (layer {facts['largest_ratio_layer']}, "
                f"head {facts['largest_ratio_head']})",
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


TABLES: dict[str, Callable[[], str]] = {"statistics-speed": statistics_speed, "embedded-study": embedded_study}


def filled(text: str) -> str:
    """The document with every marked table made anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> int:
    """Write the documents, or with --check compare them."""
    stale = [path for path in DOCUMENTS if (text := path.read_text(encoding="utf-8")) != filled(text)]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the reference tables say: run python {sys.argv[0]}")
        return len(stale)
    for path in stale:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
