"""Loops of the methods of blocks, compiled by numba, one core each and free of Python's lock.

Import this only where numba is installed. numba's own threads are not used: its OpenMP layer changes the number of
threads that torch runs.
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
