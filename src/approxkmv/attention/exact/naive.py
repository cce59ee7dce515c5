"""softmax(scale q k^T) v with the matrix stored: the exact attention of the paper's Figure 5."""

from __future__ import annotations

from functools import partial

import torch

from approxkmv.attention.causal import pairs_seen
from approxkmv.attention.contract import Method, UnavailableError
from approxkmv.attention.kernels.exponentials import LOWEST, flushed_
from approxkmv.compute.counting import count
from approxkmv.compute.memory import free_bytes


def _exact_naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, is_causal: bool = False
) -> torch.Tensor:
    # The logits and their softmax, both float32, are alive at the same time.
    pairs = q.shape[0] * q.shape[1] * k.shape[1]
    needed = 8 * pairs
    # Of few queries the matrix is smaller than the keys, and what is asked of both below would take most of the time.
    few = 2 * q.shape[1] <= q.shape[2]
    if not few and needed > (free := free_bytes(q.device)):
        raise UnavailableError(
            f"exact-naive stores the {q.shape[1]} x {k.shape[1]} matrix {q.shape[0]} times: "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )
    seen = q.shape[0] * pairs_seen(q.shape[1]) if is_causal else pairs
    count(kernel_evaluations=seen, other_products=pairs - seen)
    logits = _product(scale * q.float(), k.float().mT)
    if is_causal:
        logits.masked_fill_(torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    weights = logits.softmax(-1)
    del logits
    # One more pass over the matrix, only if its rows may have subnormal entries
    if few or 2 * scale * float(q.norm(dim=2).max()) * float(k.norm(dim=2).max()) > -LOWEST:
        flushed_(weights)
    return _product(weights.to(v.dtype), v)


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of each matrix of a batch; a single one without the batch, in which a product of few rows takes twice as long."""
    return (one[0] @ other[0]).unsqueeze(0) if len(one) == 1 else one @ other


method = Method(
    name="exact-naive",
    compute=_exact_naive,
    causal=partial(_exact_naive, is_causal=True),
    summary="softmax(QK^T) v with the matrix stored, float32, as in the paper",
    exact=True,
    widens=frozenset({"cpu", "cuda"}),
    seeded=False,
)
