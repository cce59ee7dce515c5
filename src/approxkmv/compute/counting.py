"""How many kernel evaluations and inner products a method takes, counted where they happen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Counts:
    """What a method evaluated while being counted.

    A kernel evaluation is one exponential of an inner product of a query, or of the centre of a block of queries, with
    a key, or with a point that represents many keys (a centroid). Other inner products only choose or place points:
    distances in k-means and searches, projections of a hash. Padding counts if it is computed. A pair that a
    causal mask hides is no evaluation; if its product is made, that is another product. Sums over evaluations (products
    with values, moments of far keys) do not count.

    A recomputed row is a query whose approximate answer was lost (beyond the method's reach, or beyond float32) and was
    replaced by the exact one. An exact method recomputes none.
    """

    kernel_evaluations: int = 0
    other_products: int = 0
    recomputed_rows: int = 0

    @property
    def inner_products(self) -> int:
        """All inner products, those of kernel evaluations and the others."""
        return self.kernel_evaluations + self.other_products


class _Watching(threading.local):
    """Who is counting in this thread."""

    def __init__(self) -> None:
        self.counts: list[Counts] = []


_watching = _Watching()


@contextmanager
def counting() -> Iterator[Counts]:
    """Count the work of methods inside the block, that is, of this thread and of compiled loops that it runs.

    >>> import torch
    >>> from approxkmv.attention import get
    >>> with counting() as counts:
    ...     _ = get("exact-fused")(torch.ones(2, 5, 4), torch.ones(2, 7, 4), torch.ones(2, 7, 1))
    >>> counts.kernel_evaluations, counts.inner_products
    (70, 70)
    """
    counts = Counts()
    _watching.counts.append(counts)
    try:
        yield counts
    finally:
        # By identity: two dataclasses with the same counts are equal.
        _watching.counts = [other for other in _watching.counts if other is not counts]


def count(kernel_evaluations: int = 0, other_products: int = 0, recomputed_rows: int = 0) -> None:
    """Report evaluations to whoever is counting; costs next to nothing otherwise."""
    for counts in _watching.counts:
        counts.kernel_evaluations += kernel_evaluations
        counts.other_products += other_products
        counts.recomputed_rows += recomputed_rows
