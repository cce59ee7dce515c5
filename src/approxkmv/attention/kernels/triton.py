"""Triton kernels for CUDA: exact attention, and tiles of queries against their cluster's keys. O(n d) memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from approxkmv.attention.contract import UnavailableError

try:
    import triton
    import triton.language as tl

    from approxkmv.compute.launching import launched
except ImportError as error:
    raise UnavailableError("Triton is not installed: CUDA kernels need it") from error

_LOG2_E = 1.4426950408889634
# Queries of a tile
TILE = 32
# For kernels of the fused form: numbers by which no load is aligned do not each compile code of their own, in 16 times
# as many, or where they are 1. What is compiled is what tests examine.
jit = triton.jit(
    do_not_specialize=(
        *("n", "n_q", "n_k", "q_step", "k_step", "points", "step", "stride"),
        *("rank", "tiles", "clusters", "parts", "most"),
    )
)


@triton.jit
def _weighed(acc, fade, weights, v, ONE_COLUMN: tl.constexpr, PRECISION: tl.constexpr):
    """acc (BM, BV) fade + weights (BM, BN) v (BN, BV)."""
    if ONE_COLUMN:
        # A matrix product would need at least sixteen columns.
        return acc * fade[:, None] + tl.sum(weights * tl.trans(v.to(tl.float32)), 1)[:, None]
    return acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def _absorb(highest, total, acc, logits, v, ONE_COLUMN: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax, in powers of two: logits (BM, BN), v (BN, BV)."""
    higher = tl.maximum(highest, tl.max(logits, 1))
    fade = tl.exp2(highest - higher)
    weights = tl.exp2(logits - higher[:, None])
    total = total * fade + tl.sum(weights, 1)
    return higher, total, _weighed(acc, fade, weights, v, ONE_COLUMN, PRECISION)


@triton.jit
def _exact_kernel(
    q_pointer, k_pointer, v_pointer, out_pointer, n_q, n_k, d, d_v, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    along, values = tl.arange(0, BD), tl.arange(0, BV)
    q = tl.load(
        q_pointer + (entry * n_q + rows[:, None]) * d + along[None, :],
        mask=(rows[:, None] < n_q) & (along[None, :] < d),
        other=0.0,
    )
    highest = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    for first in range(0, n_k, BN):
        keys = first + tl.arange(0, BN)
        k = tl.load(
            k_pointer + (entry * n_k + keys[:, None]) * d + along[None, :],
            mask=(keys[:, None] < n_k) & (along[None, :] < d),
            other=0.0,
        )
        v = tl.load(
            v_pointer + (entry * n_k + keys[:, None]) * d_v + values[None, :],
            mask=(keys[:, None] < n_k) & (values[None, :] < d_v),
            other=0.0,
        )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if first + BN > n_k:
            logits = tl.where(keys[None, :] < n_k, logits, float("-inf"))
        # The factor of the logits is applied in the exponents: one multiplication and addition an entry.
        higher = tl.maximum(highest, tl.max(logits, 1) * scale)
        fade = tl.exp2(highest - higher)
        weights = tl.exp2(logits * scale - higher[:, None])
        total = total * fade + tl.sum(weights, 1)
        acc = _weighed(acc, fade, weights, v, BV == 1, PRECISION)
        highest = higher
    tl.store(
        out_pointer + (entry * n_q + rows[:, None]) * d_v + values[None, :],
        acc / total[:, None],
        mask=(rows[:, None] < n_q) & (values[None, :] < d_v),
    )


@triton.jit
def _listed_kernel(
    q_pointer, query_pointer, cluster_pointer, centre_pointer, k_pointer, v_pointer, near_pointer, extra_pointer,
    out_pointer, total_pointer, log_pointer,
    n_q, n_k, n_near, clusters, d, d_v,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    EXTRA: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(1).to(tl.int64)
    tile = entry * tl.num_programs(0) + tl.program_id(0)
    rows = tl.load(query_pointer + tile * BM + tl.arange(0, BM)).to(tl.int64)
    mine = rows >= 0
    # The last tiles may be without queries.
    if tl.max(rows) >= 0:
        of_block = entry * clusters + tl.load(cluster_pointer + tile)
        along, values = tl.arange(0, BD), tl.arange(0, BV)
        there = along < d
        centre = tl.load(centre_pointer + of_block * d + along, mask=there, other=0.0)
        q = tl.load(
            q_pointer + (entry * n_q + rows[:, None]) * d + along[None, :],
            mask=mine[:, None] & there[None, :],
            other=0.0,
        )
        # The centre's logits are made in float32, so that rounding is relative to what a query adds to them.
        delta = ((q - centre[None, :]) * 1.4426950408889634).to(v_pointer.dtype.element_ty)
        centre = centre * 1.4426950408889634
        highest = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BV), tl.float32)
        for first in range(0, n_near, BN):
            place = first + tl.arange(0, BN)
            listed = place < n_near
            line = of_block * n_near + place
            keys = entry * n_k + tl.load(near_pointer + line, mask=listed, other=0)
            k = tl.load(
                k_pointer + keys[:, None] * d + along[None, :], mask=listed[:, None] & there[None, :], other=0.0
            )
            v = tl.load(
                v_pointer + keys[:, None] * d_v + values[None, :],
                mask=listed[:, None] & (values[None, :] < d_v),
                other=0.0,
            )
            base = tl.sum(k * centre[None, :], 1)
            if EXTRA:
                base += tl.load(extra_pointer + line, mask=listed, other=0.0)
            base = tl.where(listed, base, -1e30)
            logits = tl.dot(delta, tl.trans(k.to(delta.dtype)), input_precision=PRECISION) + base[None, :]
            highest, total, acc = _absorb(highest, total, acc, logits, v, BV == 1, PRECISION)
        rows = entry * n_q + rows
        tl.store(out_pointer + rows[:, None] * d_v + values[None, :], acc, mask=mine[:, None] & (values[None, :] < d_v))
        tl.store(total_pointer + rows, total, mask=mine)
        tl.store(log_pointer + rows, highest, mask=mine)


def _tiles(dtype: torch.dtype, listed: bool) -> dict[str, int]:
    """Rows and keys that a program takes at a time, and its warps; chosen so that no kernel spills registers."""
    full = dtype == torch.float32
    if listed:
        return {"BM": TILE, "BN": 16, "num_warps": 8} if full else {"BM": TILE, "BN": 32}
    return {"BM": 64, "BN": 32 if full else 64}


def _options(d: int, d_v: int, dtype: torch.dtype) -> dict[str, Any]:
    """Launch options other than tiles: padded widths, precision, pipeline stages."""
    if d > 256 or d_v > 256:
        raise UnavailableError("the CUDA kernels hold up to 256 columns on chip, but these inputs have more")
    width, value_width = max(16, triton.next_power_of_2(d)), 1 if d_v == 1 else max(16, triton.next_power_of_2(d_v))
    full = dtype == torch.float32
    options: dict[str, Any] = {
        "BD": width,
        "BV": value_width,
        # Three tensor-core products give float32 precision; plain tf32 would not be exact.
        "PRECISION": "tf32x3" if full else "ieee",
    }
    if full and max(width, value_width) > 128:
        # With pipelined loads it would take up to 320 KiB of shared memory, of the 227 that a block may use on an
        # H100; without them 192.
        options["num_stages"] = 1
    return options


def widened(t: torch.Tensor, multiple: int) -> torch.Tensor:
    """t with columns of zeros up to a multiple, without which several numbers cannot be loaded at once."""
    more = -t.shape[-1] % multiple
    return torch.nn.functional.pad(t, (0, more)) if more else t


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Make a CUDA device current, since Triton launches there. Raises UnavailableError for too large a kernel."""
    try:
        # A negative index has no effect.
        with torch.cuda.device(device if device.type == "cuda" else -1):
            yield
    except triton.OutOfResources as error:
        raise UnavailableError(
            f"the CUDA kernels need more {error.name} than {device} has: {error.required}, but there are {error.limit}"
        ) from error


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale q k^T) v for q (batch, n_q, d), k (batch, n_k, d), v (batch, n_k, d_v), without storing the matrix.

    Raises UnavailableError if the columns do not fit on the chip. The answer carries no gradient.
    """
    # Rows of whole 16 columns can be loaded 16 bytes at a time.
    q, k, v = widened(q, 16).contiguous(), widened(k, 16).contiguous(), v.contiguous()
    batch, n_q, d = q.shape
    n_k, d_v = v.shape[1:]
    options = _options(d, d_v, q.dtype)
    out = torch.empty(batch, n_q, d_v, device=q.device, dtype=torch.float32)
    tiles = _tiles(q.dtype, listed=False)
    with on_device(q.device):
        grid = triton.cdiv(n_q, tiles["BM"]), batch
        launched(_exact_kernel, grid, q, k, v, out, n_q, n_k, d, d_v, scale * _LOG2_E, **tiles, **options)
    return out.to(v.dtype)


def listed(
    q: torch.Tensor,
    tiles: torch.Tensor,
    clusters: torch.Tensor,
    centres: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    near: torch.Tensor,
    extra: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of exp(q.k + extra) times v and 1 over the keys of each query's cluster, and their log scales.

    q (batch, n_q, d), k (batch, n_k, d) float32; v (batch, n_k, d_v) in the type of the products. tiles (batch, tiles,
    TILE) int32: every query once, -1 elsewhere; clusters (batch, tiles) int32: whose keys a tile meets; centres (batch,
    C, d), which its queries are near; near (batch, C, m): the keys of each cluster; extra has the same shape or is 0.
    Returns (batch, n_q, d_v), (batch, n_q) and (batch, n_q) in float32: both sums are divided by exp of the last, a
    row's largest exponent. If every extra is below -1e30 it is about -1e30.
    """
    batch, n_q, d = q.shape
    n_k, d_v = v.shape[1:]
    options = _options(d, d_v, v.dtype)
    out = torch.empty(batch, n_q, d_v, device=q.device, dtype=torch.float32)
    totals, logs = torch.empty_like(out[..., 0]), torch.empty_like(out[..., 0])
    more = logs if extra is None else (extra.float() * _LOG2_E).contiguous()
    with on_device(q.device):
        _listed_kernel[(tiles.shape[1], batch)](
            q.contiguous(), tiles, clusters, centres.contiguous(), k.contiguous(), v.contiguous(),
            near.int().contiguous(), more, out, totals, logs, n_q, n_k, near.shape[2], near.shape[1], d, d_v,
            EXTRA=extra is not None, **_tiles(v.dtype, listed=True), **options,
        )  # fmt: skip
    return out, totals, logs / _LOG2_E
