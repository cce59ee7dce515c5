"""Statistics of one long text without any n x n array: strips of rows in one pass, candidates and a running far tail.

torch computes the logits of a strip on the device of its input. They are processed by a compiled loop on the CPU
(streaming_cpu.py) or by plain torch on other devices (add_strip_by_torch); tests compare the two.

A sum over the n or 2n largest entries never needs an entry that is not among the 2n largest seen so far. So a pass over
the strips keeps the entries above a bound as candidates, cut back to the 2n largest whenever there are too many, which
raises the bound; every other entry goes at once into a sum of the far tail that only grows. The result is exact for any
order of entries and any ties; a histogram of the values, with a second pass for the bin that contains the cut, would
compute the matrix product twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from approxkmv.arrays import Array, is_whole, queries_and_keys, resolve_scale, tensor_of, true_or_false
from approxkmv.compute.threads import over_items
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError, NonFiniteError
from approxkmv.statistics.entries import SHARES
from approxkmv.statistics.largest import Largest

# A strip of a head holds at most BLOCK^2 logits, on any number of threads: how a sum over strips rounds depends on it.
BLOCK = 2048


@dataclass(frozen=True)
class LengthStatistics:
    """One head at one length, over all pairs of a query and a key or (masked) over the entries that a mask leaves."""

    ratio: float
    """c: the sum of all but the n largest entries of K, over the sum of those n."""
    log_next: float
    """log of K_(n) / K_(n+1)."""
    log_double: float
    """log of K_(n) / K_(2n)."""
    softmax_ratio: float
    """c of the softmax matrix D^-1 A, without the row factor."""
    tail_exponent: float
    """alpha with P_(n+1) = n^-alpha, P = D^-1 A."""
    mean_keys: tuple[float, ...]
    """For each of SHARES: the number of keys that hold that share of a row's softmax mass, mean over rows."""
    median_keys: tuple[float, ...]
    """The same for the median row; for an even number of rows, the mean of the middle two."""
    largest_keys: tuple[int, ...]
    """The same for the row that needs the most keys."""


@plain_torch()
def length_statistics(
    q: Array,
    k: Array,
    scale: float | None = None,
    *,
    causal: bool = False,
    spans: Array | None = None,
    block: int = BLOCK,
) -> list[list[LengthStatistics]]:
    """Statistics of whole kernels of any length, in O(n d + block^2) memory per core.

    >>> import torch
    >>> found = length_statistics(torch.randn(2, 300, 16), torch.randn(2, 300, 16), causal=True)
    >>> len(found), len(found[0])
    (2, 2)

    Args:
        q, k: (heads, n, d) or (n, d), torch (on any device) or NumPy; n >= 3.
        scale: the factor of the logits; None means 1/sqrt(d).
        causal: also return the masked statistics, over entries with no key after its query.
        spans: (n, 2) integers: also return the masked statistics, over the keys in [first number, second number) of
            each query: windows, chunks, or causal spans.
        block: block^2 logits of a head are held in memory at a time.
    Returns:
        Per head a list: unmasked and, with causal or spans, masked.
    Raises:
        InputError: mismatched shapes, non-finite values, spans without a key or with fewer than 2n entries.
        NonFiniteError: logits beyond float64.
    """
    queries, keys, _ = queries_and_keys(q, k)
    n, d = queries.shape[-2:]
    s = resolve_scale(scale, d)
    if keys.shape != queries.shape or queries.ndim > 3:
        raise InputError(f"q {tuple(queries.shape)} and k {tuple(keys.shape)} must both be (heads, n, d)")
    if n < 3:
        raise InputError(f"there are {n} tokens: K_(2n) needs at least 3")
    if not is_whole(block) or block < 1:
        raise InputError(f"block is {block!r}: it must be a whole number of at least 1")
    queries, keys = queries.reshape(-1, n, d), keys.reshape(-1, n, d)
    masks = [every_key(n), *_own_spans(n, true_or_false(causal, "causal"), spans)]
    on_cpu = queries.device.type == "cpu"
    together = torch.get_num_threads() if on_cpu else 1
    found: list[list[LengthStatistics]] = []
    for start in range(0, len(queries), together):
        part = queries[start : start + together]
        heads = [[_Head(n, queries.device) for _ in masks] for _ in part]
        for first, logits in _strips(part, keys[start : start + together], s, block):
            over_items(partial(_strip, first=first, masks=masks), heads, logits)
        found += [[mask.finish() for mask in head] for head in heads]
    return found


def _strips(q: torch.Tensor, k: torch.Tensor, s: float, block: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, s <q_i, k_j> - s |q_i|^2 / 2 of a strip of rows and all keys): log K up to a constant."""
    n = q.shape[1]
    rows = max(1, min(n, block * block // n))
    for first in range(0, n, rows):
        part = q[:, first : first + rows]
        row = part.square().sum(-1, keepdim=True)
        yield first, torch.baddbmm(row, part, k.mT, beta=-0.5 * s, alpha=s)


def every_key(n: int) -> torch.Tensor:
    """Spans of a kernel without a mask: (n, 2) int64, keys 0 to n for every query."""
    return torch.tensor([[0, n]]).repeat(n, 1)


def _own_spans(n: int, causal: bool, spans: Array | None) -> list[torch.Tensor]:
    """The spans of the masked statistics, if requested."""
    if spans is None:
        return [torch.stack([torch.zeros(n, dtype=torch.long), torch.arange(1, n + 1)], 1)] if causal else []
    given = tensor_of(spans) if isinstance(spans, np.ndarray) and spans.dtype.kind in "iu" else spans
    if (
        not isinstance(given, torch.Tensor)
        or given.is_floating_point()
        or given.is_complex()
        or given.dtype == torch.bool
    ):
        raise InputError("spans must be a torch tensor or a NumPy array of whole numbers")
    own = given.cpu().long().contiguous()
    if own.shape != (n, 2) or bool(((own[:, 0] < 0) | (own[:, 0] >= own[:, 1]) | (own[:, 1] > n)).any()):
        raise InputError(f"spans must be ({n}, 2), each the first and the end of at least one of {n} keys")
    if (count := int((own[:, 1] - own[:, 0]).sum())) < 2 * n:
        raise InputError(f"the spans leave {count} entries for {n} tokens: K_(2n) needs {2 * n}")
    return [own]


class _Head:
    """What is collected over the strips for one head and mask."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.kernel = Largest(n, device)
        self.softmax = Largest(n, device)
        self.keys: list[torch.Tensor] = []

    def finish(self) -> LengthStatistics:
        n = self.kernel.n
        ratio, nth, following, double = self.kernel.finish()
        softmax_ratio, _, outside, _ = self.softmax.finish()
        counts = torch.cat(self.keys).double()
        ordered = counts.sort(0).values
        median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        return LengthStatistics(
            ratio,
            nth - following,
            nth - double,
            softmax_ratio,
            -outside / math.log(n),
            tuple(counts.mean(0).tolist()),
            tuple(median.tolist()),
            tuple(int(x) for x in ordered[-1].tolist()),
        )


def _strip(head: Sequence[_Head], logits: torch.Tensor, first: int, masks: Sequence[torch.Tensor]) -> None:
    """Add the rows from `first` on, logits (rows, n), to each mask of a head."""
    if logits.device.type == "cpu":
        from approxkmv.statistics.streaming_cpu import add_strip
    else:
        add_strip = add_strip_by_torch
    for spans, part in zip(masks, head, strict=True):
        add_strip(part.kernel, part.softmax, part.keys, logits, first, spans)


def add_strip_by_torch(
    kernel: Largest, softmax: Largest, keys: list[torch.Tensor], logits: torch.Tensor, first: int, spans: torch.Tensor
) -> None:
    """Process a strip in plain torch, on any device.

    Args:
        kernel, softmax: collect the entries of K and of D^-1 A. keys: gets (rows, shares), the keys of each share.
        logits: (rows, n), whose row i is row first + i of the kernel.
        spans: (n, 2) int64 on the CPU: the first existing entry of each row of the kernel, and their end.
    Raises:
        NonFiniteError: a logit beyond its number type.
    """
    own = spans[first : first + len(logits)]
    start, stop = int(own[:, 0].min()), int(own[:, 1].max())
    logits = logits[:, start:stop]
    if not bool(torch.isfinite(logits.sum())) and not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(f"a logit of rows {first} and after is beyond {logits.dtype}: scale the queries down")
    own = own.to(logits.device)
    if bool((own[:, 0] > start).any() | (own[:, 1] < stop).any()):
        place = torch.arange(start, stop, device=logits.device)
        logits = logits.masked_fill((place < own[:, :1]) | (place >= own[:, 1:]), -torch.inf)
    largest = logits.amax(1, keepdim=True)
    weights = (logits - largest).exp()
    total = weights.sum(1, keepdim=True)
    for target, shift in ((kernel, None), (softmax, largest + total.log())):
        values = logits if shift is None else logits - shift
        above = values > target.bound
        far = weights.masked_fill(above, 0.0).sum(1).log() + largest[:, 0]
        target.add(values[above], (far if shift is None else far - shift[:, 0]).logsumexp(0))
    mass = weights.sort(1, descending=True).values.cumsum(1)
    keys.append(torch.stack([(mass < share * total).sum(1) + 1 for share in SHARES], 1))
