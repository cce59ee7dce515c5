"""The options of one run of perplexity, as a study would give them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from approxkmv.attention import get
from approxkmv.errors import InputError
from approxkmv.sweep.settings import LARGEST_SEED

if TYPE_CHECKING:
    from approxkmv.attention import Method


def from_options(
    *, model: str, corpus: str, tokens: str, layers: str, method: str, parameters: str, seed: int
) -> dict[str, Any]:
    """What the schema's studies.NAME.perplexity holds, from the words of a command line. Raises InputError."""
    try:
        lengths = [int(word) for word in tokens.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 2:
        raise InputError(f"tokens is {_shown(tokens)}: write lengths of 2 or more, separated by commas, as 1024,2048")
    try:
        given = json.loads(parameters)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise InputError(f"parameters is {_shown(parameters)}, which is no JSON: {reason}") from error
    if not isinstance(given, dict):
        raise InputError(f"parameters is {_shown(parameters)}: write a JSON object, as '{{\"samples\": 32}}'")
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed is {_shown(seed)}: give a whole number from 0 to {LARGEST_SEED}")
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


def _shown(value: object) -> str:
    """A value as a message quotes it, cut where it is too long for that."""
    return textwrap.shorten(repr(value), 100)


def chosen_methods(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[Method, dict[str, Any]]]:
    """Each method with each of its settings, completed by its defaults.

    Raises InputError for an unknown method or parameter, UnavailableError for a method without a causal form.
    """
    found = []
    for name, settings in methods.items():
        method = get(name)
        method.causal_form()
        found += [(method, method.parameters(given)) for given in settings]
    return found
