"""Queries in blocks of near neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from approxkmv.attention.blocks.arrays import BlockArrays
from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.blocks.reach import variances_of, without
from approxkmv.compute.scratch import scratch

# queries, rows, labels, starts and sizes of Blocks
Grouped = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Blocks:
    """Queries in blocks of near neighbours; each block's rows are contiguous, padded to a multiple."""

    queries: np.ndarray
    """(padded n,) the query in each row, -1 for padding."""
    rows: np.ndarray
    labels: np.ndarray
    """(n,) row and block of each query."""
    starts: np.ndarray
    sizes: np.ndarray
    """First row and padded number of rows of each block."""
    centres: torch.Tensor
    """(blocks, d)"""
    deltas: torch.Tensor
    """(padded n, d) query minus its block's centre, zero for padding."""
    variances: torch.Tensor
    """(blocks, r) mean squared deviation of the points from their block's mean, along each axis."""
    row_variances: torch.Tensor
    """(padded n,) sum over axes of each point's squared deviation times the axis's importance; zero for padding."""

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def arrays(self) -> BlockArrays:
        """For the compiled loops."""
        return BlockArrays(*(np.asarray(getattr(self, name)) for name in BlockArrays._fields))

    def of_rows(self, per_block: torch.Tensor) -> torch.Tensor:
        """Repeat (blocks, ...) for each row of each block."""
        return per_block.repeat_interleave(torch.from_numpy(self.sizes), 0)

    def of_queries(self, per_row: torch.Tensor) -> torch.Tensor:
        """Rows of the blocks (padded n, ...) in the order of the queries (n, ...)."""
        return per_row[torch.from_numpy(self.rows)]

    def logit_variances(self, k: torch.Tensor, apart: np.ndarray) -> torch.Tensor:
        """(padded n,) variance of each row's logits around its block's, over the keys k (n_k, d) that are not apart."""
        if self.variances.shape[1] > 0:
            return self.row_variances
        # Without axes the variances are those of the columns.
        return self.deltas.square() @ variances_of(without(k, apart))

    def in_rows(self, per_query: torch.Tensor) -> torch.Tensor:
        """Per-query data (n, ...) in the order of the blocks' rows (padded n, ...), zero for padding."""
        out = per_query.new_zeros(len(self.deltas), *per_query.shape[1:])
        out[torch.from_numpy(self.rows)] = per_query
        return out


def block_size(block: int, n_q: int, n_k: int) -> int:
    """The average number of queries per block, `block` unless there are fewer queries than keys.

    A few queries lie as far apart as many, so there are as many blocks as for n_k queries. With blocks of one query the
    exact answer takes no longer: a block's centre meets all keys.
    """
    return block if n_q >= n_k else max(1, block * n_q // n_k)


def make_blocks(
    q: torch.Tensor, scale: float, points: torch.Tensor, importance: torch.Tensor, labels: torch.Tensor, multiple: int
) -> Blocks:
    """Blocks of queries, which are scale times q (n, d), and of their points (n, r), by label.

    importance (r,): the weight of a squared deviation along each axis in `row_variances`.
    """
    loops = block_loops()
    grouped: Grouped = (loops.clustering.group if loops is not None else _group)(labels.numpy(), multiple)
    queries, rows, block_of, starts, _ = grouped
    number = len(starts)
    deltas = scratch("deltas", len(queries), q.shape[1])
    if loops is not None:
        variances = q.new_empty(number, points.shape[1])
        blocks = Blocks(*grouped, q.new_empty(number, q.shape[1]), deltas, variances, q.new_empty(len(queries)))
        given = q.contiguous().numpy(), np.float32(scale), points.numpy(), importance.numpy()
        loops.clustering.centre_blocks(*given, blocks.arrays)
        return blocks
    of_query = torch.from_numpy(block_of)
    counts = torch.bincount(of_query).unsqueeze(1)

    def means(of_queries: torch.Tensor) -> torch.Tensor:
        return q.new_zeros(number, of_queries.shape[1]).index_add_(0, of_query, of_queries) / counts

    centres = scale * means(q)
    squares = (points - means(points)[of_query]).square()
    deltas.zero_()[torch.from_numpy(rows)] = scale * q - centres[of_query]
    row_variances = q.new_zeros(len(queries))
    row_variances[torch.from_numpy(rows)] = squares @ importance
    return Blocks(*grouped, centres, deltas, means(squares), row_variances)


def _group(labels: np.ndarray, multiple: int) -> Grouped:
    """queries, rows, labels, starts and sizes of `Blocks`, for points (n,) with a label; unused labels get no block.

    Each block's rows are padded to the given multiple.
    """
    _, block_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sizes = -(-counts // multiple) * multiple
    starts = sizes.cumsum() - sizes
    order = np.argsort(block_of, kind="stable")
    rows = np.empty_like(block_of)
    rows[order] = np.arange(len(labels)) + np.repeat(starts - (counts.cumsum() - counts), counts)
    queries = np.full(int(sizes.sum()), -1)
    queries[rows] = np.arange(len(labels))
    return queries, rows, block_of, starts, sizes


def project(blocks: Blocks, axes: torch.Tensor) -> torch.Tensor:
    """deltas (rows, d) of each block times its own axes (blocks, r, d): (rows, r)."""
    out = torch.empty(len(blocks.deltas), axes.shape[1])
    for b, (start, rows) in enumerate(zip(blocks.starts.tolist(), blocks.sizes.tolist(), strict=True)):
        torch.mm(blocks.deltas[start : start + rows], axes[b].mT, out=out[start : start + rows])
    return out
