"""Sorted angular hashing: queries and keys in blocks of similar codes, and the block-diagonal part of attention.

Source: KDEformer (Zandieh, Han, Daliri & Karbasi 2023), angular hashing with codes in Gray order and equal blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from approxkmv.attention.kernels.exponentials import exp_
from approxkmv.compute.counting import count

# Queries per step: on a CPU their logits with the sample then stay in the cache, a GPU wants few and large steps.
_ROWS = {"cpu": 1 << 10, "cuda": 1 << 16}


def gray_rank(bits: torch.Tensor) -> torch.Tensor:
    """Position (n,) in Gray order of each row of bits (n, p), so that neighbours differ in one bit."""
    rank = torch.zeros(bits.shape[0], dtype=torch.int64, device=bits.device)
    running = torch.zeros_like(rank)
    for i in range(bits.shape[1]):
        running = running ^ bits[:, i].long()
        rank = 2 * rank + running
    return rank


@dataclass(frozen=True)
class SortedBlocks:
    """Queries and keys cut into the same number of blocks, whose sizes differ by at most one."""

    queries: torch.Tensor
    """(blocks, rows) the queries of each block; short blocks repeat a query."""
    keys: torch.Tensor
    """(blocks, columns) the keys of each block; short blocks repeat a key."""
    padded: torch.Tensor
    """(blocks, columns) where `keys` repeats."""
    block_of_key: torch.Tensor
    """(n_k,)"""

    def keys_in_block(self) -> torch.Tensor:
        """(blocks,) the number of keys in each block."""
        return (~self.padded).sum(1)

    def unsorted(self, answers: torch.Tensor, n_q: int) -> torch.Tensor:
        """Answers (blocks, rows, ...) in the order of the queries, (n_q, ...)."""
        out = answers.new_empty(n_q, *answers.shape[2:])
        # A repeated query has the same answer each time.
        out[self.queries.flatten()] = answers.flatten(0, 1)
        return out


def _cut(order: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order (n,) cut into blocks that differ by at most one, (blocks, width), and where the last entry repeats."""
    n = len(order)
    starts = torch.arange(blocks + 1, device=order.device) * n // blocks
    sizes = starts.diff()
    place = torch.arange(-(-n // blocks), device=order.device)
    padded = place >= sizes.unsqueeze(1)
    return order[starts[:-1].unsqueeze(1) + torch.minimum(place, sizes.unsqueeze(1) - 1)], padded


def sort_into_blocks(
    q: torch.Tensor, k: torch.Tensor, generator: torch.Generator, *, block: int, projections: int
) -> SortedBlocks:
    """Blocks of at most `block` queries q (n_q, d), and as many blocks of keys k (n_k, d), in the order of their codes.

    A code consists of the signs of `projections` Gaussian projections.
    """
    directions = torch.randn(q.shape[1], projections, generator=generator, device=q.device)
    count(other_products=(len(q) + len(k)) * projections)
    order_q = gray_rank(q @ directions > 0).argsort(stable=True)
    order_k = gray_rank(k @ directions > 0).argsort(stable=True)
    # Leave no block without a key
    blocks = min(-(-len(q) // block), len(k))
    queries, _ = _cut(order_q, blocks)
    keys, padded = _cut(order_k, blocks)
    block_of_key = torch.empty_like(order_k)
    block_of_key[keys] = torch.arange(blocks, device=q.device).unsqueeze(1)
    return SortedBlocks(queries, keys, padded, block_of_key)


@dataclass(frozen=True)
class Sample:
    """Keys drawn for all queries, sorted by block."""

    keys: torch.Tensor
    """(m,)"""
    starts: torch.Tensor
    """(blocks + 1,) the keys of block b are entries starts[b] to starts[b + 1] - 1 of the sample."""


def sorted_sample(drawn: torch.Tensor, blocks: SortedBlocks) -> tuple[Sample, torch.Tensor]:
    """The drawn keys (m,) sorted by block, and that order (m,)."""
    of_drawn, order = blocks.block_of_key[drawn].sort(stable=True)
    edges = torch.arange(len(blocks.queries) + 1, device=drawn.device)
    return Sample(drawn[order], torch.searchsorted(of_drawn, edges)), order


def block_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    extended: torch.Tensor,
    blocks: SortedBlocks,
    sample: Sample,
    columns: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A few blocks at a time: which ones, their exact sums, and sums over the sampled keys outside each block.

    For scaled queries q (n_q, d), keys k (n_k, d), [v, 1] (n_k, w) and columns (m, c), weighted values of the sampled
    keys, yields (slice of blocks, sums over the own block (b, rows, w), exponentials with the sampled keys
    (b, rows, m), which are 0 for keys of the own block, their products with the columns (b, rows, c), logs (b, rows):
    all sums are divided by exp(log)). The shift is the largest participating logit, so that nothing overflows and at
    least one term is 1.
    """
    number, rows = blocks.queries.shape
    sampled_k = k[sample.keys].mT
    place = torch.arange(len(sample.keys), device=q.device)
    step = max(1, _ROWS.get(q.device.type, _ROWS["cpu"]) // rows)
    for b in range(0, number, step):
        here = slice(b, min(b + step, number))
        some = q[blocks.queries[here]]
        near = some @ k[blocks.keys[here]].mT
        near.masked_fill_(blocks.padded[here].unsqueeze(1), -torch.inf)
        far = some.flatten(0, 1) @ sampled_k
        count(kernel_evaluations=near.numel() + far.numel())
        shift = near.amax(-1)
        low, high = sample.starts[b : here.stop], sample.starts[b + 1 : here.stop + 1]
        own = (place >= low.unsqueeze(1)) & (place < high.unsqueeze(1))
        far.view(*shift.shape, -1).masked_fill_(own.unsqueeze(1), -torch.inf)
        if len(place):
            shift = torch.maximum(shift, far.amax(1).view_as(shift))
        sums = exp_(far.sub_(shift.view(-1, 1))) @ columns
        heavy = exp_(near.sub_(shift.unsqueeze(-1))) @ extended[blocks.keys[here]]
        yield here, heavy, far.view(*shift.shape, -1), sums.view(*shift.shape, -1), shift
