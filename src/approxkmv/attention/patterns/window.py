"""The keys next to each query, and the first keys of the text, to which language models give much of their weight.

Windows move in blocks, as in Longformer (Beltagy, Peters & Cohan 2020): under the causal mask a query attends to its
own block of keys, up to its own key, to the whole block before it and to the first keys, the attention sinks of
StreamingLLM (Xiao et al., ICLR 2024); without the mask, to its own block and both next to it. All other keys are
dropped. Cost: 1.5 n window d, or 3 n window d.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn.functional import pad

from approxkmv.attention.causal import pairs_seen
from approxkmv.attention.contract import Method, UnavailableError
from approxkmv.attention.kernels.flash import fastest_dtype, flash
from approxkmv.compute.counting import count


@dataclass(frozen=True)
class Parameters:
    """Keys of a block, how many first keys, and the dtype of products."""

    window: int = 1024
    sinks: int = 16
    products: str = "fastest"


def _window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    window: int,
    sinks: int,
    products: str,
    is_causal: bool = False,
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"window runs on a CPU only, not on {q.device.type}")
    if q.shape[1] != k.shape[1]:
        raise UnavailableError(f"window needs a key for each query, but there are {q.shape[1]} and {k.shape[1]}")
    low = fastest_dtype() if products == "fastest" else getattr(torch, products)
    n, d_v = v.shape[1:]
    width = max(q.shape[2], d_v)
    # Rounding must not depend on a common offset; the first value is seen by every row.
    first = v[:, :1].float()
    q, k, values = (pad(t, (0, width - t.shape[2])).to(low) for t in (q, k, v.float() - first))
    window = min(window, n)
    out = (_before if is_causal else _around)(q, k, values, scale, window, min(sinks, window))
    return out[..., :d_v].float().add_(first).to(v.dtype)


def _before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, sinks: int) -> torch.Tensor:
    """The answers (batch, n, width) under the causal mask."""
    (batch, n), blocks = q.shape[:2], -(-q.shape[1] // window)
    q, k, v = (pad(t, (0, 0, 0, blocks * window - n)) for t in (q, k, v))
    # The first two blocks see all keys up to their own.
    start = min(2, blocks) * window
    count(kernel_evaluations=batch * pairs_seen(min(start, n)))
    out = flash((t[:, None, :start] for t in (q, k, v)), scale, is_causal=True)[0].squeeze(1)
    if blocks <= 2:
        return out[:, :n]
    own = tuple(t[:, start:].unflatten(1, (-1, window)) for t in (q, k, v))
    before = (_with_first(t, t[:, window:-window].unflatten(1, (-1, window)), sinks) for t in (k, v))
    whole, rest = divmod(n - start, window)
    count(kernel_evaluations=batch * (whole * pairs_seen(window) + pairs_seen(rest) + (n - start) * (window + sinks)))
    (near, log), (far, far_log) = flash(own, scale, is_causal=True), flash((own[0], *before), scale)
    merged = torch.lerp(far.float(), near.float(), (log - far_log).sigmoid_().unsqueeze(3))
    return torch.cat([out, merged.flatten(1, 2)], 1)[:, :n]


def _around(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, sinks: int) -> torch.Tensor:
    """The answers (batch, n, width) without a mask."""
    batch, n = q.shape[:2]
    blocks = -(-n // window)
    if blocks <= 4:
        count(kernel_evaluations=batch * n * n)
        return flash((t[:, None] for t in (q, k, v)), scale)[0].squeeze(1)
    # Three blocks that end with the last key, for the last queries.
    starts = (torch.arange(1, blocks - 1) * window).clamp_max_(n - 3 * window)
    keys = starts.unsqueeze(1) + torch.arange(3 * window)
    count(kernel_evaluations=batch * (2 * window * 3 * window + (n - 2 * window) * (3 * window + sinks)))
    out = flash((t[:, None, : m * window] for t, m in ((q, 2), (k, 3), (v, 3))), scale)[0].squeeze(1)
    own = pad(q[:, 2 * window :], (0, 0, 0, blocks * window - n)).unflatten(1, (-1, window))
    rest = flash((own, *(_with_first(t, t[:, keys], sinks) for t in (k, v))), scale)[0]
    return torch.cat([out, rest.flatten(1, 2)], 1)[:, :n]


def _with_first(t: torch.Tensor, blocks: torch.Tensor, sinks: int) -> torch.Tensor:
    """The first rows of t (batch, n, width) before those of each of the blocks (batch, blocks, window, width)."""
    return torch.cat([t[:, None, :sinks].expand(-1, blocks.shape[1], -1, -1), blocks], 2)


method = Method(
    name="window",
    compute=_window,
    causal=partial(_window, is_causal=True),
    summary="the keys next to each query, in blocks, and the first keys of the text",
    defaults=asdict(Parameters()),
    may_be_zero=frozenset({"sinks"}),
    choices={"products": ("fastest", "bfloat16", "float32")},
    grid=[{"window": 2**i} for i in range(6, 13)],
    seeded=False,
)
