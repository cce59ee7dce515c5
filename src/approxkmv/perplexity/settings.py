"""The options of one run of perplexity, as a study would give them."""

from __future__ import annotations

import json
from typing import Any

from approxkmv.errors import InputError


def from_options(
    *, model: str, corpus: str, tokens: str, layers: str, method: str, parameters: str, seed: int
) -> dict[str, Any]:
    """What the schema's studies.NAME.perplexity holds, from the words of a command line. Raises InputError."""
    try:
        lengths = [int(word) for word in tokens.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 2:
        raise InputError(f"tokens is {tokens!r}: write lengths of 2 or more, separated by commas, as 1024,2048")
    try:
        given = json.loads(parameters)
    except json.JSONDecodeError as error:
        raise InputError(f"parameters is {parameters!r}, which is no JSON: {error.msg}") from error
    if not isinstance(given, dict):
        raise InputError(f"parameters is {parameters!r}: write a JSON object, as '{{\"samples\": 32}}'")
    return {
        "model": model,
        "corpus": corpus,
        "tokens": lengths,
        "layers": layers,
        "methods": {method: [given]},
        "seed": seed,
        "dtype": "float32",
        "device": "cpu",
    }
