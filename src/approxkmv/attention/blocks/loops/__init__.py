"""Loops of the block methods, compiled by numba; each runs on one core and releases Python's GIL.

Import this only if numba is installed. numba's own threads are not used, since its OpenMP layer changes torch's number
of threads.
"""

from __future__ import annotations

from approxkmv.attention.blocks.loops.clustering import centre_blocks, group, nearest, spreads
from approxkmv.attention.blocks.loops.expansion import centre_far, expanded_answers, fill_weights, list_near, see
from approxkmv.attention.blocks.loops.gathered import FEW_COLUMNS, sums_of_keys, wide_sums_of_keys
from approxkmv.attention.blocks.loops.one_block import answers_of_one_block, controlled_sums_of_one_block
from approxkmv.attention.blocks.loops.sampling import controlled_sums, draw_light, far_deviations

__all__ = [
    "FEW_COLUMNS",
    "answers_of_one_block",
    "centre_blocks",
    "centre_far",
    "controlled_sums",
    "controlled_sums_of_one_block",
    "draw_light",
    "expanded_answers",
    "far_deviations",
    "fill_weights",
    "group",
    "list_near",
    "nearest",
    "see",
    "spreads",
    "sums_of_keys",
    "wide_sums_of_keys",
]
