"""The tables and numbers of docs/findings.md, from the studies embedded, families, sentences, articles and lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import pandas as pd
import yaml
from reference import REFERENCE, ROOT, machine, markdown, number

from approxkmv.figures.gauge import NEEDED_POWER
from approxkmv.kmv.complexity import bound_exponents
from approxkmv.results.tables import MASKED, ModelTables, masks_of
from approxkmv.statistics.gauge import TOLERANCE
from approxkmv.statistics.growth import FAST, FLAT, FLOOR, PAPER_BOUND, SIZES, TRENDS

MINILM, SMOLLM = "minilm-l6", "smollm2-135m"
SHORT = {MINILM: "MiniLM", SMOLLM: "SmolLM2"}
ENTRIES = {"": "all", MASKED: "causal"}
FAMILIES = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))["studies"]["families"]["models"]
# Study and model of each growth measurement.
GROWTH = (("articles", MINILM), ("articles", SMOLLM), ("lengths", SMOLLM))
READ = {
    "printed": "Lemma 4.1, scale s = 1/√d",
    "sigma": "section 1: 2σ for 2σ², scale √s",
    "unscaled": "scale 1",
    "float32": "entries as float32",
    "softmax": "D⁻¹A, at full length",
    "centred": "keys less their mean",
    "balanced": "q and k of equal size",
    "no-special": "without CLS, SEP, BOS",
    "sentences": "sentences, from 10 tokens on",
}


@cache
def table_of(study: str, name: str) -> pd.DataFrame:
    return pd.read_csv(REFERENCE / study / "tables" / f"{name}.csv")


def readings(model: str) -> str:
    """c and the order ratios under each reading, of contexts and one of sentences, and kind of entries."""
    of_contexts, of_sentences = (table_of(study, f"readings_{model}") for study in ("embedded", "sentences"))
    table = pd.concat([of_contexts, of_sentences[of_sentences["reading"] == "sentences"]], ignore_index=True)
    table = table.sort_values("entries", kind="stable")
    by_name = table[table["entries"] == "all"].set_index("reading")[["largest_ratio", "median_ratio", "median_next"]]
    read = dict(READ)
    if by_name.loc["no-special"].equals(by_name.loc["printed"]):
        read["no-special"] = "these texts have none"
    shown = pd.DataFrame(
        {
            "reading": [
                f"{name}: {read[name]}" if entries == "all" else f"{name}, {entries}"
                for name, entries in zip(table["reading"], table["entries"], strict=True)
            ],
            "texts": table["texts"],
            "largest c": table["largest_ratio"].map(number),
            f"heads with c ≤ {PAPER_BOUND:g}": [
                f"{within} of {heads}"
                for within, heads in zip(table["heads_within_bound"], table["heads"], strict=True)
            ],
            "median c": table["median_ratio"].map(number),
            "K_(n)/K_(n+1)": table["median_next"].map(number),
            "K_(n)/K_(2n)": table["median_double"].map(number),
            "K_(2n) is 0 in float32": table["share_underflowing"].map("{:.0%}".format),
        }
    )
    return markdown(shown) + "\n"


def families() -> str:
    """The two scales that the paper prints, for every model of the study families."""
    lines = []
    for model in FAMILIES:
        table = table_of("families", f"readings_{model}")
        label = json.loads((REFERENCE / "families" / "tables" / f"overview_{model}.json").read_text("utf-8"))["label"]
        for row in table[table["reading"].isin(["printed", "sigma"])].to_dict("records"):
            lines.append(
                {
                    "model": label.partition(" (")[0],
                    "entries": "all" if row["entries"] == "all" else "its attention's",
                    "scale": READ[row["reading"]].partition(":")[0].partition(",")[0],
                    "largest c": number(row["largest_ratio"]),
                    f"heads with c ≤ {PAPER_BOUND:g}": f"{row['heads_within_bound']} of {row['heads']}",
                    "K_(n)/K_(n+1)": number(row["median_next"]),
                    "K_(n)/K_(2n)": number(row["median_double"]),
                    "K_(2n) is 0 in float32": f"{row['share_underflowing']:.0%}",
                }
            )
    return markdown(pd.DataFrame(lines)) + "\n"


def gauge(model: str) -> str:
    """Medians over heads at each t."""
    table = pd.read_csv(ModelTables(REFERENCE / "embedded" / "tables", model).gauge)
    lines = []
    for t, rows in table.groupby("t"):
        medians = rows.select_dtypes("number").median()
        lines.append(
            {
                "t": f"{t:g}" if t else "→ 0 (A)",
                "median c": number(medians["ratio"]),
                "largest c": number(rows["ratio"].max()),
                f"heads with c ≤ {PAPER_BOUND:g}": int((rows["ratio"] <= PAPER_BOUND).sum()),
                "rows that carry K": f"{medians['participation']:.0f}",
                "log₁₀ largest row sum": _tenths(medians["log10_largest_row"]),
                "log₁₀ ‖K‖₂": _tenths(medians["log10_norm"]),
                "log₁₀ ε*": _tenths(medians["log10_bound"]),
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


def _tenths(value: float) -> str:
    return f"{value:.1f}".replace("-", "−") if np.isfinite(value) else "–"


def _errors(model: str, best: bool) -> pd.DataFrame:
    """Per head, the row at t = 1, or at the t that tolerates the largest error."""
    table = pd.read_csv(ModelTables(REFERENCE / "embedded" / "tables", model).gauge).dropna(subset="log10_bound")
    if not best:
        return table[table["t"] == 1.0]
    return table.loc[table.groupby(["layer", "head"])["log10_bound"].idxmax()]


def tolerances() -> str:
    """The error in a product with K that attention tolerates, compared with trivial answers."""
    lines = []
    for model in (MINILM, SMOLLM):
        for best in (False, True):
            rows = _errors(model, best)
            lines.append(
                {
                    "model": f"{SHORT[model]}, {rows['entries'].iloc[0]}",
                    "t": "best of each head" if best else "1",
                    "log₁₀ ε that suffices": _tenths(rows["log10_sufficient"].median()),
                    "log₁₀ ε*: median": _tenths(rows["log10_bound"].median()),
                    "log₁₀ ε*: largest head": _tenths(rows["log10_bound"].max()),
                    "log₁₀ ε: y = 0 for x = ones": _tenths(rows["log10_zero_for_ones"].median()),
                    "log₁₀ ε: y = 0 for all x": _tenths(rows["log10_norm"].median()),
                    "mean(v) is within 0.1": f"{(rows['mean_error'] <= 0.1).sum()} of {len(rows)} heads",
                }
            )
    return markdown(pd.DataFrame(lines)) + "\n"


def _growth() -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Study, model, the prefix of the columns, and the columns without it."""
    for study, model in GROWTH:
        table = table_of(study, f"growth_{model}")
        for before in masks_of(table, "exponent"):
            part = table[[name for name in table if name.startswith(before)]] if before else table
            yield study, model, before, part.set_axis([name.removeprefix(before) for name in part], axis=1)


def _name(model: str, before: str) -> str:
    return f"{SHORT[model]}, {ENTRIES[before]}"


def _counts(column: pd.Series, words: tuple[str, ...]) -> str:
    return " / ".join(str(int((column == word).sum())) for word in (words[0], words[2], words[1]))


def verdicts() -> str:
    """Size and trend at the longest length."""
    lines = []
    for _, model, before, rows in _growth():
        first = rows.iloc[0]
        lines.append(
            {
                "model, entries": _name(model, before),
                "n": f"{first['length']:,}",
                "texts": first["texts"],
                "size: small / undecided / large": _counts(rows["size"], SIZES),
                "trend: flat / undecided / grows": _counts(rows["trend"], TRENDS),
                f"exponent > {FLAT:g}": int((rows["exponent"] > FLAT).sum()),
                f"exponent > {FAST:g}": int((rows["exponent"] > FAST).sum()),
                "largest c(n)": number(rows["ratio"].max()),
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


def predictions() -> str:
    """Predictions for n from the lengths up to n/4."""
    lines = []
    for _, model, before, rows in _growth():
        factor = rows["predicted_ratio"] / rows["ratio"]
        held = rows["exponent"].between(rows["predicted_low"], rows["predicted_high"]).mean()
        lines.append(
            {
                "model, entries": _name(model, before),
                "n": f"{rows['length'].iloc[0]:,}",
                "predicted / measured c(n): median": f"{factor.median():.2f}",
                "middle half of heads": f"{factor.quantile(0.25):.2f} to {factor.quantile(0.75):.2f}",
                "within a factor of 2": f"{(np.abs(np.log2(factor)) <= 1).mean():.0%}",
                "wrong by more than 10": f"{(np.abs(np.log10(factor)) > 1).mean():.0%}",
                "later exponents in their 95 % interval": f"{held:.0%}",
                "its median width": f"{(rows['predicted_high'] - rows['predicted_low']).median():.2f}",
            }
        )
    return markdown(pd.DataFrame(lines)) + "\n"


def foretold() -> str:
    """Of all heads of these tables, how many have a predicted interval above what counts as growth."""
    above = [rows["predicted_low"] > FLAT for *_, rows in _growth()]
    return f"{sum(some.sum() for some in above)} of {sum(map(len, above)):,}"


def flat_foretold() -> str:
    """And how many one of no growth."""
    count = sum(int((rows["predicted_high"] <= FLAT).sum()) for *_, rows in _growth())
    return f"{count}" if count else "none"


def families_growing() -> str:
    """On how many heads of the study families c grows, over all entries."""
    tables = [table_of("families", f"growth_{model}") for model in FAMILIES]
    return f"{sum(int((t['trend'] == TRENDS[1]).sum()) for t in tables)} of {sum(map(len, tables))}"


def families_length() -> str:
    """And at which length."""
    lengths = {int(n) for model in FAMILIES for n in table_of("families", f"growth_{model}")["length"]}
    return " to ".join(f"{n:,}" for n in sorted({min(lengths), max(lengths)}))


def costs() -> str:
    """The cost bound's exponent with each head's exponent, with beta as printed and rebalanced."""
    lines = []
    for _, model, before, rows in _growth():
        line = {"model, entries": _name(model, before), "n": f"{rows['length'].iloc[0]:,}"}
        for name, rebalanced in (("β as printed", False), ("β rebalanced", True)):
            exponents = bound_exponents(rows["exponent"].to_numpy(), rebalanced=rebalanced)
            line[f"median, {name}"] = f"{np.median(exponents):.2f}"
            line[f"below 2, {name}"] = f"{(exponents < 2).sum()} of {len(rows)}"
        high = bound_exponents(rows["exponent_high"].to_numpy(), rebalanced=True)
        lines.append(line | {"the same at the exponent's upper end": int((high < 2).sum())})
    return markdown(pd.DataFrame(lines)) + "\n"


def models() -> str:
    """Models, studies and what was measured."""
    lines = []
    places: dict[str, list[str]] = {}
    for study, model in (("embedded", MINILM), ("embedded", SMOLLM), *(("families", m) for m in FAMILIES), *GROWTH):
        folder = REFERENCE / study / "tables"
        path = ModelTables(folder, model).facts
        facts = json.loads(path.read_text(encoding="utf-8"))
        places.setdefault(machine(path), []).append(f"`{study}`")
        lines.append(
            {
                "model": facts["label"],
                "study": study,
                "texts": facts["texts_used"],
                "of": facts["corpus"],
                "heads": facts["layers"] * facts["heads"],
                "largest n": f"{facts['tokens_max'] if 'tokens_max' in facts else max(facts['lengths']):,}",
            }
        )
    made = "; ".join(f"{', '.join(dict.fromkeys(studies))}: {place}" for place, studies in places.items())
    return f"{markdown(pd.DataFrame(lines))}\n\n{made}.\n"


def _reading(study: str, model: str, name: str, entries: str, column: str) -> str:
    table = table_of(study, f"readings_{model}")
    row = table[(table["reading"] == name) & (table["entries"] == entries)].iloc[0]
    if column == "heads_within_bound":
        return f"{row[column]} of {row['heads']}"
    return f"{row[column]:.0%}" if column == "share_underflowing" else number(row[column])


def _at(model: str, t: float, what: Callable[[pd.DataFrame], str]) -> str:
    table = pd.read_csv(ModelTables(REFERENCE / "embedded" / "tables", model).gauge)
    return what(table[table["t"] == t])


def _of_growth(study: str, model: str, before: str, what: Callable[[pd.DataFrame], str]) -> str:
    return next(what(rows) for *place, rows in _growth() if place == [study, model, before])


def _count(rows: pd.DataFrame, found: pd.Series) -> str:
    return f"{int(found.sum())} of {len(rows)}"


TABLES: dict[str, Callable[[], str]] = {
    **{f"readings-{model}": partial(readings, model) for model in (MINILM, SMOLLM)},
    **{f"gauge-{model}": partial(gauge, model) for model in (MINILM, SMOLLM)},
    "readings-families": families,
    "gauge-errors": tolerances,
    "growth-verdicts": verdicts,
    "growth-predictions": predictions,
    "growth-costs": costs,
    "findings-models": models,
}
# Rows of tables of readings for numbers in sentences, by the first words of a name: study, model, reading, entries.
ROWS = {
    **{
        f"minilm-{reading}": ("embedded", MINILM, reading, "all")
        for reading in ("printed", "sigma", "unscaled", "softmax", "no-special")
    },
    "smollm-sigma": ("families", SMOLLM, "sigma", "all"),
    "smollm-causal-sigma": ("families", SMOLLM, "sigma", "causal"),
    "mpnet-sigma": ("families", "mpnet-base", "sigma", "all"),
}
COLUMNS = {
    "largest": "largest_ratio",
    "within": "heads_within_bound",
    "double": "median_double",
    "underflow": "share_underflowing",
}
# Numbers within sentences, by name.
NUMBERS: dict[str, Callable[[], str]] = {
    **{
        f"{words}-{name}": partial(_reading, *row, column)
        for words, row in ROWS.items()
        for name, column in COLUMNS.items()
    },
    **{
        f"{word}-gauge-{name}-{t:g}": partial(_at, model, t, what)
        for word, model in (("minilm", MINILM), ("smollm", SMOLLM))
        for t in (1.0, 8.0)
        for name, what in (
            ("within", lambda rows: _count(rows, rows["ratio"] <= PAPER_BOUND)),
            ("rows", lambda rows: f"{rows['participation'].median():.0f}"),
            ("tokens", lambda rows: f"{rows['tokens'].iloc[0]:,}"),
            ("entries", lambda rows: rows["entries"].iloc[0]),
        )
    },
    **{
        f"{word}-error-best": lambda model=model: f"10^{_tenths(_errors(model, best=True)['log10_bound'].max())}"
        for word, model in (("minilm", MINILM), ("smollm", SMOLLM))
    },
    **{
        f"{study}-{word}-{ENTRIES[before]}-{name}": partial(_of_growth, study, model, before, what)
        for study, model in GROWTH
        for word in (SHORT[model].lower().removesuffix("2"),)
        for before in (("",) if model == MINILM else ("", MASKED))
        for name, what in (
            ("both", lambda rows: _count(rows, (rows["size"] == SIZES[1]) & (rows["trend"] == TRENDS[1]))),
            ("floored", lambda rows: _count(rows[rows["trend"] == TRENDS[0]], rows["ratio"] < 1.01 * FLOOR)),
            ("n", lambda rows: f"{rows['length'].iloc[0]:,}"),
        )
    },
    "growth-foretold": foretold,
    "growth-foretold-flat": flat_foretold,
    "families-growing": families_growing,
    "families-growing-at": families_length,
    "spread-error": lambda: number(
        max((10.0 ** rows["log10_bound"] * rows["tokens"] ** 0.5).max() for rows in (_errors(m, True) for m in SHORT))
    ),
    "needed": lambda: f"{8192**NEEDED_POWER:.2f}",
    # docs/math.md: no error of this size is borne where a softmax weight is larger.
    "needed-weight": lambda: f"{TOLERANCE / (8192**NEEDED_POWER * (1 + TOLERANCE * 8192**0.5)):.1%}",
}
