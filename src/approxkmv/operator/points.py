"""The points of a Gaussian kernel in its own unit, and the matrices whose product is the kernel's exponent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

# oneDNN's bfloat16 products take numbers in groups of this many.
_MULTIPLE = 32


@dataclass(frozen=True)
class Points:
    """Queries (n_q, d) and keys (n_k, d) relative to the keys' mean, in the unit in which K = 2^(-|q - k|^2 / 2).

    Powers of two take fewer instructions than powers of e.
    """

    queries: torch.Tensor
    keys: torch.Tensor

    @cached_property
    def query_halves(self) -> torch.Tensor:
        """(n_q,) |q|^2 / 2."""
        return 0.5 * self.queries.square().sum(1)

    @cached_property
    def key_halves(self) -> torch.Tensor:
        """(n_k,) |k|^2 / 2."""
        return 0.5 * self.keys.square().sum(1)

    @cached_property
    def key_sides(self) -> dict[torch.dtype, torch.Tensor]:
        """What `key_side` has made, by dtype."""
        return {}

    def to(self, dtype: torch.dtype) -> Points:
        return self if dtype == self.keys.dtype else Points(self.queries.to(dtype), self.keys.to(dtype))


def in_units(queries: torch.Tensor, keys: torch.Tensor, sigma: float, dtype: torch.dtype = torch.float32) -> Points:
    """Points from the caller's numbers, centred in float64: with smaller norms less cancels."""
    centre, unit = keys.double().mean(0), sigma * math.sqrt(math.log(2))
    q, k = (((points.double() - centre) / unit).to(dtype).contiguous() for points in (queries, keys))
    return Points(q, k)


def side_by_side(*columns: torch.Tensor) -> torch.Tensor:
    """Columns (n,) or (n, width) as one matrix; in bfloat16 with zeros up to a multiple that its products need."""
    parts = [column.unsqueeze(1) if column.ndim == 1 else column for column in columns]
    if parts[0].dtype == torch.bfloat16:
        parts.append(parts[0].new_zeros(len(parts[0]), -sum(part.shape[1] for part in parts) % _MULTIPLE))
    return torch.cat(parts, 1)


def parts_of(values: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Numbers of that dtype whose sum is the values: two for bfloat16, whose error is then that of products, or one."""
    high = values.to(dtype)
    return [high, (values - high.to(values.dtype)).to(dtype)] if dtype == torch.bfloat16 else [high]


def query_side(points: Points, rows: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
    """(some, width) for some queries, whose products with the rows of `key_side` are log2 K."""
    halves = parts_of(-points.query_halves[rows], dtype)
    return side_by_side(points.queries[rows].to(dtype), *map(torch.ones_like, halves), *halves)


def key_side(points: Points, dtype: torch.dtype) -> torch.Tensor:
    """(n_k, width): see `query_side`."""
    if dtype not in points.key_sides:
        halves = parts_of(-points.key_halves, dtype)
        points.key_sides[dtype] = side_by_side(points.keys.to(dtype), *halves, *map(torch.ones_like, halves))
    return points.key_sides[dtype]
