"""torch's global state, which a caller may have changed and on which no answer may depend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """torch in its default state inside the block: float32, CPU, no autocast, no inference mode, no gradients.

    >>> @plain_torch()
    ... def ones() -> torch.Tensor:
    ...     return torch.ones(2)
    >>> torch.set_default_dtype(torch.float64)
    >>> ones().dtype, torch.ones(2).dtype
    (torch.float32, torch.float64)
    >>> torch.set_default_dtype(torch.float32)

    Tensors made inside are ordinary tensors without gradients, even in a caller's inference mode: memory kept from call
    to call can then be written in either mode. The default dtype is global to the process, so it is changed, for the
    duration of the block, only if it differs.
    """
    with ExitStack() as stack:
        # Skip what is already in the default state: nearly every call then costs nothing.
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
