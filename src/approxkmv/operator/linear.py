"""Frozen products as linear operators of scipy, for its eigensolvers and conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from approxkmv.arrays import tensor_of
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import UnavailableError
from approxkmv.operator import exact
from approxkmv.operator.blocks import Blocks, Plan
from approxkmv.operator.points import Points

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Product = Callable[[torch.Tensor], torch.Tensor]


def of_points(points: Points) -> LinearOperator:
    """The exact product."""
    kept, turned = points.keys.dtype, Points(points.keys, points.queries)
    return _linear(points, lambda x: exact.product(points, x, kept), lambda y: exact.product(turned, y, kept))


def of_blocks(blocks: Blocks, plan: Plan, symmetric: bool) -> LinearOperator:
    """The product of blocks; where queries are keys, the mean with its transpose."""

    def whole(rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(rows)
        out[blocks.order] = rows
        return out

    def forward(x: torch.Tensor) -> torch.Tensor:
        return whole(blocks.products(plan, x)[0])

    def backward(y: torch.Tensor) -> torch.Tensor:
        return blocks.products(plan, None, y[blocks.order])[1]

    def mean(x: torch.Tensor) -> torch.Tensor:
        # In one pass over the blocks
        rows, keys = blocks.products(plan, x, x[blocks.order])
        return 0.5 * (whole(rows) + keys)

    return _linear(blocks.points, mean, mean) if symmetric else _linear(blocks.points, forward, backward)


def _linear(points: Points, forward: Product, backward: Product) -> LinearOperator:
    """Raises UnavailableError where scipy is not installed."""
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise UnavailableError("as_linear_operator needs scipy: pip install scipy") from error

    def of_arrays(product: Product) -> Callable[[np.ndarray], np.ndarray]:
        @plain_torch()
        def apply(values: np.ndarray) -> np.ndarray:
            if np.iscomplexobj(values):
                return apply(values.real) + 1j * apply(values.imag)
            given = tensor_of(values).to(points.keys).reshape(len(values), -1)
            return product(given).cpu().numpy().reshape(-1, *values.shape[1:])

        return apply

    seen, turned = of_arrays(forward), of_arrays(backward)
    shape, dtype = (len(points.queries), len(points.keys)), np.dtype(str(points.keys.dtype)[6:])
    return LinearOperator(shape, matvec=seen, rmatvec=turned, matmat=seen, rmatmat=turned, dtype=dtype)
