"""Loops over parts of a range, on as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    # Kept, since starting a thread takes longer than many of these loops.
    return ThreadPoolExecutor(count)


if hasattr(os, "register_at_fork"):
    # After a fork the pool's threads do not exist in the child.
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def over_threads(loop: Callable[[int, int], None], count: int) -> None:
    """Call loop(low, high) for parts of range(count), on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        loop(0, count)
        return
    # More parts than threads, since the work per part varies: a thread that finishes takes the next.
    number = min(4 * threads, count)
    parts = iter([(count * i // number, count * (i + 1) // number) for i in range(number)])

    def work() -> None:
        for low, high in parts:
            loop(low, high)

    others = [_helpers(threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


def over_items(function: Callable[..., None], *items: Iterable[Any]) -> None:
    """Call function(*row) for each row of zip(*items), on as many threads as torch uses."""
    rows = list(zip(*items, strict=True))

    def loop(low: int, high: int) -> None:
        for row in rows[low:high]:
            function(*row)

    over_threads(loop, len(rows))
