"""Perplexity with each method and setting, beside the exact one: the table and its record."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from approxkmv.attention import Method, UnavailableError
from approxkmv.compute.trial import decisions
from approxkmv.config import CorpusEntry
from approxkmv.config import Perplexity as Settings
from approxkmv.corpora import read_corpus
from approxkmv.errors import InputError, NonFiniteError
from approxkmv.files import check_writable, write_csv, write_json
from approxkmv.partial import PartialTable
from approxkmv.perplexity.layers import parse_layers
from approxkmv.perplexity.model import CausalModel, Perplexity
from approxkmv.perplexity.plan import Plan
from approxkmv.perplexity.replacement import OfLayers, Replacement
from approxkmv.perplexity.settings import chosen_methods
from approxkmv.sweep.measure import machine, quartiles, running_out_of_memory


@dataclass(frozen=True)
class Run:
    """What computes the attention of one row of the table, under which name."""

    name: str
    shown: dict[str, Any]
    """Its parameters, for the table."""
    method: Method | OfLayers | None
    parameters: dict[str, Any] = field(default_factory=dict)


def measure_perplexity(
    model: CausalModel,
    name: str,
    corpus: CorpusEntry,
    settings: Settings,
    *,
    plan: Plan | None = None,
    out: Path,
    record: dict[str, Any],
    say: Callable[[str], None],
    require_all: bool,
) -> None:
    """Write one row per length, method and setting to `out`, with the record beside it as JSON.

    Finished lengths are kept in OUT.part until all are done; a run with the same settings, model, text and code on the
    same kind of machine resumes after them, and the record lists them.

    Args:
        name: of the model, for the table. corpus: its documents are joined, starting with the first.
        settings: its tokens, methods, layers, seed and repeats count; each text is the beginning of the longest.
        plan: runs as one more method. record: how it was made, from provenance.describe.
        say: receives a line for each row.
        require_all: whether a method that cannot run is an error; if not, its row gives the reason.
    Raises:
        TableError: a file cannot be written. InputError: layers or lengths that the model does not have, a plan for
        other weights, or as chosen_methods. NonFiniteError: the model's own logits are not finite. UnavailableError,
        CaptureError: as above.
    """
    import pandas as pd

    check_writable(out, out.with_suffix(".json"))
    weights = model.identity()
    if plan is not None and plan.model != weights:
        raise InputError(f"the plan is for other weights than those of {name}: make it again with approxkmv plan")
    methods, seed, repeats = chosen_methods(settings.methods), settings.seed, settings.repeats
    wanted, lengths = parse_layers(settings.layers, model.n_layers, model.attending), sorted(set(settings.tokens))
    for count in lengths:
        model.check_length(count)
    documents = [document.context for document in read_corpus(corpus.source, corpus.sha256)]
    ids = model.tokens(documents, lengths[-1])
    asked = {"methods": [(method.name, parameters) for method, parameters in methods], "layers": wanted, "seed": seed}
    asked["repeats"] = repeats
    asked["plan"] = asdict(plan) if plan else None
    asked |= {"name": name, "corpus": corpus.name, "tokens": lengths, "require_all": require_all}
    here = {**machine(str(model.device)), "transformers": importlib.metadata.version("transformers")}
    identity = {"settings": asked, "model": weights, "text": ids, "machine": here}
    partial = PartialTable(out, identity, say)
    earlier = len(partial.cases)
    runs = [Run(method.name, parameters, method, parameters) for method, parameters in methods]
    if plan is not None:
        runs.append(Run("plan", {"target": plan.target, "tokens": plan.tokens, "heads": plan.heads_by_method()}, plan))
    for count in lengths[earlier:]:
        common = {"model": name, "corpus": corpus.name, "tokens": count, "layers": len(wanted), "seed": seed}
        rows = _rows_of_length(model, ids[:count], runs, wanted, seed, repeats, say, require_all)
        partial.add({"rows": [common | row for row in rows]})
    columns = ["model", "corpus", "tokens", "method", "parameters", "layers", "seed", "perplexity", "exact_perplexity"]
    times = ("seconds", "exact_seconds", "attention_seconds", "exact_attention_seconds")
    columns += ["ratio", *(f"{name}{part}" for name in times for part in ("_q1", "", "_q3")), "repeats"]
    columns += ["recomputed_share", "unavailable"]
    write_csv(out, pd.DataFrame([row for case in partial.cases for row in case["rows"]], columns=columns))
    write_json(out.with_suffix(".json"), record | {"tokens_of_earlier_runs": lengths[:earlier], "trials": decisions()})
    partial.remove()


def _rows_of_length(
    model: CausalModel,
    text: Sequence[int],
    runs: Sequence[Run],
    layers: Sequence[int],
    seed: int,
    repeats: int,
    say: Callable[[str], None],
    require_all: bool,
) -> list[dict[str, Any]]:
    """The measurements on one text, a row for each run."""

    def measured(run: Run, say: Callable[[str], None] = say) -> Perplexity:
        with running_out_of_memory(f"{run.name}, at {len(text):,} tokens,"):
            found = model.perplexity(text, Replacement(run.method, run.parameters, layers, seed))
        words = f"{run.name} {json.dumps(run.shown)} perplexity" if run.method else "exact perplexity"
        say(f"n = {len(text):,}: {words} {found.perplexity:.4g} in {found.seconds:.1f} s")
        return found

    itself = Run("the model itself", {}, None)
    reasons: dict[int, str] = {}
    exact: list[Perplexity] = []
    passes: list[list[Perplexity]] = [[] for _ in runs]
    try:
        # The first pass of a length also allocates its memory, and does not count.
        measured(itself, lambda line: None)
        for _ in range(repeats):
            exact.append(measured(itself))
            for number, run in enumerate(runs):
                if number in reasons:
                    continue
                try:
                    passes[number].append(measured(run))
                except (UnavailableError, NonFiniteError) as error:
                    if require_all:
                        raise
                    reasons[number] = str(error)
                    say(f"n = {len(text):,}: {run.name}: {error}")
    except UnavailableError as error:
        if require_all:
            raise
        say(f"n = {len(text):,}: {error}")
        reasons = dict.fromkeys(range(len(runs)), str(error))
    rows = []
    for number, run in enumerate(runs):
        row: dict[str, Any] = {"method": run.name, "parameters": json.dumps(run.shown)}
        if exact:
            row |= {"exact_perplexity": exact[0].perplexity} | _times("exact_", exact)
        if number in reasons:
            rows.append(row | {"unavailable": reasons[number]})
            continue
        found = passes[number][0]
        row |= {"perplexity": found.perplexity, "ratio": found.perplexity / exact[0].perplexity, "repeats": repeats}
        rows.append(row | _times("", passes[number]) | {"recomputed_share": found.recomputed_share, "unavailable": ""})
    return rows


def _times(prefix: str, passes: Sequence[Perplexity]) -> dict[str, float]:
    """Median and quartiles of the seconds of some passes."""
    found: dict[str, float] = {}
    for name in ("seconds", "attention_seconds"):
        taken = quartiles([getattr(one, name) for one in passes])
        found |= {f"{prefix}{name}{end}": value for end, value in zip(("_q1", "", "_q3"), taken, strict=True)}
    return found
