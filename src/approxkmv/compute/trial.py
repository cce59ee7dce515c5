"""Which of several forms of a computation is fastest here: measured once on each machine, not guessed from its CPU."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from approxkmv.errors import TableError
from approxkmv.files import cache_folder, check_writable, write_json
from approxkmv.imports import digest_of, files_behind
from approxkmv.provenance import instruction_settings, processor, versions

Runs = Mapping[str, Callable[[], object]]
"""What to time for each form."""

clock = time.perf_counter
# At least this many rounds, and more, up to the second number, only within these seconds: other processes disturb
# short runs the most.
_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 20, 0.1
# The first form, the plainest, stays unless another takes less than this share of its time: near a tie, noise decides.
_CLEARLY_FASTER = 0.9
# A form that took this many times the best so far, and more seconds than an interruption, is not timed again: products
# of bfloat16 numbers may be emulated.
_HOPELESS, _INTERRUPTED = 3.0, 0.03


@dataclass(frozen=True)
class Decision:
    """The form that is used, the seconds of each form that ran, and how they were found."""

    form: str
    seconds: dict[str, float]
    how: str


_decided: dict[tuple[str, int], Decision] = {}
_forced: dict[str, str] = {}
# One trial at a time: two would disturb each other.
_deciding = threading.Lock()
if hasattr(os, "register_at_fork"):
    # In the child of a fork its holder does not exist.
    os.register_at_fork(after_in_child=_deciding._at_fork_reinit)  # type: ignore[attr-defined]


class _Trial(threading.local):
    """What the trial that runs in this thread has it use, by question; None where none does."""

    forms: dict[str, str] | None = None


_trial = _Trial()


def fastest(question: str, *forms: str) -> str:
    """The fastest of the forms by a trial of under a second, the first of them unless another is clearly faster.

    The trial is made once for a processor, a number of threads, versions and sources, and kept in `cache_folder`; again
    where environment variables restrict a library to another CPU's instructions. Where nothing can be kept no trial is
    made, since processes might decide differently: the first form is used.

    Args:
        question: module and function that returns `Runs`, such as "attention.blocks.trials.products".
        forms: their names.
    """
    given = _forced | (_trial.forms or {})
    if question in given:
        return given[question]
    key = question, torch.get_num_threads()
    if key not in _decided:
        # A trial that asks another question is not over.
        with _deciding if _trial.forms is None else nullcontext():
            if key not in _decided:
                _decided[key] = _decide(question, forms)
    return _decided[key].form


def fastest_dtype(question: str, asked: str = "fastest") -> torch.dtype:
    """float32 or bfloat16: the one asked for, or by a trial whose forms are called so."""
    form = fastest(question, "float32", "bfloat16") if asked == "fastest" else asked
    return torch.bfloat16 if form == "bfloat16" else torch.float32


@contextmanager
def forced(forms: Mapping[str, str]) -> Iterator[None]:
    """Use these forms, by question, inside the block, in every thread; for tests."""
    before = dict(_forced)
    _forced.update(forms)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def by_form(question: str, run: Callable[[], object], *forms: str) -> Runs:
    """What to time where `run` itself asks the question: the same with each of its answers."""

    def with_form(form: str) -> None:
        before = _trial.forms
        _trial.forms = {**(before or {}), question: form}
        try:
            run()
        finally:
            _trial.forms = before

    return {form: partial(with_form, form) for form in forms}


def decisions() -> dict[str, dict[str, Any]]:
    """What this process decided, for the record of its results."""
    found: dict[str, dict[str, Any]] = {
        f"{question}, threads: {threads}": asdict(decision) for (question, threads), decision in _decided.items()
    }
    return found | {question: asdict(Decision(form, {}, "forced")) for question, form in _forced.items()}


def _decide(question: str, forms: tuple[str, ...]) -> Decision:
    path = _path(question, forms)
    try:
        if path is None:
            raise TableError("no home")
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["form"] in forms:
                return Decision(kept["form"], kept["seconds"], "by an earlier trial")
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass
        check_writable(path)
        # In a thread of its own, whose scratch memory and counts are not those of the call that asks.
        with ThreadPoolExecutor(1) as thread:
            seconds = thread.submit(_measure, question, _trial.forms or {}).result()
        form = min(seconds, key=lambda name: seconds[name])
        if forms[0] in seconds and not seconds[form] < _CLEARLY_FASTER * seconds[forms[0]]:
            form = forms[0]
        write_json(path, {"form": form, "seconds": seconds})
        return Decision(form, seconds, "by a trial")
    except TableError:
        return Decision(forms[0], {}, "without a trial, which could not be kept")


def _path(question: str, forms: tuple[str, ...]) -> Path | None:
    """The file of a decision, whose name holds all that it depends on."""
    folder = cache_folder()
    if folder is None:
        return None
    source = Path(__file__).resolve().parents[1].joinpath(*question.split(".")[:-1]).with_suffix(".py")
    sources = digest_of(files_behind(source))
    here = processor(), instruction_settings(), torch.get_num_threads(), sorted(versions().items())
    known = (question, forms, *here, sources)
    return folder / "trials" / f"{question}-{hashlib.sha256(repr(known).encode()).hexdigest()[:32]}.json"


def _measure(question: str, forms: dict[str, str]) -> dict[str, float]:
    """Seconds of each form, the least of a few rounds; forms that cannot run here are left out.

    forms: what the trial that asks has forced.
    """
    _trial.forms = forms
    module, name = question.rsplit(".", 1)
    runs: Runs = getattr(import_module(f"approxkmv.{module}"), name)()
    seconds: dict[str, float] = {}
    begun, order = clock(), random.Random(0)
    for turn in range(1 + _MOST_ROUNDS):
        if turn == 1:
            # The turn before may have compiled.
            begun = clock()
        if turn > _ROUNDS and clock() - begun > _SECONDS:
            break
        # Shuffled: in a fixed order, a busy processor's time slices could always interrupt the same form.
        for form in order.sample(sorted(runs), len(runs)):
            best = min(seconds.values(), default=0.0)
            if turn > 1 and not seconds.get(form, float("inf")) <= max(_HOPELESS * best, _INTERRUPTED):
                continue
            started = clock()
            try:
                runs[form]()
            except RuntimeError:
                # torch lacks the operation for this type.
                continue
            if turn:
                seconds[form] = min(clock() - started, seconds.get(form, float("inf")))
    return seconds
