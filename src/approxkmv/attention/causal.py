"""Causal attention: triangles of chunks by flash attention, and by recursion any method that returns its sums.

The lower triangle of n queries and keys consists of two triangles of half the size and one full square below the
diagonal. Triangles are split until they are small enough to be exact; the squares are what a method approximates.
(Zandieh et al. 2023 and Han et al. 2024 split the mask in the same way.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from approxkmv.attention.kernels.exponentials import exp_, softmax
from approxkmv.attention.kernels.flash import FLASH, flash
from approxkmv.compute.counting import count
from approxkmv.compute.scratch import scratch
from approxkmv.compute.trial import fastest_dtype

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,): both sums are divided by exp(log)."""

EXACT_BELOW = 256
"""Triangles of at most this many queries are exact."""
# Triangles of so many queries take most of the time of their method: with products in the dtype that is fastest here.
_LONG = 1024

SumsOfKeys = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator], Sums]
"""f(q, k, v, generator) for scaled float32 q (n_q, d), k (n_k, d), v (n_k, d_v), every query attending to every key."""


def pairs_seen(n: int) -> int:
    """The pairs that the mask leaves of n queries and keys: the others are no evaluations."""
    return n * (n + 1) // 2


def with_ones(v: torch.Tensor) -> torch.Tensor:
    """[v, 1] (n_k, d_v + 1): its product with a row of exponentials is the row's numerators and row sum."""
    return torch.cat([v, v.new_ones(len(v), 1)], 1)


def exact_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool = False) -> Sums:
    """The sums of exp(q k^T) for scaled queries; if is_causal, over keys j <= i only for query i."""
    logits = q @ k.mT
    seen = pairs_seen(len(q)) if is_causal else logits.numel()
    count(kernel_evaluations=seen, other_products=logits.numel() - seen)
    if is_causal:
        future = torch.ones(logits.shape, dtype=torch.bool, device=q.device).triu_(1)
        logits.masked_fill_(future, -torch.inf)
    logs = logits.amax(1)
    weights = exp_(logits.sub_(logs.unsqueeze(1)))
    return weights @ v, weights.sum(1), logs


class Flash:
    """torch's flash attention on a CPU for chunks of one sequence, which is rounded once, with products of that dtype.

    Args:
        q, k, v: (n, d), (n, d), (n, d_v) float32.
        scale: of the logits.
        length: number of queries in a chunk; the last may have fewer.
        low: the dtype of products.

    What is rounded is scratch: it is valid until the next `Flash` in this thread.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, length: int, low: torch.dtype
    ) -> None:
        self.scale, self.length, self.columns = scale, length, v.shape[1]
        width = max(q.shape[1], self.columns)

        def rounded(name: str, given: torch.Tensor) -> torch.Tensor:
            out = scratch(f"flash {name}", len(given), width, dtype=low)
            out[:, : given.shape[1]] = given
            out[:, given.shape[1] :] = 0
            return out

        self.q, self.k, self.v = (rounded(name, given) for name, given in zip("qkv", (q, k, v), strict=True))

    def triangles(self, chunks: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers (n, d_v) and logs of row sums (n,) over the keys of each query's own chunk, up to its own.

        Those of so many first chunks are left to the caller.
        """
        n, length = len(self.q), self.length
        whole = n // length * length
        out, logs = torch.empty(n, self.columns), torch.empty(n)
        for here, size in ((slice(chunks * length, whole), length), (slice(whole, n), n - whole)):
            if here.start < here.stop:
                parts = (t[here].unflatten(0, (-1, size)) for t in (self.q, self.k, self.v))
                out[here], logs[here] = self._attend(*parts, is_causal=True)
                count(kernel_evaluations=(here.stop - here.start) // size * pairs_seen(size))
        return out, logs

    def rows(self, rows: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of these rows (m,), over the first `keys` keys."""
        count(kernel_evaluations=len(rows) * keys, recomputed_rows=len(rows))
        out, logs = self._attend(self.q[rows][None], self.k[None, :keys], self.v[None, :keys], is_causal=False)
        return out.float(), logs

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, logs = flash((q[None], k[None], v[None]), self.scale, is_causal)
        return out[0, :, :, : self.columns].flatten(0, 1), logs.flatten()


def add_sums(here: Sums, other: Sums) -> None:
    """Add the sums over other keys, for the same queries, in place, relative to the larger of their logs."""
    numerators, row_sums, logs = here
    highest = torch.maximum(logs, other[2])
    fade, other_fade = exp_(logs - highest), exp_(other[2] - highest)
    numerators.mul_(fade.unsqueeze(1)).addcmul_(other[0], other_fade.unsqueeze(1))
    row_sums.mul_(fade).addcmul_(other[1], other_fade)
    logs.copy_(highest)


def causal_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, sums: SumsOfKeys, exact_below: int
) -> Sums:
    """Sums over the keys up to each query's own, with the squares below the diagonal computed by `sums`.

    Args:
        q, k, v: (n, d), (n, d), (n, d_v) float32, the queries scaled.
        sums: if it is unbiased, so are these sums; its logs must refer to the given keys, not to shifted ones.
        exact_below: triangles of at most this many queries are exact.
    """
    n = len(q)
    low = fastest_dtype(FLASH) if exact_below >= _LONG and q.device.type == "cpu" else torch.float32
    numerators, row_sums, logs = v.new_empty(n, v.shape[1]), v.new_empty(n), v.new_empty(n)

    def fill(first: int, last: int) -> None:
        here = slice(first, last)
        if last - first <= max(1, exact_below):
            rows = q[here], k[here], v[here]
            if q.device.type == "cpu":
                # Rounding must not depend on a common offset; the first value is seen by every row.
                own = Flash(*rows[:2], rows[2] - v[first], 1.0, last - first, low)
                numerators[here], logs[here] = own.triangles()
                numerators[here] += v[first]
                row_sums[here] = 1
            else:
                numerators[here], row_sums[here], logs[here] = exact_sums(*rows, is_causal=True)
            return
        middle = first + (last - first) // 2
        fill(first, middle)
        before, here = slice(first, middle), slice(middle, last)
        square = sums(q[here], k[before], v[before], generator)
        fill(middle, last)
        add_sums((numerators[here], row_sums[here], logs[here]), square)

    fill(0, n)
    return numerators, row_sums, logs


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    sums: SumsOfKeys,
    exact_below: int = EXACT_BELOW,
) -> torch.Tensor:
    """Causal attention (n, d_v): `causal_sums`, divided by `causal_answers`."""
    numerators, row_sums, _ = causal_sums(q, k, v, generator, sums, exact_below)
    return causal_answers(numerators, row_sums, q, k, v)


def causal_answers(
    numerators: torch.Tensor, row_sums: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """The quotients (n, d_v); a row whose estimated sum is not positive is computed exactly."""
    out = numerators / row_sums.unsqueeze(1)
    lost = (~((row_sums > 0) & out.sum(1).isfinite())).nonzero().squeeze(1)
    count(recomputed_rows=len(lost))
    # Rows of a triangle's width together: none multiplies keys that are much later than its own.
    for part in (lost // EXACT_BELOW).unique():
        rows = lost[lost // EXACT_BELOW == part]
        end = int(rows[-1]) + 1
        seen = int((rows + 1).sum())
        count(kernel_evaluations=seen, other_products=len(rows) * end - seen)
        future = torch.arange(end, device=q.device) > rows.unsqueeze(1)
        out[rows] = softmax((q[rows] @ k[:end].mT).masked_fill_(future, -torch.inf)) @ v[:end]
    return out
