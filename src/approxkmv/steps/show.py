"""What a run prints at its end: where the figures are, and the few numbers that matter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from approxkmv.config import Study, corpus_of
from approxkmv.errors import TableError
from approxkmv.files import read_json
from approxkmv.page.verdict import measured, sentences, sweep_sentence
from approxkmv.steps.cleaning import OF_PART, leftovers, study_in

# Where a sweep's files lie, which may be told from another folder.
LIES = ("cache", "path", "tuning_path")
# Their keys are names of methods, and not settings that a version before may lack.
BY_METHOD = ("methods", "parameters")


def lines(results: Path) -> list[str]:
    """The message for one study's results, limited to the models the study has now, if the folder says which.

    It also says what an unfinished run has not made, and which models and sweep it has not made again. Raises
    TableError when there are no tables.
    """
    tables = results / "tables"
    if not tables.is_dir():
        raise TableError(f"{results} has no tables: run the study first")
    out, left, study = [], leftovers(results), study_in(results)
    every = measured(tables, left=left)
    for facts in every:
        first, *rest = sentences(tables, facts)
        out += [first, *(f"  {line}" for line in [*rest, *_model_of_before(study, facts)])]
    if won := sweep_sentence(tables, left):
        out += [f"sweep: {won}", *(f"  {line}" for line in _part_of_before(study, "sweep", tables))]
    if study is not None:
        others = (part for part in OF_PART if part != "sweep")
        out += [f"{part}: {line}" for part in others for line in _part_of_before(study, part, tables)]
        models = {facts["model"] for facts in every}
        absent = [name for name in study.models if name not in models]
        absent += [part for part in OF_PART if getattr(study, part) and not (tables / f"{part}.csv").is_file()]
        out += [f"not made yet: {', '.join(absent)}"] if absent else []
    if left:
        names = ", ".join(str(path.relative_to(results)) for path in left[:3])
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        clean = shlex.join(["approxkmv", "clean", str(results)])
        out.append(f"of an earlier study: {names}{more}; `{clean}` removes them")
    figures = f"figures: {results / 'figures'}   " if (results / "figures").is_dir() else ""
    page = f"   page: {results / 'index.html'}" if (results / "index.html").is_file() else ""
    out.append(f"{figures}tables: {results / 'tables'}{page}")
    return out


def _model_of_before(study: Study | None, facts: dict[str, Any]) -> list[str]:
    if study is None or facts["model"] not in study.models:
        return []
    was = {"corpus": facts["corpus"], **_settings(facts.get("provenance"))}
    return _of_before(was, {"corpus": corpus_of(study).label, **study.conditions})


def _part_of_before(study: Study | None, part: str, tables: Path) -> list[str]:
    settings, record = getattr(study, part, None), tables / f"{part}.json"
    if settings is None or not record.is_file():
        return []
    now = settings.with_capture(None, None).as_dict() if part == "sweep" else settings.model_dump()
    return _of_before(_settings(read_json(record)), json.loads(json.dumps(now)), LIES if part == "sweep" else ())


def _settings(record: Any) -> dict[str, Any]:
    found = record.get("settings") if isinstance(record, dict) else None
    return found if isinstance(found, dict) else {}


def _of_before(was: Mapping[str, Any], now: Mapping[str, Any], lies: Sequence[str] = ()) -> list[str]:
    """A line if a study's settings, but for where files lie, have changed since a result was made."""
    changed = [name for name in now if name in was and name not in lies and _differ(name, was[name], now[name], lies)]
    return [f"made with other settings than the study's now ({', '.join(changed)}): run it again"] if changed else []


def _differ(name: str, was: Any, now: Any, lies: Sequence[str]) -> bool:
    if isinstance(was, dict) and isinstance(now, dict):
        if name in BY_METHOD and was.keys() != now.keys():
            return True
        # A version before may lack a key.
        return any(_differ(key, was[key], now[key], lies) for key in (was.keys() & now.keys()) - {*lies})
    if isinstance(was, list) and isinstance(now, list):
        return len(was) != len(now) or any(_differ(name, *pair, lies) for pair in zip(was, now, strict=True))
    return bool(was != now)
