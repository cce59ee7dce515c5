"""What the keys of the configuration say of themselves: a JSON Schema for editors, and a document to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import getdoc, signature
from typing import Any, Literal, get_args, get_origin

from pydantic.json_schema import GenerateJsonSchema

from approxkmv.config.keys import Configuration
from approxkmv.typed import hints, in_words

INTRODUCTION = """# Configuration

`config.yaml` holds models, texts, sweeps of attention methods, and the studies that bring them together. Its key
`study` names the study that runs; run another with

    snakemake --cores all --config study=paper

A study can be short, since every key has a default but those marked as required:

    studies:
      mine:
        models: [minilm-l6, smollm2-135m]
        corpus: squad-dev

`approxkmv config check` reads the file, checks that what it names exists, and prints what the study would do without
fetching anything. A wrong key or value stops a run before its first job, with one line that gives its place and the
nearest valid word. No key may stand twice in one place; YAML's anchors and aliases (`&name`, `*name`) work as usual.

In the headings below NAME is a name of your own choice, made of letters, digits, dots and hyphens, and N a place in a
list. This document is generated from the code that reads the configuration (`approxkmv config document`), as is
[config.schema.yaml](../workflow/schemas/config.schema.yaml) (`approxkmv config schema`), a JSON Schema with which an
editor can complete and check the file as you type.
"""


class _Schema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def dict_schema(self, schema: Any) -> Any:
        # pydantic writes patternProperties, which let every other name pass.
        found = super().dict_schema(schema)
        for pattern, item in found.pop("patternProperties", {}).items():
            found |= {"propertyNames": {"pattern": pattern}, "additionalProperties": item}
        return found


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration."""
    schema = Configuration.model_json_schema(schema_generator=_Schema)
    return {"$schema": _Schema.schema_dialect, **schema}


def schema_text() -> str:
    """The JSON Schema as YAML."""
    import yaml

    head = "# Made by `approxkmv config schema`; the keys are told in src/approxkmv/config/keys.py.\n"
    return head + yaml.safe_dump(json_schema(), sort_keys=False, allow_unicode=True, width=116)


def document() -> str:
    """docs/configuration.md: a table of keys for each part of a configuration."""
    schema = json_schema()
    parts, every = [INTRODUCTION], list(sections())
    for place, kind in every:
        described = schema if kind is Configuration else schema["$defs"][kind.__name__]
        rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for name in _names(kind):
            key = described["properties"][name]
            default = "required" if name in described.get("required", ()) else f"`{json.dumps(key.get('default', {}))}`"
            below = next((inner for inner, _ in every if inner[: len(place) + 1] == (*place, name)), None)
            shown = f"[`{name}`](#{''.join(below).lower()})" if below else f"`{name}`"
            cells = (shown, in_words(hints(kind)[name]), default, " ".join(key["description"].split()))
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        heading = f"## `{'.'.join(place)}`" if place else "## The whole file"
        parts.append("\n".join([heading, "", " ".join((getdoc(kind) or "").split()), "", *rows, ""]))
    return "\n".join(parts)


def keys_at(place: Sequence[Any]) -> Iterable[str]:
    """The keys that there are at a place of a configuration, as ["studies", "embedded"]."""
    for pattern, kind in sections():
        if len(pattern) == len(place) and all(
            step in (part, "NAME", "N") for step, part in zip(pattern, place, strict=True)
        ):
            return _names(kind)
    return ()


def sections(kind: Any = Configuration, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every class of keys, with the place in a configuration where it stands."""
    yield place, kind
    for name in _names(kind):
        inner, steps = hints(kind)[name], (*place, name)
        while get_args(inner) and get_origin(inner) is not Literal:
            steps += {Mapping: ("NAME",), tuple: ("N",)}.get(get_origin(inner), ())
            inner = get_args(inner)[get_origin(inner) is Mapping]
        if getattr(inner, "__module__", "").startswith("approxkmv."):
            yield from sections(inner, steps)


def _names(kind: Any) -> Iterable[str]:
    return signature(kind).parameters
