"""exp(scale q k^T) [v, 1] without storing the matrix: the exact baseline of every quoted speed-up."""

from __future__ import annotations

import math

import torch

from approxkmv.attention.causal import Sums, causal_attention, with_ones
from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.attention.kernels.exponentials import LOWEST, exp_
from approxkmv.compute.counting import count

# Below this row sum the shift was so far above the row's maximum that terms were lost: exponentials are at least
# exp(LOWEST), so n of them change a larger sum by a factor of less than n 2e-13.
_UNDERFLOW = 1e-22
# A matrix product with a few columns costs as much as one with sixteen; a product with a vector costs a tenth.
_FEW_COLUMNS = 8
# 512 x 512 logits are 1 MiB: the fastest of 128 to 2,048 a side on a core with 1 MiB of L2 cache.
TILE = 512


def _add_products(weights: torch.Tensor, v: torch.Tensor, numerators: torch.Tensor, row_sums: torch.Tensor) -> None:
    """numerators (d_v, rows) += (weights v)^T, for few columns; row_sums (rows,) += weights 1."""
    row_sums += weights.sum(1)
    if v.shape[1] <= _FEW_COLUMNS:
        for column in range(v.shape[1]):
            numerators[column].addmv_(weights, v[:, column])
    else:
        numerators.addmm_(v.mT, weights.mT)


def _by_bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: int) -> Sums:
    """The sums, with |q_i| max_j |k_j| as the log of row i, so that no term is above 1."""
    n_q = len(q)
    shift = q.square().sum(1).sqrt() * k.square().sum(1).max().sqrt()
    # The shift is one more column of the product, which saves a pass over every tile.
    shifted_q = torch.cat([q, -shift.unsqueeze(1)], 1)
    keys_and_one = with_ones(k)
    columns = v.mT.contiguous().mT  # each column contiguous
    numerators, row_sums = q.new_zeros(v.shape[1], n_q), q.new_zeros(n_q)
    buffer = q.new_empty(min(tile, n_q) * min(tile, len(k)))
    for i in range(0, n_q, tile):
        rows = shifted_q[i : i + tile]
        for j in range(0, len(k), tile):
            some = keys_and_one[j : j + tile]
            weights = buffer[: len(rows) * len(some)].view(len(rows), len(some))
            torch.mm(rows, some.mT, out=weights)
            here = columns[j : j + tile], numerators[:, i : i + tile], row_sums[i : i + tile]
            _add_products(weights.clamp_min_(LOWEST).exp_(), *here)
    return numerators.mT, row_sums, shift


def _by_running_maximum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: int) -> Sums:
    """The same sums shifted by each row's running maximum: slower, and safe for any logits."""
    n_q = len(q)
    numerators, row_sums, logs = q.new_zeros(v.shape[1], n_q), q.new_zeros(n_q), q.new_empty(n_q)
    for i in range(0, n_q, tile):
        rows = q[i : i + tile]
        highest = rows.new_full((len(rows),), -torch.inf)
        for j in range(0, len(k), tile):
            logits = rows @ k[j : j + tile].mT
            higher = torch.maximum(highest, logits.amax(1))
            fade = exp_(highest - higher)
            numerators[:, i : i + tile] *= fade
            row_sums[i : i + tile] *= fade
            weights = logits.sub_(higher.unsqueeze(1)).clamp_min_(LOWEST).exp_()
            _add_products(weights, v[j : j + tile], numerators[:, i : i + tile], row_sums[i : i + tile])
            highest = higher
        logs[i : i + tile] = highest
    return numerators.mT, row_sums, logs


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: int = TILE) -> Sums:
    """Numerators, row sums and logs for float32 q (n_q, d), scaled, k (n_k, d), v (n_k, d_v).

    In O((n_q + n_k)(d + d_v)) memory.
    """
    # Attention is invariant to a common shift of the keys, and the bound is tighter around their mean.
    mean = k.mean(0)
    k = k - mean
    numerators, row_sums, logs = _by_bound(q, k, v, tile)
    count(kernel_evaluations=len(q) * len(k))
    lost = (row_sums < _UNDERFLOW).nonzero().squeeze(1)
    if len(lost):
        again = _by_running_maximum(q[lost], k, v, tile)
        count(kernel_evaluations=len(lost) * len(k))
        numerators = numerators.contiguous()
        numerators[lost], row_sums[lost], logs[lost] = again
    return numerators, row_sums, logs + q @ mean


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, tile: int = TILE) -> torch.Tensor:
    """softmax(scale q k^T) v for the same inputs."""
    numerators, row_sums, _ = sums(q * scale, k, v, tile)
    return numerators / row_sums.unsqueeze(1)


def exactly_where_lost(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Recompute exactly the rows of out (n_q, d_v) that are not finite: lost, or an exponential overflowed."""
    if not math.isfinite(float(out.sum())):
        lost = (~out.isfinite().all(1)).nonzero().squeeze(1)
        count(recomputed_rows=len(lost))
        out[lost] = attend(q[lost], k, v, scale)
    return out


def _exact_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, tile: int
) -> torch.Tensor:
    if q.device.type == "cuda":
        from approxkmv.attention.kernels import triton as triton_kernels

        count(kernel_evaluations=q.shape[0] * q.shape[1] * k.shape[1])
        return triton_kernels.exact(q, k, v, scale)
    if q.device.type != "cpu":
        raise UnavailableError(f"exact-fused has no kernel for the device {q.device}")
    answers = [attend(q[b].float(), k[b].float(), v[b].float(), scale, tile) for b in range(len(q))]
    return torch.stack(answers).to(v.dtype)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, tile: int) -> torch.Tensor:
    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return causal_attention(q * scale, k, v, generator, lambda q, k, v, _: sums(q, k, v, tile))

    return per_batch(single, q, k, v, seed)


method = Method(
    name="exact-fused",
    compute=_exact_fused,
    causal=_causal,
    summary="exp(QK^T)[v, 1] in tiles, the matrix never stored",
    defaults={"tile": TILE},
    exact=True,
    widens=frozenset({"cpu"}),
    seeded=False,
)
