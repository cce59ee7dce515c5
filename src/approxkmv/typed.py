"""What values an annotation admits: checked and described with the standard library alone.

pydantic reads the same annotations where a configuration is checked and where its schema is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from approxkmv.errors import did_you_mean

_ONE_AND_MANY: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "true or false"),
    NoneType: ("null", "null"),
}


@dataclass(frozen=True, eq=False)
class Rule:
    """A restriction on a value besides its type, as part of an Annotated: as words, as a check and as JSON Schema."""

    words: str
    holds: Callable[[Any], bool]
    schema: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core.core_schema import no_info_after_validator_function

        def check(value: Any) -> Any:
            if not self.holds(value):
                raise ValueError(f"give {in_words(source)}{self.words}")
            return value

        return no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(core) | self.schema


def at_least(least: int) -> Rule:
    """Of numbers from `least` on."""
    return Rule(f" of at least {least}", lambda value: value >= least, {"minimum": least})


def between(least: int, most: int) -> Rule:
    """Of numbers from `least` to `most`."""
    return Rule(f" from {least} to {most}", lambda value: least <= value <= most, {"minimum": least, "maximum": most})


def above(bound: float, below: float = float("inf")) -> Rule:
    """Of numbers above `bound` and below `below`."""
    words, schema = f" above {bound}", {"exclusiveMinimum": bound}
    if below < float("inf"):
        words, schema = f"{words} and below {below}", schema | {"exclusiveMaximum": below}
    return Rule(words, lambda value: bound < value < below, schema)


def each_once(least: int = 0) -> Rule:
    """For a list: at least this many values, without duplicates, which would count the same work twice."""
    words = ", each once" + f", at least {least} of them" * (least > 1)
    schema = {"uniqueItems": True} | ({"minItems": least} if least else {})
    return Rule(words, lambda values: least <= len(values) == len(set(values)), schema)


def at_least_one() -> Rule:
    """For a list or a mapping."""
    return Rule(", at least one", lambda values: len(values) > 0, {"minItems": 1, "minProperties": 1})


def like(pattern: str, words: str) -> Rule:
    """For a string: all of it matches a regular expression."""
    return Rule(f" {words}", lambda text: re.fullmatch(pattern, text) is not None, {"pattern": f"^{pattern}$"})


def hints(kind: Any) -> Mapping[str, Any]:
    """The fields of a class with their complete annotations."""
    return get_type_hints(kind, include_extras=True)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value satisfies an annotation. Lists count as tuples; booleans are not numbers."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, inner[0]) and all(rule.holds(value) for rule in inner[1:])
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def in_words(kind: Any, many: bool = False) -> str:
    """An annotation in words, for a message or a document."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return in_words(inner[0], many) + "".join(rule.words for rule in inner[1:] if isinstance(rule, Rule))
    if origin in (Union, UnionType):
        return ", or ".join(in_words(one, many) for one in inner)
    if origin is Literal:
        return " or ".join(", ".join(map(repr, inner)).rsplit(", ", 1))
    if origin is tuple and inner[-1] is not ...:
        return ("pairs of " if many else "a pair of ") + in_words(inner[0], many=True)
    if origin is tuple:
        return ("lists of " if many else "a list of ") + in_words(inner[0], many=True)
    if origin is Mapping:
        return f"{'mappings' if many else 'a mapping'} from names to {in_words(inner[1], many=True)}"
    return _ONE_AND_MANY.get(kind, ("a mapping", "mappings"))[many]


def advice(value: Any, kind: Any) -> str:
    """What to write instead of a value that does not fit."""
    if get_origin(kind) is Literal:
        return did_you_mean(value, get_args(kind), "there are", 0.4)
    return f"give {in_words(kind)}"


def shown(value: object) -> str:
    """A value as quoted in a message, cut if it is too long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
