"""Both experiments for many heads at once, on all cores, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from approxkmv.arrays import Array, is_whole, queries_and_keys, resolve_scale, tensor_of, true_or_false
from approxkmv.compute.scratch import scratch
from approxkmv.compute.threads import over_items
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError
from approxkmv.statistics.head_to_tail import ratios_of_prefixes
from approxkmv.statistics.order import order_logarithms
from approxkmv.statistics.softmax import WRITTEN, softmax_statistics

# Replaces the logarithm of an entry that a mask hides: its exponential is 0 relative to anything.
HIDDEN = -1e300
# Logits of as many heads as fit into this many bytes are computed at a time.
DEFAULT_MEMORY = 32 * 2**20


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
    softmax_ratio: np.ndarray
    """(...): c at full length of the softmax matrix D^-1 A, in which the row factor exp(-s |q_i|^2 / 2) cancels."""
    tail_exponent: np.ndarray
    """(...): the stronger assumption: alpha, where the largest entry of D^-1 A outside its n largest is n^-alpha.

    Every entry outside the head is then at most n^-alpha, and the whole tail at most n^(2 - alpha) out of n. Uniform
    attention has alpha = 1; an alpha above 1 by a constant would bound the tail entry by entry, which section 4 of the
    paper calls a small uniform bound on the tail.
    """
    column_exponent: np.ndarray
    """(...): the beta for which n max_j |column j of D^-1 A|^2 is n^beta.

    Han et al. (2024) assume n^o(1), that is, beta near 0, as for uniform attention; a key that every query attends to
    alone has beta = 2.
    """


def head_statistics(
    q: Array,
    k: Array,
    min_prefix: int = 50,
    scale: float | None = None,
    *,
    causal: bool = False,
    mask: Array | None = None,
    memory: int = DEFAULT_MEMORY,
) -> HeadStatistics:
    """Both experiments, with the logits computed once.

    >>> import torch
    >>> s = head_statistics(torch.randn(12, 80, 64), torch.randn(12, 80, 64))
    >>> s.ratios.shape, s.log_double.shape
    ((12, 31), (12,))

    Args and raises: as head_to_tail_ratios. Needs at least 2 tokens (3 if causal), so that a 2n-th entry exists.
        mask: (n, n) bool for all heads, True for the entries that exist: a window, for example. Every query must see
            its own key, and there must be at least 2n entries. It takes the place of `causal`.
    """
    if true_or_false(causal, "causal") and mask is not None:
        raise InputError("causal and mask are both given: a mask says by itself which keys a query sees")
    return _statistics(_run(q, k, min_prefix, scale, (_mask(causal, mask),), memory), q.shape[-2])[0]


def unmasked_and_masked_statistics(
    q: Array,
    k: Array,
    min_prefix: int = 50,
    scale: float | None = None,
    *,
    mask: Array | None = None,
    memory: int = DEFAULT_MEMORY,
) -> tuple[HeadStatistics, HeadStatistics]:
    """head_statistics of all entries and of those of a mask (None: causal), with the logits computed once.

    >>> import torch
    >>> every, backwards = unmasked_and_masked_statistics(torch.randn(12, 80, 64), torch.randn(12, 80, 64))
    >>> every.ratios.shape, backwards.ratios.shape
    ((12, 31), (12, 31))
    """
    first, second = _statistics(_run(q, k, min_prefix, scale, (False, _mask(True, mask)), memory), q.shape[-2])
    return first, second


def _mask(causal: bool, mask: Array | None = None) -> bool | np.ndarray:
    if mask is None:
        return true_or_false(causal, "causal")
    given = tensor_of(mask) if isinstance(mask, np.ndarray) and mask.dtype == np.bool_ else mask
    if not isinstance(given, torch.Tensor) or given.dtype != torch.bool:
        raise InputError("mask must be a torch tensor or a NumPy array of bool")
    return given.cpu().numpy()


def _statistics(found: list[_Found], n: int) -> list[HeadStatistics]:
    return [
        HeadStatistics(
            ratios=ratios,
            **vars(_order_ratios(logs)),
            softmax_ratio=np.asarray(softmax[..., 0]),
            tail_exponent=np.asarray(-softmax[..., 1] / np.log(n)),
            column_exponent=np.asarray(np.log(softmax[..., 2]) / np.log(n)),
        )
        for ratios, logs, softmax in found
    ]


def _order_ratios(logs: np.ndarray) -> OrderRatios:
    return OrderRatios(*(np.asarray(logs[..., 0] - logs[..., i]) for i in (1, 2)))


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

    c_i is the sum of all but the i largest entries of K[:i, :i], divided by the sum of those i, where K is the Gaussian
    kernel of Lemma 4.1. Computed in float64 and relative to the largest entries, so that logits of 10^4 are no problem;
    the lemma's factor max_j |k_j|^2 is the same for all entries and cancels.

    Args:
        q, k: (..., n, d) queries and keys of the same n tokens, torch or NumPy, any floating type.
        min_prefix: the first i; 50 in the paper.
        scale: the factor of the logits; None means 1/sqrt(d).
        causal: use only the entries j <= i of the kernel, as a causal model does. The paper uses all.
        memory: bytes of logits held at a time; at least one head is.
    Returns:
        float64 (..., n - min_prefix + 1), c_i for i = min_prefix..n, of the same kind of array as q.
    Raises:
        InputError: mismatched shapes, fewer than min_prefix tokens, non-finite values, an invalid scale.
    """
    ratios, *_ = _run(q, k, min_prefix, scale, (_mask(causal),), memory, order=False, softmax=False)[0]
    return ratios if isinstance(q, np.ndarray) else torch.from_numpy(ratios).to(q.device)


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
        OrderRatios in natural logarithms, float64, of the same kind of array as q. The paper's Figure 2 has cells that
        divide by an underflow; as logarithms they are finite.
    Raises:
        InputError: mismatched shapes, too few tokens, non-finite values, an invalid scale.
    """
    _, logs, _ = _run(q, k, 1, scale, (_mask(causal),), memory, ratios=False, softmax=False)[0]
    found = _order_ratios(logs)
    if isinstance(q, np.ndarray):
        return found
    return OrderRatios(*(torch.from_numpy(part).to(q.device) for part in (found.log_next, found.log_double)))


# What the compiled passes write for one mask: ratios, logs of order ratios, softmax statistics.
_Found: TypeAlias = tuple[np.ndarray, ...]


@plain_torch()
def _run(
    q: Array,
    k: Array,
    min_prefix: int,
    scale: float | None,
    masks: Sequence[bool | np.ndarray],
    memory: int,
    *,
    ratios: bool = True,
    order: bool = True,
    softmax: bool = True,
) -> list[_Found]:
    """What was requested, for each mask; the logits are computed once.

    False means all entries, True causal, an array its True entries. An array must be last: it is applied in place.
    """
    queries, keys, _ = queries_and_keys(q, k)
    n, d = queries.shape[-2:]
    s = resolve_scale(scale, d)
    least = 3 if masks[-1] is True else 2
    if keys.shape[-2] != n:
        raise InputError(f"q has {n} rows and k has {keys.shape[-2]}: prefixes need the queries and keys of one text")
    if not is_whole(min_prefix) or min_prefix < 1:
        raise InputError(f"min_prefix is {min_prefix!r}: it must be a whole number of at least 1")
    if not is_whole(memory) or memory < 1:
        raise InputError(f"memory is {memory!r}: it must be a whole number of bytes, at least 1")
    if ratios and n < min_prefix:
        raise InputError(f"there are {n} tokens and min_prefix is {min_prefix}: give a longer text or a smaller one")
    if (order or softmax) and n < least:
        raise InputError(f"there are {n} tokens: K_(2n) needs at least {least}")
    hidden = _hidden(masks[-1], n, order or softmax)
    # If every mask hides all entries above the diagonal, they need not be read.
    causal_like = hidden is not None and bool(hidden[np.triu_indices(n, 1)].all())
    batch = queries.shape[:-2]
    count = int(np.prod(batch))
    found = [
        tuple(np.empty((count, width)) for width in (ratios * (n - min_prefix + 1), order * 3, softmax * WRITTEN))
        for _ in masks
    ]

    def one_head(index: int, log_values: np.ndarray) -> None:
        for mask, (of_prefixes, of_order, of_softmax) in zip(masks, found, strict=True):
            causal = mask if isinstance(mask, bool) else causal_like
            if not isinstance(mask, bool):
                np.copyto(log_values, HIDDEN, where=hidden)
            if ratios:
                ratios_of_prefixes(log_values, min_prefix, causal, of_prefixes[index])
            if order:
                order_logarithms(log_values, causal, of_order[index])
            if softmax:
                softmax_statistics(log_values, causal, of_softmax[index])

    for start, chunk in _logits(queries.reshape(-1, n, d), keys.reshape(-1, n, d), s, memory):
        # The compiled functions release the GIL.
        over_items(one_head, range(start, start + len(chunk)), chunk)
    return [tuple(table.reshape(*batch, table.shape[1]) for table in part) for part in found]


def _hidden(mask: bool | np.ndarray, n: int, whole: bool) -> np.ndarray | None:
    """Where a mask given as an array hides entries; `whole`: whether K_(2n) must exist."""
    if isinstance(mask, bool):
        return None
    if mask.shape != (n, n):
        raise InputError(f"mask has shape {mask.shape}: give a bool array of shape {(n, n)}")
    if not mask.diagonal().all():
        raise InputError("the mask hides a query's own key: c of a prefix has no meaning then")
    if whole and mask.sum() < 2 * n:
        raise InputError(f"the mask leaves {mask.sum()} entries for {n} tokens: K_(2n) needs {2 * n}")
    return ~mask


def _logits(q: torch.Tensor, k: torch.Tensor, s: float, memory: int) -> Iterator[tuple[int, np.ndarray]]:
    """s <q_i, k_j> - s |q_i|^2 / 2 for a few heads at a time: log K up to a constant. Each is valid until the next.

    The row's term is one more column of q, multiplied with ones, which is cheaper than a pass over the product.
    """
    queries = torch.empty(*q.shape[:-1], q.shape[-1] + 1, dtype=q.dtype, device=q.device)
    torch.mul(q, s, out=queries[..., :-1])
    torch.mul(torch.linalg.vecdot(q, q), -0.5 * s, out=queries[..., -1])
    keys = torch.nn.functional.pad(k, (0, 1), value=1.0)
    n = q.shape[1]
    at_once = max(1, min(memory // (8 * n * n), q.shape[0]))
    for start in range(0, q.shape[0], at_once):
        part = queries[start : start + at_once]
        # Fresh pages cost up to a third of the product.
        out = scratch("logits", len(part), n, n, dtype=torch.float64) if part.device.type == "cpu" else None
        logits = torch.bmm(part, keys[start : start + at_once].mT, out=out)
        yield start, logits.cpu().numpy()
