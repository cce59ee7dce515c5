"""Causal attention of the block methods: chunks of queries, exactly over their own keys, in blocks over others."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from approxkmv.attention.blocks.expansion import Clustering, KeySide, key_side
from approxkmv.attention.blocks.reach import stand_apart
from approxkmv.attention.causal import Flash

# Queries of a chunk, and twice as many from eight such chunks on. Shorter chunks cost as much, since more is done for
# each of them, and err more, since their blocks are wider.
EXACT_BELOW = 2048


def chunk_length(n: int, near: int) -> int:
    """The number of queries per chunk, of n in all, of which keys at least half are far from a block."""
    # A power of two: with the keys before a chunk ends a block of oneDNN's products.
    return max(EXACT_BELOW * (1 if n <= 8 * EXACT_BELOW else 2), 1 << (2 * near - 1).bit_length())


def earlier_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flash: Flash, clustering: Clustering
) -> Iterator[tuple[slice, KeySide, torch.Tensor]]:
    """For each chunk but the first: where it is, the keys before it, and what to add to logs for keys less their mean.

    flash: of the same q (n, d), k (n, d) and v (n, d_v). Each KeySide is valid until the next `key_side`.
    """
    n, length, scale = len(q), flash.length, flash.scale
    if n <= length:
        return
    last = (n - 1) // length * length
    # No chunk may see later keys: mean and axes are those of the first.
    apart = stand_apart(q[:length], k[:length], scale)
    side = key_side(k[:last], v[:last], apart, clustering, flash.v[:last, : v.shape[1]], length)
    shifts = q @ (scale * side.mean[: q.shape[1]])
    for first in range(length, n, length):
        here = slice(first, first + length)
        yield here, side.first(first, stand_apart(q[here], k[:first], scale)), shifts[here]
