"""The last words of a run: where the figures are, and the few numbers that matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from approxkmv.errors import TableError
from approxkmv.results.tables import MASKED_FACTS, masks_of, read_overview, read_statistics
from approxkmv.statistics.growth import FAST, FLAT, SIZES, TRENDS, in_words
from approxkmv.steps.cleaning import leftovers, study_in

# What is said of a model's texts, and of long ones.
FACTS = ["model", "label", "corpus", "layers", "heads", "texts_used", "texts_too_short", "texts_cut", "paper_bound"]
FACTS += MASKED_FACTS
LONG = ["model", "label", "corpus", "lengths", "texts_missing", "paper_bound"]


def lines(results: Path) -> list[str]:
    """The message for one study's results: of the models that it has now, where the folder says which they are.

    Raises TableError when there are none.
    """
    study = study_in(results)

    def read(kind: str, names: list[str]) -> list[dict[str, Any]]:
        found = sorted((results / "tables").glob(f"{kind}_*.json"))
        facts = [read_overview(path, *names) for path in found]
        return [one for one in facts if study is None or one["model"] in study.models]

    long_texts = read("lengths", LONG) if study is None or study.lengths else []
    overviews = read("overview", FACTS) if study is None or not study.lengths else []
    if not (results / "tables").is_dir():
        raise TableError(f"{results} has no tables: run the study first")
    out = []
    for facts in overviews:
        heads = facts["layers"] * facts["heads"]
        counted = {"too short": facts["texts_too_short"], "cut": facts["texts_cut"]}
        aside = ", ".join(f"{count} {what}" for what, count in counted.items() if count)
        out.append(f"{facts['label']}: {facts['texts_used']} texts of {facts['corpus']}" + (aside and f" ({aside})"))
        out += [f"  not in K: {what}" for what in facts["left_out"]]
        for before in masks_of(facts, "largest_ratio"):
            within, median, largest, layer, head = (
                facts[f"{before}{name}"]
                for name in (
                    *("heads_within_bound", "median_ratio", "largest_ratio"),
                    *("largest_ratio_layer", "largest_ratio_head"),
                )
            )
            where = f"{facts['mask']}: " if before else ""
            out.append(
                f"  {where}c is at most {facts['paper_bound']:g}, the paper's bound, for {within} of {heads} heads; "
                f"median {median:.2f}, largest {largest:.1f} (layer {layer}, head {head}, counting from 0)"
            )
        out += growth_lines(results, facts)
    for facts in long_texts:
        out.append(f"{facts['label']}: n = {facts['lengths'][0]:,} to {facts['lengths'][-1]:,} on {facts['corpus']}")
        out += [f"  not in K: {what}" for what in facts["left_out"]]
        out += [f"  {line}" for line in facts["texts_missing"]]
        out += growth_lines(results, facts)
    if left := leftovers(results):
        names = ", ".join(str(path.relative_to(results)) for path in left[:3])
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        out.append(f"of an earlier study: {names}{more}; `snakemake --cores all clean_leftovers` removes them")
    figures = f"figures: {results / 'figures'}   " if (results / "figures").is_dir() else ""
    out.append(f"{figures}tables: {results / 'tables'}")
    return out


def growth_lines(results: Path, facts: dict[str, Any]) -> list[str]:
    """What the table of growth says of a model, where there is one: a line for each mask."""
    path = results / "tables" / f"growth_{facts['model']}.csv"
    if not path.is_file():
        return []
    columns = {"exponent": "number", "size": "text", "trend": "text"} | dict.fromkeys(("length", "start"), "whole")
    table = read_statistics(path, {}, columns)
    out = []
    for before in masks_of(table, "size"):
        where = f"{facts['mask']}: " if before else ""
        length, start = (int(table[f"{before}{name}"].iloc[0]) for name in ("length", "start"))
        flat, fast = (int((table[f"{before}exponent"] > edge).sum()) for edge in (FLAT, FAST))
        sizes, trends = in_words(table[f"{before}size"], SIZES), in_words(table[f"{before}trend"], TRENDS)
        out.append(
            f"  {where}c at n = {length:,} against {facts['paper_bound']:g}: {sizes}; trend from n = {start:,}: "
            f"{trends}; exponent above {FLAT:g} on {flat} heads, above {FAST:g} on {fast}"
        )
    return out
