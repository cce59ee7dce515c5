"""Torch's global state, which a caller may have changed and on which no answer may depend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """Torch as it starts, inside the block: float32 and the CPU by default, no autocast, no inference mode, no graph.

    >>> @plain_torch()
    ... def ones() -> torch.Tensor:
    ...     return torch.ones(2)
    >>> torch.set_default_dtype(torch.float64)
    >>> ones().dtype, torch.ones(2).dtype
    (torch.float32, torch.float64)
    >>> torch.set_default_dtype(torch.float32)

    What is made inside are ordinary tensors without gradients, also in a caller's inference mode: memory that is kept
    from call to call can be written in either. The default type is that of the whole process: it is set, for the time
    of the block, only where it is another one.
    """
    with ExitStack() as stack:
        # What a call finds as it should be, as nearly all do, costs it nothing.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        default = torch.get_default_dtype()
        if default != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, default)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
