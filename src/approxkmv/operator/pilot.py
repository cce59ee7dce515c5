"""From epsilon to settings: a pilot on a few rows, and what each way of computing a product costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from approxkmv.operator.blocks import PREDICTING, Blocks, Plan, clusters_of

# The pilot evaluates at most this share of the kernel, or with few queries up to 16 rows, in at most so many rows.
SHARE, _ROWS = 0.02, 96
# Rows with which a pilot can be wrong by a factor, but not by a power of ten.
_LEAST_ROWS = 4
# Near keys per block that are tried, until one meets the error: first those of the plan that is there already.
_FIRST, _STEP = PREDICTING, 4
# A product that the pilot has made is kept if its error is at most so many times the target: the error bar decides.
_MADE = 1.2
# The cost of blocks, relative to the exact product, up to which they are tried, since they may miss epsilon.
WORTH = 0.6
# Rough times relative to a pair of the exact product, on a Xeon with AMX at n = 8,192 to 32,768: a pair of a query and
# a near key, a pair of a centre and a key, what is done once for a block.
_NEAR, _FAR, _BLOCK = 2.0, 4.0, 100_000.0


@dataclass(frozen=True)
class Pilot:
    """Rows drawn for tuning, their exact values, and the errors of candidates on them."""

    rows: torch.Tensor
    exact: torch.Tensor
    """(rows, m)"""
    weights: torch.Tensor
    """(rows,) one over their number and their probability: weighted sums over them estimate sums over all rows."""

    def norm(self, values: torch.Tensor) -> float:
        """Estimate of the Frobenius norm over all rows from values (rows, m)."""
        return math.sqrt(float((values.square().sum(1).double() * self.weights).sum()))

    @property
    def constant(self) -> torch.Tensor:
        """(m,) the mean of the answer."""
        weights = (self.weights / self.weights.sum()).to(self.exact.dtype)
        return weights @ self.exact


def pilot_rows(n_q: int) -> int:
    """How many rows leave room in the budget for a few settings, each of which takes about three rows' evaluations."""
    return max(_LEAST_ROWS, min(_ROWS, int(SHARE * n_q / 10)))


def pilot_of(
    probabilities: torch.Tensor, rows: torch.Tensor, product_of: Callable[[torch.Tensor], torch.Tensor]
) -> Pilot:
    """The pilot of rows (some,) that were drawn with these probabilities; their exact products are made once each."""
    weights = 1.0 / (len(rows) * probabilities.double()[rows.cpu()])
    distinct, place = rows.unique(return_inverse=True)
    return Pilot(rows, product_of(distinct)[place], weights.to(rows.device))


def cost_of_blocks(blocks: Blocks, near: int) -> float:
    """In evaluations of the exact product that take as long."""
    # For an x that ranks the keys the plan is new.
    passes = 1 if blocks.sizes_of_x is None else 2
    return _cost(len(blocks.order), len(blocks.points.keys), near, passes * len(blocks))


def may_be_worth(n_q: int, n_k: int) -> bool:
    """Whether blocks of so many queries and keys could cost little enough to be tried."""
    return _cost(n_q, n_k, _FIRST, clusters_of(n_q, n_k)) < WORTH * n_q * n_k


def _cost(n_q: int, n_k: int, near: int, blocks: int) -> float:
    return _NEAR * n_q * near + blocks * (_FAR * n_k + _BLOCK)


def near_for(
    pilot: Pilot,
    blocks: Blocks,
    plan_of: Callable[[Blocks, int], Plan],
    x: torch.Tensor,
    target: float,
    scale: float,
    most: float,
) -> tuple[int | None, str, torch.Tensor | None]:
    """The least number of near keys with which the pilot's error is at most `target`, and what the pilot found.

    The number is None if every one that costs less than `most` misses it. The error falls about as a power of the
    number, which is interpolated between those tried. Where the budget lets it, the first is tried on all rows, and if
    its error is at most `_MADE` times the target, its product is the third result. scale: the norm that errors are told
    relative to.
    """
    n_q, n_k = len(blocks.order), len(blocks.points.keys)
    budget = SHARE * n_q * n_k
    tried: list[tuple[int, float]] = []
    near, few, place = _FIRST, None, pilot.rows
    whole = len(blocks) * n_k + n_q * near + 2 * len(pilot.rows) * n_k <= budget
    spent = len(pilot.rows) * n_k
    while near < n_k / 2 and cost_of_blocks(blocks, near) < most:
        if whole and not tried:
            y = torch.empty(n_q, x.shape[1], dtype=x.dtype, device=x.device)
            y[blocks.order] = blocks.products(plan_of(blocks, near), x)[0]
            spent += len(blocks) * n_k + n_q * near
        else:
            if few is None:
                few = blocks.of_queries(pilot.rows)
                place = torch.empty_like(blocks.order)
                place[few.order] = torch.arange(len(few.order), device=place.device)
                place = place[pilot.rows]
            spent += 2 * len(few) * n_k + len(pilot.rows) * near
            if tried and spent > budget:
                break
            y = few.products(few.plan(near), x)[0]
        tried.append((near, pilot.norm(y[place] - pilot.exact)))
        if whole and len(tried) == 1 and tried[0][1] <= _MADE * target:
            return near, _found(tried, scale), y
        if tried[-1][1] <= target:
            break
        near *= _STEP
    if not tried:
        return None, f"blocks would cost more than {WORTH} of the exact product", None
    found = _found(tried, scale)
    chosen = _interpolated(tried, target)
    if chosen is None or chosen >= n_k / 2 or cost_of_blocks(blocks, chosen) >= most:
        return None, found, None
    return chosen, found, None


def _found(tried: list[tuple[int, float]], scale: float) -> str:
    error = tried[-1][1] / scale if scale > 0 else math.inf
    return f"in the pilot the error was {error:.2g} with {tried[-1][0]} near keys per block"


def _interpolated(tried: list[tuple[int, float]], target: float) -> int | None:
    """The number of near keys for the target by the power law through the last two tried.

    It is rounded up to a power of two or 1.5 times one, so that products of one x, whose pilots differ, share plans.
    """
    near, error = tried[-1]
    if len(tried) == 1 or error <= 0:
        return near if error <= target else None
    before, higher = tried[-2]
    power = math.log(higher / error) / math.log(near / before) if error < higher else 0.0
    if error > target:
        # Where the answer is 0 in all rows of the pilot, so is the target.
        if power < 0.05 or target <= 0:
            return None
        # At most a million times as many, which no kernel has: the power may be beyond float64.
        near = int(near * math.exp(min(math.log(error / target) / power, math.log(1e6))))
    elif power > 0:
        near = int(before * (higher / target) ** (1 / power))
    power_of_two = 1 << (max(near, 64) - 1).bit_length()
    return power_of_two * 3 // 4 if near <= power_of_two * 3 // 4 else power_of_two
