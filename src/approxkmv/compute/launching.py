"""Launches of Triton kernels; needs Triton."""

from __future__ import annotations

from typing import Any

import triton


def launched(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel; where the chip has too little shared memory for its pipelined loads, without them."""
    try:
        kernel[grid](*arguments, **options)
    except triton.OutOfResources:
        kernel[grid](*arguments, **options | {"num_stages": 1})
