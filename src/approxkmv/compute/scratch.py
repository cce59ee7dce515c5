"""Memory that is used again from call to call."""

from __future__ import annotations

import math
import threading

import torch

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
