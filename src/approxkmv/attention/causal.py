"""Causal attention by recursion, for any method that can return its sums before they are divided.

The lower triangle of n queries and keys consists of two triangles of half the size and one full square below the
diagonal. Triangles are split until they are small enough to be exact; the squares are what a method approximates.
(Zandieh et al. 2023 and Han et al. 2024 split the mask in the same way.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import pad

from approxkmv.attention.kernels.exponentials import exp_
from approxkmv.compute.counting import count
from approxkmv.compute.trial import fastest

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


def flash_triangle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, low: torch.dtype) -> Sums:
    """The causal sums on a CPU by torch's flash attention with products of dtype `low`; row sums are 1."""
    count(kernel_evaluations=pairs_seen(len(q)))
    # Rounding must not depend on a common offset; the first value is seen by every row.
    first = v[:1]
    v = v - first
    width, d_v = max(q.shape[1], v.shape[1]), v.shape[1]
    # The kernel takes rows for contiguous.
    q, k, v = (pad(t, (0, width - t.shape[1])).to(low).contiguous()[None, None] for t in (q, k, v))
    out, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=1.0)
    return out[0, 0, :, :d_v].float() + first, torch.ones(out.shape[2]), logs.reshape(-1)


def add_sums(here: Sums, other: Sums) -> None:
    """Add the sums over other keys, for the same queries, in place, relative to the larger of their logs."""
    numerators, row_sums, logs = here
    highest = torch.maximum(logs, other[2])
    fade, other_fade = exp_(logs - highest), exp_(other[2] - highest)
    numerators.mul_(fade.unsqueeze(1)).addcmul_(other[0], other_fade.unsqueeze(1))
    row_sums.mul_(fade).addcmul_(other[1], other_fade)
    logs.copy_(highest)


def causal_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    sums: SumsOfKeys,
    exact_below: int,
    triangle: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Sums] | None = None,
) -> Sums:
    """Sums over the keys up to each query's own, with the squares below the diagonal computed by `sums`.

    Args:
        q, k, v: (n, d), (n, d), (n, d_v) float32, the queries scaled.
        sums: if it is unbiased, so are these sums; its logs must refer to the given keys, not to shifted ones.
        exact_below: triangles of at most this many queries are exact.
        triangle: f(q, k, v), their exact sums; None takes torch's flash attention on a CPU, elsewhere `exact_sums`.
    """
    n = len(q)
    if triangle is None and q.device.type == "cpu":
        question = "attention.blocks.trials.products"
        low = fastest(question, "float32", "bfloat16") if exact_below >= _LONG else "float32"
        triangle = partial(flash_triangle, low=getattr(torch, low))
    numerators, row_sums, logs = v.new_empty(n, v.shape[1]), v.new_empty(n), v.new_empty(n)

    def fill(first: int, last: int) -> None:
        here = slice(first, last)
        if last - first <= max(1, exact_below):
            rows = q[here], k[here], v[here]
            exact = triangle(*rows) if triangle is not None else exact_sums(*rows, is_causal=True)
            numerators[here], row_sums[here], logs[here] = exact
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
    lost = (~((row_sums > 0) & out.isfinite().all(1))).nonzero().squeeze(1)
    count(kernel_evaluations=int((lost + 1).sum()), recomputed_rows=len(lost))
    for i in lost.tolist():
        out[i] = (k[: i + 1] @ q[i]).softmax(0) @ v[: i + 1]
    return out
