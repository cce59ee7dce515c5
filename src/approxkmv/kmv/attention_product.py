"""Attention D^-1 A V from products with a Gaussian kernel (Lemma 4.1), in log scale."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
import torch

from approxkmv.arrays import LARGEST_PRODUCT, Array, as_float64, queries_and_keys, resolve_scale
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError
from approxkmv.kernels import reduce_attention
from approxkmv.kmv import inputs
from approxkmv.kmv.algorithm import approx_kmv
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.heavy import DEFAULT_MEMORY, HeavyKeys


@dataclass(frozen=True)
class AttentionResult:
    """Approximate attention and its cost."""

    output: Array
    """(..., n_q, d_v)."""
    exact_rows: int
    """Rows that were evaluated exactly, because their kernel sum was too small for an additive error."""
    rows: int
    """The number of rows, over all batch entries."""
    kernel_evaluations: int
    distinct_evaluations: int
    hash_evaluations: int


def approx_attention(
    q: Array,
    k: Array,
    v: Array,
    epsilon: float,
    *,
    scale: float | None = None,
    seed: int | None = None,
    row_floor: float = 0.1,
    memory: int = DEFAULT_MEMORY,
    **options: object,
) -> Array:
    """Approximate softmax(scale q k^T) v by products with the kernel matrix of Lemma 4.1.

    >>> import torch
    >>> out = approx_attention(torch.randn(20, 8), torch.randn(30, 8), torch.randn(30, 4), 0.25, seed=0)
    >>> tuple(out.shape)
    (20, 4)

    See `attention_product`, which also returns the costs.
    """
    return attention_product(
        q, k, v, epsilon, scale=scale, seed=seed, row_floor=row_floor, memory=memory, **options
    ).output


@plain_torch()
def attention_product(
    q: Array,
    k: Array,
    v: Array,
    epsilon: float,
    *,
    scale: float | None = None,
    seed: int | None = None,
    row_floor: float = 0.1,
    memory: int = DEFAULT_MEMORY,
    **options: object,
) -> AttentionResult:
    """Approximate D^-1 A v, where A = exp(scale q k^T) and D holds its row sums, by Lemma 4.1, and count its cost.

    >>> import torch
    >>> r = attention_product(torch.randn(2, 20, 8), torch.randn(2, 30, 8), torch.randn(2, 30, 4), 0.25, seed=0)
    >>> tuple(r.output.shape), r.rows
    ((2, 20, 4), 40)

    A = diag(e^r) K. The factor e^r overflows at logits above 709, but cancels in D^-1 A v = (K v) / (K 1) and is never
    formed. Each column c of the output has |output_c - exact_c|_2 <= epsilon max(|v_c|_2, |exact_c|_2) with
    probability 0.98 (a union bound over one column and the row sums).

    The products have an additive error, which is useless for a row whose kernel sum is tiny; on real heads most are,
    because queries lie far from all keys. A row is divided only if its estimated sum is at least `row_floor`; the
    others are evaluated exactly, in log scale, and counted. To make the sums large, the keys are centred where that
    helps (which multiplies each row of A by a factor that cancels), and q and k are balanced as q a and k / a, which
    changes no logit and minimises the mean over rows of |q_i a|^2 + max_j |k_j / a|^2, the exponent that Lemma 4.1
    loses.

    Args:
        q: (..., n_q, d). k: (..., n_k, d). v: (..., n_k, d_v). Torch tensors or NumPy arrays.
        epsilon: the error. scale: of the logits; None means 1/sqrt(d). seed: for a reproducible answer.
        row_floor: rows with a smaller kernel sum are evaluated exactly. A small floor requires larger budgets.
        memory: bytes of temporary storage. options: passed to approx_kmv (alpha, gamma, family, density, constants).
    Returns:
        An AttentionResult; output in float64, of the same kind of array as q.
    Raises:
        InputError: mismatched shapes, a non-finite value, epsilon, scale or row_floor not positive.
    Source: Lemma 4.1 and section 4; the printed lemma lacks 1/(2 sqrt(d)) in two exponents, which its proof has.
    """
    queries, keys, back = queries_and_keys(q, k)
    inputs.same_kind(q, "q", v, "v")
    values = as_float64(v, "v")
    if values.ndim != keys.ndim or values.shape[:-1] != keys.shape[:-1] or values.shape[-1] == 0:
        raise InputError(f"v {tuple(values.shape)} must be (..., n_k, d_v) with the keys' {tuple(keys.shape[:-1])}")
    inputs.bounded(values.cpu().numpy(), "v", LARGEST_PRODUCT)
    s = resolve_scale(scale, queries.shape[-1])
    error, floor = inputs.error(epsilon), inputs.positive(row_floor, "row_floor")
    n_q, n_k, d, d_v = queries.shape[-2], keys.shape[-2], queries.shape[-1], values.shape[-1]
    flat_q, flat_k = queries.reshape(-1, n_q, d).cpu(), keys.reshape(-1, n_k, d).cpu()
    flat_v = values.reshape(-1, n_k, d_v).cpu().numpy()
    seeds = inputs.seed_sequence(seed).generate_state(len(flat_q) * (d_v + 1), np.uint64).reshape(len(flat_q), -1)

    outputs, exact_rows, total = [], 0, Tally()
    for one_q, one_k, one_v, some in zip(flat_q, flat_k, flat_v, seeds, strict=True):
        out, exact, tally = _one(one_q, one_k, one_v, s, error, floor, some, memory, options)
        outputs.append(out)
        exact_rows += exact
        total += tally
    stacked = torch.from_numpy(np.stack(outputs)).reshape(*queries.shape[:-1], d_v).to(queries.device)
    return AttentionResult(back(stacked), exact_rows, len(flat_q) * n_q, *astuple(total))


def _one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: np.ndarray,
    scale: float,
    epsilon: float,
    floor: float,
    seeds: np.ndarray,
    memory: int,
    options: dict[str, object],
) -> tuple[np.ndarray, int, Tally]:
    centre, balance = best_origin(q, k)
    centred = k - centre
    reduction = reduce_attention(q * balance, centred / balance, scale)
    n_q, n_k = len(q), len(k)
    # Rows are divided by at least floor: errors of epsilon floor / 2 in numerator and sum become epsilon / 2 each.
    fine = 0.5 * epsilon * floor
    # The error of a row sum is |1|_2 / sqrt(n_q) per row; the factor sqrt(n_q / n_k) turns it into `fine`.
    sum_error = fine * math.sqrt(n_q / n_k)
    heavy: HeavyKeys | None = None
    total = Tally()

    def product(x: np.ndarray, error: float, seed: np.uint64) -> np.ndarray:
        nonlocal heavy, total
        result = approx_kmv(
            reduction.queries,
            reduction.keys,
            torch.from_numpy(np.ascontiguousarray(x)),
            sigma=reduction.sigma,
            epsilon=error,
            seed=int(seed),
            heavy=heavy,
            memory=memory,
            **options,  # type: ignore[arg-type]
        )
        heavy = result.heavy
        total += Tally(result.kernel_evaluations, result.distinct_evaluations, result.hash_evaluations)
        return np.asarray(result.y)

    sums = product(np.ones(n_k), sum_error, seeds[0])
    trusted = sums >= floor * (1 + 0.5 * epsilon)
    out = np.empty((n_q, v.shape[1]))
    if trusted.any():
        for c in range(v.shape[1]):
            out[trusted, c] = product(v[:, c], fine, seeds[c + 1])[trusted] / sums[trusted]
    rest = np.flatnonzero(~trusted)
    step = int(max(1, (memory // 4) // (24 * n_k)))
    for part in range(0, len(rest), step):
        rows = torch.from_numpy(rest[part : part + step])
        out[rows.numpy()] = (torch.softmax(scale * (q[rows] @ centred.T), -1) @ torch.from_numpy(v)).numpy()
    pairs = len(rest) * n_k
    return out, len(rest), total + Tally(pairs, pairs)


def best_origin(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The origin of the keys (0 or their mean) and the balance a that give the larger mean of log K."""
    query_norm = float(q.square().sum(-1).mean().sqrt())
    found: list[tuple[float, torch.Tensor, float]] = []
    for centre in (k.mean(0), torch.zeros_like(k[0])):
        key_norm = float((k - centre).square().sum(-1).max().sqrt())
        balance = math.sqrt(key_norm / query_norm) if key_norm > 0 and query_norm > 0 else 1.0
        # The minimum of a^2 |q|^2 / 2 + M / (2 a^2) is |q| sqrt(M); the centre's own logits are subtracted too.
        found.append((query_norm * key_norm + float(q.mean(0) @ centre), centre, balance))
    _, centre, balance = min(found, key=lambda one: one[0])
    return centre, balance
