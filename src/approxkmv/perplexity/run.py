"""Perplexity with each method and setting beside the exact one: the table and its record."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from approxkmv.attention import Method, UnavailableError
from approxkmv.config import CorpusEntry
from approxkmv.corpora import read_corpus
from approxkmv.files import write_csv, write_json
from approxkmv.perplexity.layers import parse_layers
from approxkmv.perplexity.model import CausalModel
from approxkmv.perplexity.replacement import Replacement


def measure_perplexity(
    model: CausalModel,
    name: str,
    corpus: CorpusEntry,
    *,
    tokens: Sequence[int],
    methods: Sequence[tuple[Method, dict[str, Any]]],
    layers: str,
    seed: int,
    out: Path,
    record: dict[str, Any],
    say: Callable[[str], None],
    require_all: bool,
) -> None:
    """Write one row per length, method and setting to `out`, and beside it the record as JSON.

    Args:
        name: of the model, for the table. corpus: its documents are joined; the text begins with its first.
        tokens: lengths; each text is the beginning of the longest. methods: those of chosen_methods.
        layers: "all", or as 0,5-9. seed: of the methods.
        record: who made it, of provenance.describe. say: told of each row.
        require_all: a method that cannot run is an error; else its reason stands in its row.
    Raises:
        InputError: layers or lengths that the model has not. UnavailableError, CaptureError: as said above.
    """
    import pandas as pd

    wanted = parse_layers(layers, model.n_layers)
    documents = [document.context for document in read_corpus(corpus.source, corpus.sha256)]
    ids = model.tokens(documents, max(tokens))
    rows: list[dict[str, Any]] = []
    for count in sorted(set(tokens)):
        text = ids[:count]
        # The first run of a length also pays for its memory, and does not count.
        for _ in range(2):
            exact = model.perplexity(text, Replacement(None, {}, wanted, seed))
        say(f"n = {count:,}: exact perplexity {exact.perplexity:.4g} in {exact.seconds:.1f} s")
        for method, parameters in methods:
            row: dict[str, Any] = {
                "model": name,
                "corpus": corpus.name,
                "tokens": count,
                "method": method.name,
                "parameters": json.dumps(parameters),
                "layers": len(wanted),
                "seed": seed,
                "exact_perplexity": exact.perplexity,
                "exact_seconds": exact.seconds,
                "exact_attention_seconds": exact.attention_seconds,
            }
            try:
                found = model.perplexity(text, Replacement(method, parameters, wanted, seed))
            except UnavailableError as error:
                if require_all:
                    raise
                rows.append(row | {"unavailable": str(error)})
                say(f"n = {count:,}: {error}")
                continue
            rows.append(
                row
                | {
                    "perplexity": found.perplexity,
                    "ratio": found.perplexity / exact.perplexity,
                    "seconds": found.seconds,
                    "attention_seconds": found.attention_seconds,
                    "unavailable": "",
                }
            )
            say(
                f"n = {count:,}: {method.name} {json.dumps(parameters)} perplexity {found.perplexity:.4g} in "
                f"{found.seconds:.1f} s"
            )
    columns = ["model", "corpus", "tokens", "method", "parameters", "layers", "seed", "perplexity", "exact_perplexity"]
    columns += ["ratio", "seconds", "exact_seconds", "attention_seconds", "exact_attention_seconds", "unavailable"]
    write_csv(out, pd.DataFrame(rows, columns=columns))
    write_json(out.with_suffix(".json"), record)
