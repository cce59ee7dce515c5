"""Write docs/findings.md from the reference tables: python benchmarks/findings.py [--reference FOLDER] [--out FILE]

The tables are those of two studies, each copied whole from results/<study>/tables to FOLDER/<study>/tables:

    snakemake --cores all                            the default study, `embedded`
    snakemake --cores all --config study=lengths     long texts

With --check nothing is written, and the exit code says whether the document is what the tables say.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from into_documents import REFERENCE, ROOT, machine, markdown

from approxkmv.kmv.complexity import bound_exponents
from approxkmv.results.tables import MASKED, length_tables, masks_of, model_tables, read_overview
from approxkmv.statistics.growth import FAILS, FAR_BOUND, FAR_LENGTH, FAST, FLAT, HOLDS, SLOWLY, UNDECIDED
from approxkmv.steps.lengths import SHARE_NAMES

VERDICTS = (HOLDS, SLOWLY, UNDECIDED, FAILS)
WORST = 6
MASK_NAMES = {"": "all entries", MASKED: "no key after its query"}


def number(value: float) -> str:
    """Two to three digits."""
    if not np.isfinite(value):
        return "–"
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 and abs(value) < 1e6 else f"{value:.1e}"


def paragraph(text: str) -> str:
    """Lines of the documents' width, and an empty one."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def verdict_rows(label: str, growth: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for before in masks_of(growth, "exponent"):
        counts = growth[f"{before}verdict"].value_counts()
        rows.append(
            {"model": label, "entries": MASK_NAMES[before], "heads": str(len(growth))}
            | {word: str(counts.get(word, 0)) for word in VERDICTS}
            | {"median g": f"{growth[f'{before}exponent'].median():.2f}"}
            | {"largest c": number(growth[f"{before}largest_ratio"].max())}
        )
    return rows


def undecided_rows(label: str, growth: pd.DataFrame) -> list[dict[str, str]]:
    """Why heads are undecided, by the reasons that the table gives."""
    rows = []
    for before in masks_of(growth, "exponent"):
        reasons = growth.loc[growth[f"{before}verdict"] == UNDECIDED, f"{before}reason"]
        why = {
            f"g above {FAST:g}, c not yet above {FAR_BOUND:g}": "but c is at most",
            f"g's interval on both sides of {FLAT:g} or {FAST:g}": "on both sides of",
            "too few texts": "are needed",
        }
        counts = {name: int(reasons.str.contains(words, regex=False).sum()) for name, words in why.items()}
        assert sum(counts.values()) == len(reasons), "a reason that is not known here"
        rows.append(
            {"model": label, "entries": MASK_NAMES[before], "undecided": str(len(reasons))}
            | {name: str(count) for name, count in counts.items()}
        )
    return rows


def where(growth: pd.DataFrame, before: str, verdict: str) -> str:
    """How many heads of a verdict are in each layer that has any."""
    per_layer = growth[growth[f"{before}verdict"] == verdict].groupby("layer").size()
    return ", ".join(f"layer {layer}: {count}" for layer, count in per_layer.items()) or "none"


def holding_and_failing(label: str, growth: pd.DataFrame) -> str:
    """Which heads hold and which fail, how fast, and the worst of them."""
    out = []
    for before in masks_of(growth, "exponent"):
        bad = growth[growth[f"{before}verdict"] == FAILS]
        holds = int((growth[f"{before}verdict"] == HOLDS).sum())
        g = bad[f"{before}exponent"]
        speed = f"Their g is {g.min():.2f} to {g.max():.2f}, median {g.median():.2f}. Those with the largest c:"
        out += [
            f"**{label}, {MASK_NAMES[before]}**\n",
            paragraph(f"{holds} of {len(growth)} heads hold: {where(growth, before, HOLDS)}."),
            paragraph(
                f"{len(bad)} of {len(growth)} heads fail: {where(growth, before, FAILS)}. "
                + (speed if len(bad) else "")
            ),
        ]
        if bad.empty:
            continue
        worst = bad.nlargest(WORST, f"{before}largest_ratio")
        shown = pd.DataFrame(
            {
                "layer": worst["layer"],
                "head": worst["head"],
                "g": worst[f"{before}exponent"].map("{:.2f}".format),
                "95 % interval": [
                    f"{low:.2f} to {high:.2f}"
                    for low, high in zip(worst[f"{before}exponent_low"], worst[f"{before}exponent_high"], strict=True)
                ],
                "largest c seen": worst[f"{before}largest_ratio"].map(number),
                f"c at {FAR_LENGTH:,} (extrapolated)": worst[f"{before}far_ratio"].map(number),
            }
        )
        out.append(markdown(shown) + "\n")
    return "\n".join(out)


def cost_rows(label: str, growth: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for before in masks_of(growth, "exponent"):
        row = {"model": label, "entries": MASK_NAMES[before], "heads": str(len(growth))}
        for name, rebalanced in (("β as printed", False), ("β rebalanced", True)):
            exponents = bound_exponents(growth[f"{before}exponent"].to_numpy(), rebalanced=rebalanced)
            row[f"median, {name}"] = f"{np.median(exponents):.2f}"
            row[f"below 2, {name}"] = str(int((exponents < 2).sum()))
        high = bound_exponents(growth[f"{before}exponent_high"].to_numpy(), rebalanced=True)
        rows.append(row | {"the last at g's upper end": str(int((high < 2).sum()))})
    return rows


def stronger_rows(label: str, heads: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for before in masks_of(heads, "max_ratio"):
        part = heads[[name for name in heads if name.startswith(before)]]
        part = part.set_axis([name.removeprefix(before) for name in part], axis=1)
        factor = part["median_last_ratio"] / part["median_softmax_ratio"]
        rows.append(
            {
                "model": label,
                "entries": MASK_NAMES[before],
                "c of K": number(part["median_last_ratio"].median()),
                "c of D⁻¹A": number(part["median_softmax_ratio"].median()),
                "heads with c of D⁻¹A above c of K": f"{int((factor < 1).sum())} of {len(heads)}",
                f"heads with c of D⁻¹A above {FAR_BOUND:g} on some text": str(
                    int((part["max_softmax_ratio"] > FAR_BOUND).sum())
                ),
                "K_(n)/K_(n+1)": number(part["median_next_ratio"].median()),
                "K_(n)/K_(2n)": number(part["median_double_ratio"].median()),
                "tail exponent": number(part["median_tail_exponent"].median()),
                "heads with tail exponent above 1": str(int((part["median_tail_exponent"] > 1).sum())),
                "column exponent": number(part["median_column_exponent"].median()),
            }
        )
    return rows


def length_rows(table: pd.DataFrame, before: str) -> pd.DataFrame:
    groups = table.groupby("length")

    def over_heads(column: str, share: float) -> list[str]:
        return groups[f"{before}{column}"].quantile(share).map(number).tolist()

    columns = {"n": [f"{length:,}" for length in groups.size().index]}
    columns |= {
        f"c, {name}": over_heads("ratio", share) for name, share in (("median", 0.5), ("90 %", 0.9), ("largest", 1.0))
    }
    columns["heads with c > 5"] = (
        groups[f"{before}ratio"].apply(lambda part: str(int((part > FAR_BOUND).sum()))).tolist()
    )
    columns["c of D⁻¹A, median"] = over_heads("softmax_ratio", 0.5)
    columns["K_(n)/K_(2n), median"] = over_heads("double_ratio", 0.5)
    columns |= {f"keys for {name} %, median": over_heads(f"keys_{name}_mean", 0.5) for name in SHARE_NAMES}
    columns |= {f"keys for {name} %, largest": over_heads(f"keys_{name}_mean", 1.0) for name in SHARE_NAMES[:1]}
    return pd.DataFrame(columns)


def document(reference: Path, study: str, lengths: str) -> str:
    """The whole of docs/findings.md."""
    folder = reference / study / "tables"
    models = sorted(path.stem.removeprefix("growth_") for path in folder.glob("growth_*.csv"))
    models = [model for model in models if not model.startswith("curves_")]
    if not models:
        sys.exit(f"{folder} has no growth tables: run the study and copy its tables there")
    growth, heads, facts = {}, {}, {}
    for model in models:
        names = model_tables(folder, model)
        growth[model], heads[model] = pd.read_csv(names.growth), pd.read_csv(names.heads)
        facts[model] = read_overview(names.overview)
    labels = {model: facts[model]["label"] for model in models}
    sizes = "; ".join(f"{labels[m]}: {facts[m]['texts_used']} texts of {facts[m]['corpus']}" for m in models)
    out = [
        "# Findings: does Assumption (A) hold, on which heads, and to which length?\n",
        paragraph(
            """Every number here is computed by `python benchmarks/findings.py` from tables in `results/reference/`;
            none is typed in. For readers of Indyk, Kapralov, Sheth & Wagner (ICLR 2025); notation in
            [math.md](math.md)."""
        ),
        paragraph(f"Measured on {sizes}. {machine(model_tables(folder, models[0]).overview)}."),
        "## Verdicts\n",
        paragraph(
            f"""c(n) ~ n^g per head, fitted within each text over its prefixes; interval: 95 %, bootstrap over texts. A
            head holds when g's interval is below {FLAT:g}, or c extrapolated to n = {FAR_LENGTH:,} stays below
            {FAR_BOUND:g} at the interval's upper end; it fails when the interval is above {FAST:g} and c exceeds
            {FAR_BOUND:g} at a
            length that was seen; it grows slowly when the interval is between the two; anything else is undecided. A
            causal model attends only backwards: its second row counts the entries that its attention uses, the first
            all of K, as the paper does."""
        ),
        markdown(pd.DataFrame([row for m in models for row in verdict_rows(labels[m], growth[m])])) + "\n",
        "Why heads are undecided:\n",
        markdown(pd.DataFrame([row for m in models for row in undecided_rows(labels[m], growth[m])])) + "\n",
        "## Which heads hold and which fail, and how fast\n",
        paragraph(
            "Layers and heads count from 0. Every head with its g, interval, c, verdict and reason: "
            + ", ".join(f"[growth_{m}.csv](../results/reference/{study}/tables/growth_{m}.csv)" for m in models)
            + "."
        ),
        *[holding_and_failing(labels[m], growth[m]) for m in models],
        "## What that does to the cost bound\n",
        paragraph(
            """The proof of Theorem 1.1 uses the assumption only as |K|₁ ≤ (1 + c) n. With c = n^g its terms have the
            exponents 2 − γ, 1 + 2α + g, 2 + γ − α + g, 2 + γ − β + g and 1.346 + 2β. The least of their maximum, over α
            and γ for each head's g, is max(1.891 + g/2, 1.8 + 0.6 g) with the paper's β = 0.218, which reaches 2, the
            exact product's exponent, at g = 0.218; over β too it is max(1.8692 + 0.4 g, 1.8 + 0.6 g), which reaches 2
            at g = 0.327. That is for n without limit, and leaves out constants and logarithms: at a given length the
            bound is larger by 1 + c. Heads with an exponent below 2:"""
        ),
        markdown(pd.DataFrame([row for m in models for row in cost_rows(labels[m], growth[m])])) + "\n",
        paragraph(
            """It is a bound: the entries of K are at most 1 and mostly far below, so an algorithm may do better on such
            a head."""
        ),
        "## The row factor, and the stronger assumption\n",
        paragraph(
            """K has a factor exp(−s|q_i|²/2) per row that softmax does not see: rows of long queries hardly count in c.
            So c is given for D⁻¹A too, where each row sums to 1. The tail exponent is the alpha for which the largest
            entry of D⁻¹A outside its n largest is n^−alpha; a uniform small bound on the tail, in the manner of Han et
            al. (2024), wants it above 1. The column exponent is the beta with n · max_j |column j of D⁻¹A|² = n^beta,
            their parameter, which they postulate near 0. Medians over heads of medians over texts, at the texts' full
            lengths:"""
        ),
        markdown(pd.DataFrame([row for m in models for row in stronger_rows(labels[m], heads[m])])) + "\n",
    ]
    long_folder = reference / lengths / "tables"
    long_models = sorted(path.stem.removeprefix("lengths_") for path in long_folder.glob("lengths_*.json"))
    if long_models:
        out.append("## Longer texts\n")
    for model in long_models:
        names = length_tables(long_folder, model)
        long_facts, table = read_overview(names.facts), pd.read_csv(names.scaling)
        count = long_facts["texts_used"]
        for before in masks_of(table, "ratio"):
            texts = "one long text" if count == 1 else f"{count} long texts (medians over them)"
            out.append(
                paragraph(
                    f"""{long_facts["label"]}, {long_facts["layers"] * long_facts["heads"]} heads, {texts} of
                    {long_facts["corpus"]}, {MASK_NAMES[before]}. Quantiles are over heads; keys: how many hold that
                    share of a row's softmax mass, mean over rows."""
                )
            )
            out.append(markdown(length_rows(table, before)) + "\n")
        out += [f"{line}\n" for line in long_facts["texts_missing"]]
    tokens = max(facts[m]["tokens_max"] for m in models)
    median = max(facts[m]["tokens_median"] for m in models)
    out += [
        "## Limits\n",
        paragraph(
            f"""{len(models)} small models, one language, and these texts: half of the study's texts have at most
            {median:.0f} tokens, the longest {tokens}. c at {FAR_LENGTH:,} is an extrapolation of a power law far beyond
            what was seen; longer texts are the check on it as far as they go. The interval is over texts of one data
            set and says nothing about other kinds of text. The speed of the statistics of long texts on a GPU is
            unmeasured, and that they are the same there is a test that needs one."""
        ),
    ]
    return "\n".join(out)


def main() -> int:
    """Write the document, or with --check compare it."""
    parser = argparse.ArgumentParser(description="Write docs/findings.md from the reference tables.")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--study", default="embedded")
    parser.add_argument("--lengths", default="lengths")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "findings.md")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = document(options.reference, options.study, options.lengths)
    if options.check:
        same = options.out.is_file() and options.out.read_text(encoding="utf-8") == text
        if not same:
            print(f"{options.out} is not what the tables say: run python {sys.argv[0]}")
        return int(not same)
    options.out.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
