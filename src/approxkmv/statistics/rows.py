"""Sums over each row of logits, tile by tile, in plain torch, on any device and in any dtype.

`row_loops` has the same functions as compiled loops for float32 on a CPU; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowSums:
    """The largest logit of each row so far, and sums relative to it; float64."""

    largest: torch.Tensor
    others: torch.Tensor
    """The sum of w = exp(logit - largest) less one largest, which is 1 and would hide small ones; -1 of no keys."""
    moment: torch.Tensor
    """The sum of w (largest - logit)."""

    @classmethod
    def of_no_keys(cls, largest: torch.Tensor) -> RowSums:
        return cls(largest, torch.full_like(largest, -1.0), torch.zeros_like(largest))

    def __getitem__(self, rows: slice) -> RowSums:
        return RowSums(self.largest[rows], self.others[rows], self.moment[rows])


def add_tile(tile: torch.Tensor, sums: RowSums) -> None:
    """Add a tile (rows, keys), which may be overwritten; hidden logits are far below `largest` from the start."""
    tops, places = tile.max(1, keepdim=True)
    rises = tops[:, 0].double() > sums.largest
    largest = torch.where(rises, tops[:, 0].double(), sums.largest)
    rise = largest - sums.largest
    fade = torch.exp(-rise)
    # Rescale the earlier sums, since the largest logit has risen by `rise`, and take it out of the new one.
    sums.moment.add_((sums.others + 1.0) * rise).mul_(fade)
    sums.others.copy_(torch.where(rises, fade * (sums.others + 1.0), sums.others))
    sums.largest.copy_(largest)
    below = tile - largest.to(tile.dtype).unsqueeze(1)
    weights = below.exp()
    weights.scatter_(1, places, weights.gather(1, places).masked_fill_(rises.unsqueeze(1), 0.0))
    sums.others.add_(weights.sum(1, dtype=torch.float64))
    sums.moment.sub_(weights.mul_(below).sum(1, dtype=torch.float64))


def count_keys(tile: torch.Tensor, hidden: float, shares: tuple[float, ...]) -> torch.Tensor:
    """(rows, shares) int64: the fewest keys, largest first, whose weights make up each share of the row's total.

    tile: (rows, n_k), whole rows.
    """
    seen = (tile > hidden / 2).sum(1, keepdim=True)
    weights = (tile - tile.amax(1, keepdim=True)).double().exp()
    mass = weights.sort(1, descending=True).values.cumsum(1)
    total = mass[:, -1:]
    none = seen.new_empty(len(seen), 0)
    needed = torch.cat([none, *((mass < share * total).sum(1, keepdim=True) + 1 for share in shares)], 1)
    return torch.minimum(needed, seen)


def add_gram(weights: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    """out (heads, n_k) += P^T P x for weights P (heads, rows, n_k) and x (heads, n_k)."""
    out += torch.bmm(weights.mT, torch.bmm(weights, x.unsqueeze(2)))[..., 0]
