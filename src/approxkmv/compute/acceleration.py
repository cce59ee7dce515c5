"""Compiled loops where numba is installed, and memory that is used again from call to call."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType

import torch


@cache
def _module() -> ModuleType | None:
    try:
        import numba
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return None  # as Python some of these loops do not run and the others take minutes
    from approxkmv.attention import compiled

    return compiled


def compiled_loops() -> ModuleType | None:
    """The module `compiled`, or None without numba and under NUMBA_DISABLE_JIT=1."""
    return _module()


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere such products are emulated and slow."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported()) and torch.backends.mkldnn.is_available()


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    # Kept, since to start a thread takes longer than many of these loops.
    return ThreadPoolExecutor(count)


if hasattr(os, "register_at_fork"):
    # A forked process has no threads but its own.
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def over_threads(loop: Callable[[int, int], None], count: int) -> None:
    """Call loop(low, high) for parts of range(count), on as many threads as torch has."""
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        loop(0, count)
        return
    # More parts than threads, since the parts are of unequal work: who is done takes the next one.
    number = min(4 * threads, count)
    parts = iter([(count * i // number, count * (i + 1) // number) for i in range(number)])

    def work() -> None:
        for low, high in parts:
            loop(low, high)

    others = [_helpers(threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


_buffers = threading.local()
# Set by tests: what is read before it is written shows as NaN.
_POISONED = False


def scratch(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uninitialised memory on the CPU, the same for each call with the same name in this thread.

    Memory fresh from the system costs a page fault for every 4 KiB, which is more than these loops take to fill it.
    What is written there holds until the next call of the method; an answer must not be scratch.
    """
    # A tensor made in inference mode may not be written outside of it.
    key = name, dtype, torch.is_inference_mode_enabled()
    held: dict[object, torch.Tensor] = _buffers.__dict__.setdefault("held", {})
    size = math.prod(shape)
    if key not in held or held[key].numel() < size:
        held[key] = torch.empty(size, dtype=dtype)
    if _POISONED:
        held[key].fill_(torch.nan)
    return held[key][:size].view(shape)
