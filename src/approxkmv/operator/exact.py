"""The exact product in tiles: exponents by a matrix product, then powers and sums in one pass over each tile."""

from __future__ import annotations

from types import ModuleType

import torch

from approxkmv.attention.blocks.near_keys import as_numbers
from approxkmv.compute.counting import count
from approxkmv.compute.loops import compiled_loops
from approxkmv.compute.scratch import scratch
from approxkmv.compute.threads import over_threads
from approxkmv.operator.points import Points, key_side, query_side

# A tile of bfloat16 exponents is 1 MiB: the fastest of 256 to 2,048 a side on a core with 2 MiB of L2 cache.
ROWS, KEYS = 1024, 512
# With more columns of x than this a matrix product of the powers is faster than compiled sums.
_FEW_COLUMNS = 8


def loops_for(logs: torch.Tensor) -> ModuleType | None:
    """The compiled loops, for float32 and bfloat16 numbers on a CPU with numba; else torch's operations do the same."""
    compiled = logs.device.type == "cpu" and logs.dtype != torch.float64
    return compiled_loops("operator.loops") if compiled else None


def room(name: str, *shape: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory, on a CPU the same for every call with this name."""
    if like.device.type == "cpu":
        return scratch(f"operator {name}", *shape, dtype=like.dtype)
    return like.new_empty(shape)


def weigh(logs: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    """out (m, rows) += x (m, n) 2^logs^T, for logs (rows, n); the logs may be overwritten."""
    loops = loops_for(logs)
    if loops is not None and len(x) <= _FEW_COLUMNS:
        given = as_numbers(logs), x.numpy(), out.numpy()
        over_threads(lambda low, high: loops.add_weighted(low, high, *given), len(logs))
        return
    weights = logs.exp2_() if logs.dtype == x.dtype else logs.to(x.dtype).exp2_()
    if len(x) > _FEW_COLUMNS:
        out.addmm_(x, weights.mT)
    else:
        for c in range(len(x)):
            out[c].addmv_(weights, x[c])


def product(points: Points, x: torch.Tensor, low: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Kx (n_q, m) for x (n_k, m), or some rows of it; exponents are computed in the dtype `low`, sums in that of x."""
    chosen = torch.arange(len(points.queries), device=x.device) if rows is None else rows
    right = key_side(points, low)
    out = x.new_zeros(x.shape[1], len(chosen))
    count(kernel_evaluations=len(chosen) * len(right))
    parts = [x[j : j + KEYS].mT.contiguous() for j in range(0, len(right), KEYS)]
    for i in range(0, len(chosen), ROWS):
        left = query_side(points, chosen[i : i + ROWS], low)
        sums = out.new_zeros(x.shape[1], len(left))
        for j, part in enumerate(parts):
            some = right[j * KEYS : (j + 1) * KEYS]
            logs = torch.mm(left, some.mT, out=room("tile", len(left), len(some), like=right))
            weigh(logs, part, sums)
        out[:, i : i + ROWS] = sums
    return out.mT.contiguous()
