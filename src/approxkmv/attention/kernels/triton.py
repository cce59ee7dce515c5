"""Triton kernels for CUDA: exact attention, and a block of queries against its own list of keys. O(n d) memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from approxkmv.attention.contract import UnavailableError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise UnavailableError("Triton is not installed: CUDA kernels need it") from error

# Triton 3.6's interpreter multiplies the bits of bfloat16 as integers, so there, and only there, they are widened.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Loop lengths are constants of a kernel, which costs a compilation for each: under NumPy 2.4 the interpreter cannot
# turn a runtime length into a range.
_LOG2_E = 1.4426950408889634


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _absorb(highest, total, acc, logits, v, ONE_COLUMN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """One step of the online softmax, in powers of two: logits (BM, BN), v (BN, BV)."""
    higher = tl.maximum(highest, tl.max(logits, 1))
    fade = tl.exp2(highest - higher)
    weights = tl.exp2(logits - higher[:, None])
    total = total * fade + tl.sum(weights, 1)
    if ONE_COLUMN:
        # A matrix product would need at least sixteen columns.
        acc = acc * fade[:, None] + tl.sum(weights * tl.trans(v.to(tl.float32)), 1)[:, None]
    else:
        acc = acc * fade[:, None] + _dot(weights.to(v.dtype), v, PRECISION, WIDEN)
    return higher, total, acc


@triton.jit
def _exact_kernel(
    q_pointer, k_pointer, v_pointer, out_pointer, n_q, n_k, d, d_v, scale,
    KEYS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    along, values = tl.arange(0, BD), tl.arange(0, BV)
    q = tl.load(
        q_pointer + entry * n_q * d + rows[:, None].to(tl.int64) * d + along[None, :],
        mask=(rows[:, None] < n_q) & (along[None, :] < d),
        other=0.0,
    )
    highest = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    for first in range(0, KEYS, BN):
        keys = first + tl.arange(0, BN)
        k = tl.load(
            k_pointer + entry * n_k * d + keys[:, None].to(tl.int64) * d + along[None, :],
            mask=(keys[:, None] < n_k) & (along[None, :] < d),
            other=0.0,
        )
        v = tl.load(
            v_pointer + entry * n_k * d_v + keys[:, None].to(tl.int64) * d_v + values[None, :],
            mask=(keys[:, None] < n_k) & (values[None, :] < d_v),
            other=0.0,
        )
        logits = _dot(q, tl.trans(k), PRECISION, WIDEN) * scale
        logits = tl.where(keys[None, :] < n_k, logits, -1e30)
        highest, total, acc = _absorb(highest, total, acc, logits, v, BV == 1, PRECISION, WIDEN)
    tl.store(
        out_pointer + entry * n_q * d_v + rows[:, None].to(tl.int64) * d_v + values[None, :],
        acc / total[:, None],
        mask=(rows[:, None] < n_q) & (values[None, :] < d_v),
    )


@triton.jit
def _listed_kernel(
    q_pointer, k_pointer, v_pointer, near_pointer, extra_pointer, out_pointer, total_pointer, log_pointer,
    rows_per_block, n_rows, n_k, n_near, d, d_v, scale,
    NEAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    EXTRA: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    inside = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = (block * rows_per_block + inside).to(tl.int64)
    mine = (inside < rows_per_block) & (rows < n_rows)
    along, values = tl.arange(0, BD), tl.arange(0, BV)
    q = tl.load(
        q_pointer + entry * n_rows * d + rows[:, None] * d + along[None, :],
        mask=mine[:, None] & (along[None, :] < d),
        other=0.0,
    )
    highest = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    blocks = tl.num_programs(1)
    for first in range(0, NEAR, BN):
        place = first + tl.arange(0, BN)
        listed = place < n_near
        line = (entry * blocks + block) * n_near + place
        keys = tl.load(near_pointer + line, mask=listed, other=0).to(tl.int64)
        k = tl.load(
            k_pointer + entry * n_k * d + keys[:, None] * d + along[None, :],
            mask=listed[:, None] & (along[None, :] < d),
            other=0.0,
        )
        v = tl.load(
            v_pointer + entry * n_k * d_v + keys[:, None] * d_v + values[None, :],
            mask=listed[:, None] & (values[None, :] < d_v),
            other=0.0,
        )
        logits = _dot(q, tl.trans(k), PRECISION, WIDEN) * scale
        if EXTRA:
            logits += tl.load(extra_pointer + line, mask=listed, other=0.0)[None, :]
        logits = tl.where(listed[None, :], logits, -1e30)
        highest, total, acc = _absorb(highest, total, acc, logits, v, BV == 1, PRECISION, WIDEN)
    tl.store(
        out_pointer + entry * n_rows * d_v + rows[:, None] * d_v + values[None, :],
        acc,
        mask=mine[:, None] & (values[None, :] < d_v),
    )
    tl.store(total_pointer + entry * n_rows + rows, total, mask=mine)
    tl.store(log_pointer + entry * n_rows + rows, highest, mask=mine)


def _options(d: int, d_v: int, dtype: torch.dtype) -> dict[str, Any]:
    """Launch options other than tiles: padded widths, precision, pipeline stages."""
    if d > 256 or d_v > 256:
        raise UnavailableError(f"the CUDA kernels hold up to 256 columns on chip, but these inputs have {max(d, d_v)}")
    width, value_width = max(16, triton.next_power_of_2(d)), 1 if d_v == 1 else max(16, triton.next_power_of_2(d_v))
    full = dtype == torch.float32
    options: dict[str, Any] = {
        "BD": width,
        "BV": value_width,
        # Three tensor-core products give float32 precision; plain tf32 would not be exact.
        "PRECISION": "tf32x3" if full else "ieee",
        "WIDEN": _INTERPRETED and dtype == torch.bfloat16,
    }
    if full and max(width, value_width) > 128:
        # With pipelined loads it would take up to 320 KiB of shared memory, of the 227 that a block may use on an
        # H100; without them 192.
        options["num_stages"] = 1
    return options


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
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, n_q, d = q.shape
    n_k, d_v = v.shape[1:]
    options = _options(d, d_v, q.dtype)
    out = torch.empty(batch, n_q, d_v, device=q.device, dtype=torch.float32)
    rows, keys = (64, 64) if q.dtype == torch.bfloat16 else (64, 32)
    with on_device(q.device):
        _exact_kernel[(triton.cdiv(n_q, rows), batch)](
            q, k, v, out, n_q, n_k, d, d_v, scale * _LOG2_E, KEYS=n_k, BM=rows, BN=keys, **options
        )  # fmt: skip
    return out.to(v.dtype)


def listed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    near: torch.Tensor,
    extra: torch.Tensor | None,
    block: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of exp(scale q.k + extra) times v and 1 over the keys of each block of queries, and their log scales.

    q (batch, rows, d): rows i block to (i+1) block are block i; near (batch, blocks, m): the keys of each block;
    extra has the same shape or is 0. Returns (batch, rows, d_v), (batch, rows) and (batch, rows) in float32: both sums
    are divided by exp of the last, a row's largest exponent. If every extra is below -1e30 it is about -1e30.
    """
    batch, rows, d = q.shape
    n_k, d_v = v.shape[1:]
    options = _options(d, d_v, q.dtype)
    out = torch.empty(batch, rows, d_v, device=q.device, dtype=torch.float32)
    totals, logs = torch.empty_like(out[..., 0]), torch.empty_like(out[..., 0])
    tile = min(64, max(16, triton.next_power_of_2(block)))
    blocks = near.shape[1]
    more = logs if extra is None else (extra.float() * _LOG2_E).clamp_min(-1e30).contiguous()
    with on_device(q.device):
        _listed_kernel[(triton.cdiv(block, tile), blocks, batch)](
            q.contiguous(), k.contiguous(), v.contiguous(), near.to(torch.int32).contiguous(), more, out, totals, logs,
            block, rows, n_k, near.shape[2], d, d_v, scale * _LOG2_E,
            NEAR=near.shape[2], BM=tile, BN=32, EXTRA=extra is not None, **options,
        )  # fmt: skip
    return out, totals, logs / _LOG2_E
