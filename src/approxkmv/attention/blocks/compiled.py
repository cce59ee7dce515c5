"""The compiled loops of blocks."""

from __future__ import annotations

from types import ModuleType

from approxkmv.compute.loops import compiled_loops


def block_loops() -> ModuleType | None:
    """The loops, or None where library calls are used instead: where numba does not work, or where they are faster."""
    return compiled_loops("attention.blocks.loops", "attention.blocks.trials.loops")
