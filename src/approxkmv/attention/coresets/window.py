"""The keys next to each query, and the first keys of the text, to which language models give much of their weight.

Windows move in blocks, as in Longformer (Beltagy, Peters & Cohan 2020): under the causal mask a query attends to its
own block of keys, up to its own key, to the whole block before it and to the first keys, the attention sinks of
StreamingLLM (Xiao et al., ICLR 2024); without the mask, to three blocks around its own, or to all keys if there are at
most four blocks. Fewer queries than keys are the last ones: they share the last keys, `window` of them before the first
query's. All other keys are dropped. Cost: 1.5 n window d, or 3 n window d.
"""

from __future__ import annotations

from functools import partial

import torch

from approxkmv.attention.causal import pairs_seen
from approxkmv.attention.contract import Method, UnavailableError
from approxkmv.attention.kernels.flash import FLASH, flash
from approxkmv.compute.counting import count
from approxkmv.compute.scratch import scratch
from approxkmv.compute.trial import fastest_dtype


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
    (n_q, n), dtype = (q.shape[1], k.shape[1]), v.dtype
    if n_q > n:
        raise UnavailableError(f"window needs a key for each query, but there are {n_q} and {n}")
    low = fastest_dtype(FLASH, products)
    window, sinks = min(window, n), min(sinks, window, n)
    # Rounding must not depend on a common offset; no row comes before the first value.
    first = v[:, :1].float()
    if n_q < n:
        k, v = (_last(t, n_q + window, sinks) for t in (k, v))
    rows = -(-n // window) * window if n_q == n else 0
    width, given = max(q.shape[2], v.shape[2]), (("q", q, None), ("k", k, None), ("v", v, first))
    q, k, v = (
        _padded(scratch(f"window {name}", len(t), max(rows, t.shape[1]), width, dtype=low), t, offset)
        for name, t, offset in given
    )
    out = torch.empty(len(q), q.shape[1], first.shape[2])
    if n_q < n:
        _all_pairs(q, k, v, scale, out)
    elif is_causal:
        _before(q, k, v, scale, window, sinks, out)
    else:
        _around(q, k, v, scale, window, sinks, n, out)
    return out[:, :n_q].add_(first).to(dtype).contiguous()


def _last(t: torch.Tensor, number: int, sinks: int) -> torch.Tensor:
    """The last rows of t (batch, n, width) and, before them, the first ones."""
    return t if number + sinks >= t.shape[1] else torch.cat([t[:, :sinks], t[:, -number:]], 1)


def _padded(out: torch.Tensor, t: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """t (batch, n, width) less the offset, if any, in the beginning of `out`, whose other rows and columns are 0."""
    n, width = t.shape[1:]
    out[:, n:], out[..., width:] = 0, 0
    out[:, :n, :width].copy_(t if offset is None else t - offset)
    return out


def _before(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, sinks: int, out: torch.Tensor
) -> None:
    """Write the answers of q, k and v (batch, rows, width) under the causal mask to `out` (batch, rows, d_v)."""
    batch, rows, d_v = out.shape
    # The first two blocks see all keys up to their own.
    start = min(2 * window, rows)
    count(kernel_evaluations=batch * pairs_seen(start))
    out[:, :start] = flash((t[:, None, :start] for t in (q, k, v)), scale, is_causal=True)[0][:, 0, :, :d_v]
    if start == rows:
        return
    own = tuple(t[:, start:].unflatten(1, (-1, window)) for t in (q, k, v))
    before = (_with_first(t, t[:, window:-window].unflatten(1, (-1, window)), sinks) for t in (k, v))
    of_block = pairs_seen(window) + window * (window + sinks)
    count(kernel_evaluations=batch * (rows - start) // window * of_block)
    (near, log), (far, far_log) = flash(own, scale, is_causal=True), flash((own[0], *before), scale)
    merged = out[:, start:].unflatten(1, (-1, window)).copy_(far[..., :d_v])
    merged.lerp_(scratch("window near", *merged.shape).copy_(near[..., :d_v]), (log - far_log).sigmoid_().unsqueeze(3))


def _around(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, sinks: int, n: int, out: torch.Tensor
) -> None:
    """Write the answers without a mask to `out` (batch, rows, d_v); of q, k and v, n rows are no padding."""
    batch, rows, d_v = out.shape
    if rows <= 4 * window:
        _all_pairs(q[:, :n], k[:, :n], v[:, :n], scale, out[:, :n])
        return
    # Three blocks that end with the last key, for the last queries.
    starts = (torch.arange(1, rows // window - 1) * window).clamp_max_(n - 3 * window)
    keys = starts.unsqueeze(1) + torch.arange(3 * window)
    count(kernel_evaluations=batch * (2 * window * 3 * window + (rows - 2 * window) * (3 * window + sinks)))
    start = 2 * window
    of_first = (t[:, None, : m * window] for t, m in ((q, 2), (k, 3), (v, 3)))
    out[:, :start] = flash(of_first, scale)[0][:, 0, :, :d_v]
    of_rest = q[:, start:].unflatten(1, (-1, window)), *(_with_first(t, t[:, keys], sinks) for t in (k, v))
    out[:, start:].unflatten(1, (-1, window)).copy_(flash(of_rest, scale)[0][..., :d_v])


def _all_pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Write the answers of all queries (batch, n_q, width) on all keys to `out` (batch, n_q, d_v)."""
    count(kernel_evaluations=len(q) * q.shape[1] * k.shape[1])
    out.copy_(flash((t[:, None] for t in (q, k, v)), scale)[0][:, 0, :, : out.shape[2]])


def _with_first(t: torch.Tensor, blocks: torch.Tensor, sinks: int) -> torch.Tensor:
    """The first rows of t (batch, n, width) before those of each of the blocks (batch, blocks, window, width)."""
    return torch.cat([t[:, None, :sinks].expand(-1, blocks.shape[1], -1, -1), blocks], 2)


method = Method(
    name="window",
    compute=_window,
    causal=partial(_window, is_causal=True),
    summary="the keys next to each query, in blocks, and the first keys of the text",
    # Keys of a block, how many first keys, at most a block of them, and the dtype of products
    defaults={"window": 1024, "sinks": 16, "products": "fastest"},
    may_be_zero=frozenset({"sinks"}),
    choices={"products": ("fastest", "bfloat16", "float32")},
    grid=[{"window": window} for i in range(6, 13) for window in (2**i, 3 * 2 ** (i - 1))],
    seeded=False,
)
