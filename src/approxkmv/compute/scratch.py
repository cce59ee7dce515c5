"""Memory that is reused from call to call."""

from __future__ import annotations

import math
import threading

import torch

_buffers = threading.local()
# Set by tests: fills scratch with NaN, or -1, so that reading before writing shows.
_POISONED = False


def scratch(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uninitialised CPU memory, the same for every call with the same name in this thread.

    Memory fresh from the system costs a page fault every 4 KiB, more than these loops take to fill it. The contents
    last until the next call of the method; never return scratch as an answer.
    """
    # A tensor made in inference mode cannot be written outside it.
    key = name, dtype, torch.is_inference_mode_enabled()
    held: dict[object, torch.Tensor] = _buffers.__dict__.setdefault("held", {})
    size = math.prod(shape)
    if key not in held or held[key].numel() < size:
        held[key] = torch.empty(size, dtype=dtype)
    if _POISONED:
        held[key].fill_(torch.nan if dtype.is_floating_point else -1)
    return held[key][:size].view(shape)
