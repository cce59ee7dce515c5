"""What the tables of a model say, in sentences: for the page and the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from approxkmv.errors import TableError
from approxkmv.results.tables import MASKED_FACTS, masks_of, read_overview, read_statistics
from approxkmv.statistics.growth import ENOUGH_TEXTS, FAST, FLAT, SIZES, TRENDS
from approxkmv.words import counted, significant

# What is said of a model's texts, and of long ones.
FACTS = ["model", "label", "corpus", "layers", "heads", "texts_used", "texts_too_short", "texts_cut", "paper_bound"]
FACTS += MASKED_FACTS
LONG = ["model", "label", "corpus", "layers", "heads", "lengths", "texts_missing", "paper_bound"]


def measured(tables: Path, models: Collection[str] | None = None, left: Collection[Path] = ()) -> list[dict[str, Any]]:
    """The facts of each model in a folder of tables, or of those named, but for the files `left` by an earlier study.

    Raises TableError for facts that cannot be read.
    """
    found = [
        read_overview(path, *names)
        for kind, names in (("overview", FACTS), ("lengths", LONG))
        for path in sorted(tables.glob(f"{kind}_*.json"))
        if path not in left
    ]
    return [facts for facts in found if models is None or facts["model"] in models]


def is_there(path: Path, left: Collection[Path]) -> bool:
    """Whether the file exists and is not among those `left` by an earlier study."""
    return path.is_file() and path not in left


def is_on_long_texts(facts: dict[str, Any]) -> bool:
    """Whether these are the facts of a study with `lengths`."""
    return "lengths" in facts


def sentences(tables: Path, facts: dict[str, Any]) -> list[str]:
    """First what was measured, then what was found. Raises TableError for a table of growth that cannot be read."""
    if is_on_long_texts(facts):
        first = f"{facts['label']}: n = {facts['lengths'][0]:,} to {facts['lengths'][-1]:,} on {facts['corpus']}"
        return [first, *_beside(facts), *facts["texts_missing"], *growth_sentences(tables, facts)]
    heads = facts["layers"] * facts["heads"]
    lost = {"too short": facts["texts_too_short"], "cut": facts["texts_cut"]}
    aside = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
    first = f"{facts['label']}: {counted(facts['texts_used'], 'text')} of {facts['corpus']}" + (aside and f" ({aside})")
    found = []
    for before in masks_of(facts, "largest_ratio"):
        names = ("heads_within_bound", "median_ratio", "largest_ratio", "largest_ratio_layer", "largest_ratio_head")
        within, median, largest, layer, head = (facts[f"{before}{name}"] for name in names)
        where = f"{facts['mask']}: " if before else ""
        found.append(
            f"{where}c is at most {facts['paper_bound']:g}, the paper's bound, for {within} of {heads} heads; "
            f"median {significant(median)}, largest {significant(largest)} "
            f"(layer {layer}, head {head}, counting from 0)"
        )
    return [first, *_beside(facts), *found, *growth_sentences(tables, facts)]


def holds(tables: Path, facts: dict[str, Any]) -> tuple[str, str]:
    """`yes`, `no` or `undecided`, and the sentence: whether every head has a c within the paper's bound."""
    heads = facts["layers"] * facts["heads"]
    at = ""
    if is_on_long_texts(facts):
        table = _growth(tables, facts)
        if table is None:
            return "undecided", "Whether the sparsity assumption holds cannot be told: there is no table of growth."
        small, large = (int((table["size"] == word).sum()) for word in SIZES[:2])
        at = f" at n = {int(table['length'].iloc[0]):,}"
    else:
        small = facts["heads_within_bound"]
        large = heads - small
    word = "no" if large else "yes" if small == heads else "undecided"
    others = {"fails": large, "is undecided": heads - small - large}
    *first, last = [
        f"{'all ' if heads > 1 else ''}{counted(heads, 'head')}" if word == "yes" else f"{small} of {heads} heads",
        *(f"{what} on {count}" for what, count in others.items() if count),
    ]
    said = f"{', '.join(first)} and {last}" if first else last
    bound = f"with c at most {facts['paper_bound']:g} as the paper reports"
    return word, f"The sparsity assumption, {bound}, holds{at} on {said}."


def growth_sentences(tables: Path, facts: dict[str, Any]) -> list[str]:
    """What the table of growth says of a model, where there is one: a sentence for each mask."""
    table = _growth(tables, facts)
    if table is None:
        return []
    out = []
    for before in masks_of(table, "size"):
        where = f"{facts['mask']}: " if before else ""
        length, start = (int(table[f"{before}{name}"].iloc[0]) for name in ("length", "start"))
        if not start:
            few = f"too few texts or lengths ({ENOUGH_TEXTS} texts are needed) to tell how c grows"
            out.append(f"{where}{few}: at n = {length:,} c is {_counted(table[f'{before}size'], SIZES)}")
            continue
        flat, fast = (int((table[f"{before}exponent"] > edge).sum()) for edge in (FLAT, FAST))
        sizes, trends = _counted(table[f"{before}size"], SIZES), _counted(table[f"{before}trend"], TRENDS)
        out.append(
            f"{where}at n = {length:,} tokens c is {sizes}, against {facts['paper_bound']:g}; "
            f"from n = {start:,} its trend is: {trends}; "
            f"its exponent is above {FLAT:g} on {counted(flat, 'head')}, above {FAST:g} on {fast}"
        )
    return out


def sweep_sentence(tables: Path, left: Collection[Path] = ()) -> str:
    """Who won the sweep, where the folder has one that an earlier study has not `left`; else nothing."""
    if not is_there(tables / "sweep.csv", left):
        return ""
    # Imported here, since they import torch, which takes longer than the rest.
    from approxkmv.figures.speedup import finding
    from approxkmv.figures.sweep_table import read_sweep

    return finding(read_sweep(tables / "sweep.csv"))


def _counted(found: Any, words: Sequence[str]) -> str:
    """`small on 40 heads, undecided on 2`."""
    counts = found.value_counts()
    (first, *others) = [word for word in words if word in counts]
    return ", ".join(
        [f"{first} on {counted(counts[first], 'head')}", *(f"{word} on {counts[word]}" for word in others)]
    )


def _growth(tables: Path, facts: dict[str, Any]) -> Any:
    path = tables / f"growth_{facts['model']}.csv"
    columns = {"exponent": "number", "size": "text", "trend": "text"} | dict.fromkeys(("length", "start"), "whole")
    if not path.is_file():
        return None
    table = read_statistics(path, {}, columns)
    for column, words in (("size", SIZES), ("trend", TRENDS)):
        for before in masks_of(table, column):
            if unknown := set(table[f"{before}{column}"]) - {*words}:
                raise TableError(
                    f"{path}: {before}{column} is {min(unknown)!r}, not {', '.join(words)}: run growth again"
                )
    return table


def _beside(facts: dict[str, Any]) -> list[str]:
    return [f"not in K: {what}" for what in facts["left_out"]]
