"""Whether loops compiled by numba can be used."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from approxkmv.compute.trial import fastest


@cache
def numba_works() -> bool:
    """Whether numba is installed and compiles: in plain Python some loops do not run and others take minutes."""
    try:
        import numba
    except ImportError:
        return False
    return not numba.config.DISABLE_JIT  # type: ignore[attr-defined]


def compiled_loops(module: str, trial: str | None = None) -> ModuleType | None:
    """A module of compiled loops, such as `attention.searched.loops`, or None where numba does not work.

    trial: a question of `trial.fastest`, if library calls can do the same: None also where they are clearly faster.
    """
    if not numba_works() or (trial and fastest(trial, "compiled", "library") == "library"):
        return None
    return import_module(f"approxkmv.{module}")


def has_bfloat16_instructions() -> bool:
    """Whether loops may use bfloat16 instructions: the CPU has them, and numba compiles for them.

    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may name another CPU. No trial can find out: the process would be killed.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if not (supported and supported() and numba_works()):
        return False
    from numba.core.registry import cpu_target

    features = cpu_target.target_context.codegen().magic_tuple()[2]
    return "+avx512bf16" in features.split(",")
