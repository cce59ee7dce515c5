"""Tests decide which form of a computation runs, not a trial, whose outcome depends on the machine and its load."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from approxkmv.progress import LOG


@pytest.fixture(autouse=True)
def _no_trials() -> Iterator[None]:
    """Compiled loops where there are any, and bfloat16 in those that have it; other products as tests ask for them."""
    from approxkmv.compute.trial import forced

    blocks = "attention.blocks.trials"
    near = {f"{blocks}.near_keys_{width}_columns": "bfloat16" for width in ("few", "many")}
    compiled = dict.fromkeys((f"{blocks}.loops", "attention.searched.trials.pairs"), "compiled")
    with forced({f"{blocks}.products": "float32", **compiled, **near}):
        yield


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The project's log without handlers, since this process is not the command line, whose commands leave some."""
    monkeypatch.setattr(logging, "raiseExceptions", True)
    yield LOG
    for handler in LOG.handlers:
        handler.close()
    LOG.handlers.clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For inputs that are too small for threads, which only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
