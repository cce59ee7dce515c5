"""Compiled loops where numba is installed, and nothing where it is not."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType

import torch


@cache
def _module() -> ModuleType | None:
    try:
        import numba  # noqa: F401
    except ImportError:
        return None
    from approxkmv.attention import compiled

    return compiled


def compiled_loops() -> ModuleType | None:
    """The module `compiled`, or None without numba."""
    return _module()


def over_threads(loop: Callable[[int, int], None], count: int) -> None:
    """Call loop(low, high) for parts of range(count), on as many threads as torch has."""
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        loop(0, count)
        return
    # More parts than threads, since the parts are of unequal work
    edges = [count * i // (4 * threads) for i in range(4 * threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(loop, edges[:-1], edges[1:]))
