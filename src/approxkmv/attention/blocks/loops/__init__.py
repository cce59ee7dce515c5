"""Loops of the block methods, compiled by numba; each runs on one core and releases Python's GIL.

Import this only if numba is installed. numba's own threads are not used, since its OpenMP layer changes torch's number
of threads.
"""

from __future__ import annotations

from approxkmv.attention.blocks.loops import clustering, expansion, gathered, one_block, sampling

__all__ = ["clustering", "expansion", "gathered", "one_block", "sampling"]
