"""Causal attention of the block methods: chunks of queries, exactly over their own keys, in blocks over others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from approxkmv.attention.blocks.expansion import Clustering, KeySide, key_side
from approxkmv.attention.blocks.reach import stand_apart
from approxkmv.attention.causal import Flash

# Queries of a chunk; twice as many where there would be more than four chunks. Shorter chunks cost as much, since
# there are more of them, and err more, since their blocks are wider.
EXACT_BELOW = 2048


def chunk_length(n: int, near: int) -> int:
    """The number of queries in each chunk of n: at least twice the near keys, or few keys would be far."""
    # A power of two: with the keys before a chunk ends a block of oneDNN's products.
    return max(EXACT_BELOW * (1 if n <= 4 * EXACT_BELOW else 2), 1 << (2 * near - 1).bit_length())


@dataclass(frozen=True)
class EarlierKeys:
    """The keys before each chunk but the first, for q (n, d), k (n, d) and v (n, d_v); `flash` is made of the same."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    flash: Flash
    clustering: Clustering

    def __iter__(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Where each chunk is, and which of the keys before it stand apart."""
        for first in range(self.flash.length, len(self.q), self.flash.length):
            here = slice(first, first + self.flash.length)
            yield here, stand_apart(self.q[here], self.k[:first], self.flash.scale)

    @cached_property
    def _whole(self) -> tuple[KeySide, torch.Tensor]:
        length, scale = self.flash.length, self.flash.scale
        last = (len(self.q) - 1) // length * length
        # No chunk may see later keys: mean and axes are those of the first.
        apart = stand_apart(self.q[:length], self.k[:length], scale)
        values = self.flash.v[:last, : self.v.shape[1]]
        side = key_side(self.k[:last], self.v[:last], apart, self.clustering, values, length)
        return side, self.q @ (scale * side.mean[: self.q.shape[1]])

    def before(self, here: slice, apart: np.ndarray) -> tuple[KeySide, torch.Tensor]:
        """The keys before that chunk, and what to add to the logs of sums over them less their mean.

        It is valid until the next call of `key_side` in this thread.
        """
        side, shifts = self._whole
        return side.first(here.start, apart), shifts[here]
