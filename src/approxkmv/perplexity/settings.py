"""The options of one perplexity run, as keys of a study's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from approxkmv.attention import get
from approxkmv.errors import InputError
from approxkmv.typed import shown

if TYPE_CHECKING:
    from approxkmv.attention import Method


def from_options(tokens: str, method: str, parameters: str) -> dict[str, Any]:
    """The keys of a study's perplexity that are lists or mappings, from the text of options. Raises InputError."""
    try:
        lengths = [int(word) for word in tokens.split(",")]
    except ValueError:
        raise InputError(f"tokens is {shown(tokens)}: write lengths separated by commas, like 1024,2048") from None
    try:
        given = json.loads(parameters)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise InputError(f"parameters is {shown(parameters)}, which is not JSON: {reason}") from error
    if not isinstance(given, dict):
        raise InputError(f"parameters is {shown(parameters)}: write a JSON object, such as '{{\"samples\": 32}}'")
    return {"tokens": lengths, "methods": {method: [given]}}


def chosen_methods(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[Method, dict[str, Any]]]:
    """Each method with each of its settings, completed with defaults.

    Raises InputError for an unknown method or parameter, UnavailableError for a method without a causal form.
    """
    found = []
    for name, settings in methods.items():
        method = get(name)
        method.causal_form()
        found += [(method, method.parameters(given)) for given in settings]
    return found
