"""Whether loops compiled by numba can be used."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch


@cache
def numba_works() -> bool:
    """Whether numba is installed and compiles: in plain Python some loops do not run and others take minutes."""
    try:
        import numba
    except ImportError:
        return False
    return not numba.config.DISABLE_JIT  # type: ignore[attr-defined]


def compiled_loops(module: str) -> ModuleType | None:
    """A module of compiled loops, such as `attention.searched.loops`, or None where numba does not work."""
    return import_module(f"approxkmv.{module}") if numba_works() else None


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere such products are emulated and slow."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported()) and torch.backends.mkldnn.is_available()
