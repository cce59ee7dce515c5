"""Both experiments for many heads at once, on all cores, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from approxkmv.arrays import Array, queries_and_keys, resolve_scale
from approxkmv.errors import InputError
from approxkmv.statistics.head_to_tail import ratios_of_prefixes
from approxkmv.statistics.order import order_logarithms

# Logits of as many heads at a time as fit here, in bytes.
DEFAULT_MEMORY = 256 * 2**20


@dataclass(frozen=True)
class OrderRatios:
    """Ratios of the sorted entries K_(1) >= K_(2) >= ... of each head's kernel, as natural logarithms."""

    log_next: Array
    """(...): log of K_(n) / K_(n+1)."""
    log_double: Array
    """(...): log of K_(n) / K_(2n)."""


@dataclass(frozen=True)
class HeadStatistics:
    """Experiments (i) and (ii) of a batch of heads with n tokens each; NumPy arrays in float64."""

    ratios: np.ndarray
    """(..., n - min_prefix + 1): c_i for i = min_prefix..n."""
    log_next: np.ndarray
    """(...): log of K_(n) / K_(n+1)."""
    log_double: np.ndarray
    """(...): log of K_(n) / K_(2n)."""


def head_statistics(
    q: Array,
    k: Array,
    min_prefix: int = 50,
    scale: float | None = None,
    *,
    causal: bool = False,
    memory: int = DEFAULT_MEMORY,
) -> HeadStatistics:
    """Both experiments from one computation of the logits.

    >>> import torch
    >>> s = head_statistics(torch.randn(12, 80, 64), torch.randn(12, 80, 64))
    >>> s.ratios.shape, s.log_double.shape
    ((12, 31), (12,))

    Args and raises: as head_to_tail_ratios. At least 2 tokens (3 with causal), so that a 2n-th entry exists.
    """
    ratios, logs = _run(q, k, min_prefix, scale, causal, memory, want_ratios=True, want_order=True)
    return HeadStatistics(ratios, np.asarray(logs[..., 0] - logs[..., 1]), np.asarray(logs[..., 0] - logs[..., 2]))


def head_to_tail_ratios(
    q: Array,
    k: Array,
    min_prefix: int = 50,
    scale: float | None = None,
    *,
    causal: bool = False,
    memory: int = DEFAULT_MEMORY,
) -> Array:
    """The constant c of Assumption (A) for every prefix of a sequence (Experiment (i) of the paper).

    >>> import torch
    >>> tuple(head_to_tail_ratios(torch.randn(12, 80, 64), torch.randn(12, 80, 64)).shape)
    (12, 31)

    c_i is the sum of all but the i largest entries of K[:i, :i], divided by the sum of those i, K being the Gaussian
    kernel of Lemma 4.1. Computed in float64 and relative to the largest entries, so that logits of 10^4 are no
    obstacle; the lemma's factor max_j |k_j|^2 is the same for all entries and cancels.

    Args:
        q, k: (..., n, d) queries and keys of the same n tokens, torch or NumPy, any floating type.
        min_prefix: the first i; the paper takes 50.
        scale: the factor of the logits; None means 1/sqrt(d).
        causal: only the entries j <= i of the kernel, as a causal model sees them. The paper takes all.
        memory: bytes of logits held at a time; one head is the least.
    Returns:
        float64 (..., n - min_prefix + 1), c_i for i = min_prefix..n, of the same kind of array as q.
    Raises:
        InputError: shapes that do not fit, fewer than min_prefix tokens, non-finite values, a bad scale.
    """
    ratios, _ = _run(q, k, min_prefix, scale, causal, memory, want_ratios=True, want_order=False)
    return ratios if isinstance(q, np.ndarray) else torch.from_numpy(ratios)


def order_ratios(
    q: Array, k: Array, scale: float | None = None, *, causal: bool = False, memory: int = DEFAULT_MEMORY
) -> OrderRatios:
    """How far the kernel falls behind its n largest entries (Experiment (ii) of the paper).

    >>> import torch
    >>> tuple(order_ratios(torch.randn(12, 80, 64), torch.randn(12, 80, 64)).log_next.shape)
    (12,)

    Args:
        q, k: (..., n, d) queries and keys of the same n >= 2 tokens (3 with causal), torch or NumPy.
        scale, causal, memory: as in head_to_tail_ratios.
    Returns:
        OrderRatios in natural logarithms, float64, of the same kind of array as q. As ratios the paper's Figure 2
        has cells that divide by an underflow; as logarithms they are finite.
    Raises:
        InputError: shapes that do not fit, too few tokens, non-finite values, a bad scale.
    """
    _, logs = _run(q, k, 1, scale, causal, memory, want_ratios=False, want_order=True)
    following, double = np.asarray(logs[..., 0] - logs[..., 1]), np.asarray(logs[..., 0] - logs[..., 2])
    if isinstance(q, np.ndarray):
        return OrderRatios(following, double)
    return OrderRatios(torch.from_numpy(following), torch.from_numpy(double))


def _run(
    q: Array,
    k: Array,
    min_prefix: int,
    scale: float | None,
    causal: bool,
    memory: int,
    *,
    want_ratios: bool,
    want_order: bool,
) -> tuple[np.ndarray, np.ndarray]:
    queries, keys, _ = queries_and_keys(q, k)
    n, d = queries.shape[-2:]
    s = resolve_scale(scale, d)
    if keys.shape[-2] != n:
        raise InputError(f"q has {n} rows and k has {keys.shape[-2]}: prefixes need the queries and keys of one text")
    if not isinstance(min_prefix, (int, np.integer)) or isinstance(min_prefix, bool) or min_prefix < 1:
        raise InputError(f"min_prefix is {min_prefix!r}: it must be a whole number of at least 1")
    if want_ratios and n < min_prefix:
        raise InputError(f"there are {n} tokens and min_prefix is {min_prefix}: give a longer text or a smaller one")
    if want_order and n < (3 if causal else 2):
        raise InputError(f"there are {n} tokens: K_(2n) needs at least {3 if causal else 2}")
    batch = queries.shape[:-2]
    ratios = np.empty((int(np.prod(batch)), n - min_prefix + 1 if want_ratios else 0))
    logs = np.empty((ratios.shape[0], 3 if want_order else 0))

    def one_head(index: int, log_values: np.ndarray) -> None:
        if want_ratios:
            ratios_of_prefixes(log_values, min_prefix, causal, ratios[index])
        if want_order:
            order_logarithms(log_values, causal, logs[index])

    workers = min(torch.get_num_threads(), ratios.shape[0])
    with ThreadPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        for start, chunk in _logits(queries.reshape(-1, n, d), keys.reshape(-1, n, d), s, memory):
            # The compiled functions release the interpreter's lock. One head is not worth handing to a thread.
            list((pool.map if pool else map)(one_head, range(start, start + chunk.shape[0]), chunk))
    return ratios.reshape(*batch, ratios.shape[1]), logs.reshape(*batch, logs.shape[1])


def _logits(q: torch.Tensor, k: torch.Tensor, s: float, memory: int) -> Iterator[tuple[int, np.ndarray]]:
    """s <q_i, k_j> - s |q_i|^2 / 2 of a few heads at a time: log K up to a constant.

    The row's term is one more column of q against ones, which costs less than a pass over the product.
    """
    rows = -0.5 * s * q.square().sum(-1, keepdim=True)
    queries = torch.cat([s * q, rows], -1)
    keys = torch.cat([k, torch.ones_like(rows)], -1)
    at_once = max(1, memory // (8 * q.shape[1] ** 2))
    for start in range(0, q.shape[0], at_once):
        logits = queries[start : start + at_once] @ keys[start : start + at_once].mT
        yield start, logits.cpu().numpy()
