"""torch's global state, which a caller may have changed and on which no answer may depend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

# The default dtype and the precision of products belong to the process: the last of its blocks that ends, in whatever
# thread, restores them.
_LOCK, _OPEN, _BEFORE = Lock(), list[None](), ExitStack()
if hasattr(os, "register_at_fork"):
    # In the child of a fork other threads do not exist.
    os.register_at_fork(after_in_child=_LOCK._at_fork_reinit)  # type: ignore[attr-defined]
    os.register_at_fork(after_in_child=_OPEN.clear)


@contextmanager
def plain_torch() -> Iterator[None]:
    """torch in its default state inside the block: float32 in full, CPU, no autocast, inference mode or gradients.

    >>> @plain_torch()
    ... def ones() -> torch.Tensor:
    ...     return torch.ones(2)
    >>> torch.set_default_dtype(torch.float64)
    >>> ones().dtype, torch.ones(2).dtype
    (torch.float32, torch.float64)
    >>> torch.set_default_dtype(torch.float32)

    Tensors made inside are ordinary tensors without gradients, even in a caller's inference mode: memory kept from call
    to call can then be written in either mode. The default dtype and the precision of float32 products are global to
    the process, so they are changed only if they differ, until no thread is in such a block.
    """
    with ExitStack() as stack:
        # Skip what is already in the default state: nearly every call then costs nothing.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        with _LOCK:
            _OPEN.append(None)
            stack.callback(_close)
            default = torch.get_default_dtype()
            if default != torch.float32:
                torch.set_default_dtype(torch.float32)
                _BEFORE.callback(torch.set_default_dtype, default)
            _whole_products(_BEFORE)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _close() -> None:
    with _LOCK:
        del _OPEN[-1:]  # none are left of a block in which the process was forked
        if not _OPEN:
            _BEFORE.close()


def _whole_products(stack: ExitStack) -> None:
    """No float32 product in fewer digits (TF32, bfloat16) until the stack is closed."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set for each backend apart, or for all, which that function refuses to read
        before = None
    if before == "highest":
        return
    # torch 2.9 has a setting for each backend, which that for both would change when it is restored.
    settings: list[Any] = [getattr(one, "matmul", None) for one in (torch.backends.mkldnn, torch.backends.cuda)]
    for matmul in settings:
        if not hasattr(matmul, "fp32_precision") or (before is None and matmul.fp32_precision == "ieee"):
            continue
        was, matmul.fp32_precision = matmul.fp32_precision, "none"
        # "none" follows the setting for all.
        stack.callback(setattr, matmul, "fp32_precision", "none" if matmul.fp32_precision == was else was)
        matmul.fp32_precision = "ieee"
    if before is not None:
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, before)
