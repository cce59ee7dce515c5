"""Near keys exactly, all other keys expanded around the centre of a block of queries.

Queries are clustered into blocks. Around a block's centre c, with q = c + delta and V the block's (diagonal)
covariance, exp(q.k) = exp(c.k + k'Vk/2) exp(delta.k - k'Vk/2), where the second factor has mean one over the block if
its queries are Gaussian. The first factor ranks the keys: the `near` highest are computed exactly for each query of
the block. The others are summed with it into one virtual key per block, to first order in delta in the weights and,
for few value columns, in the values. Cost: n d (near + n / block), up to constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from approxkmv.attention import exact_fused
from approxkmv.attention.acceleration import compiled_loops, over_threads
from approxkmv.attention.contract import Method, UnavailableError, per_batch

# Each column of v costs d more columns in the far sums, so that many columns keep the block's mean far value.
_TILTED_COLUMNS = 2
# The keys' matrix products in bfloat16 want shapes that repeat: oneDNN compiles a kernel for each new one.
_ROWS_OF_BFLOAT16 = 16
_KEYS_OF_BFLOAT16 = 64
# One key in so many decides the threshold above which a block's keys are near.
_SAMPLED_KEYS = 8
_FEW_COLUMNS = 8
# The compiled loop takes four queries and four coordinates at a time.
_ROWS_OF_LOOP = 4


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere such products are emulated and slow."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported()) and torch.backends.mkldnn.is_available()


def k_means(
    points: torch.Tensor, clusters: int, iterations: int, sampled: int, generator: torch.Generator
) -> torch.Tensor:
    """Label (n,) of each of points (n, r): Lloyd's iterations on `sampled` points a cluster, then one on all."""
    n = len(points)
    shuffled = torch.randperm(n, generator=generator)
    centres = points[shuffled[:clusters]]
    some = points[shuffled[: sampled * clusters]]
    for _ in range(iterations):
        labels = torch.addmm(centres.square().sum(1), some, centres.mT, alpha=-2).argmin(1)
        counts = torch.bincount(labels, minlength=clusters).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, labels, some)
        centres = torch.where(counts > 0, sums / counts, centres)
    norms = centres.square().sum(1)
    # In pieces, so that the distances stay in the cache
    return torch.cat([torch.addmm(norms, part, centres.mT, alpha=-2).argmin(1) for part in points.split(2048)])


@dataclass(frozen=True)
class Blocks:
    """Queries in blocks of near neighbours, each block's rows contiguous and padded to a multiple of some rows."""

    rows: torch.Tensor
    """(n,) where query order[i] lies in `deltas`."""
    order: torch.Tensor
    """(n,) queries, block after block."""
    starts: list[int]
    sizes: list[int]
    """First row and padded number of rows of each block."""
    centres: torch.Tensor
    """(blocks, d)"""
    deltas: torch.Tensor
    """(padded n, d) query minus its block's centre, zero where padded."""
    variances: torch.Tensor
    """(blocks, d) mean square of the deltas along each axis."""


def make_blocks(q: torch.Tensor, labels: torch.Tensor, multiple: int) -> Blocks:
    """Blocks of the queries q (n, d) that share a label."""
    label = labels.numpy().astype(np.uint16 if labels.max() < 65536 else np.int64)
    order = np.argsort(label, kind="stable")
    counts = np.bincount(label)
    counts = counts[counts > 0]
    firsts = np.concatenate([[0], counts.cumsum()[:-1]])
    padded = -(-counts // multiple) * multiple
    starts = np.concatenate([[0], padded.cumsum()[:-1]])
    rows = torch.from_numpy(np.arange(len(order)) + np.repeat(starts - firsts, counts))
    order_tensor = torch.from_numpy(order)
    ordered = q[order_tensor]
    size = torch.from_numpy(counts.astype(np.float32)).unsqueeze(1)
    centres = torch.from_numpy(np.add.reduceat(ordered.numpy(), firsts, axis=0)) / size
    ordered -= centres.repeat_interleave(torch.from_numpy(counts), 0)
    variances = torch.from_numpy(np.add.reduceat(ordered.square().numpy(), firsts, axis=0)) / size
    if multiple == 1:
        deltas = ordered
    else:
        deltas = q.new_zeros(int(padded.sum()), q.shape[1])
        deltas[rows] = ordered
    return Blocks(rows, order_tensor, starts.tolist(), padded.tolist(), centres, deltas, variances)


def rotate(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and centred k in the axes of the keys' covariance, and its eigenvalues, largest first.

    The products q.k only lose a term that is the same for all keys, which attention does not see.
    """
    k = k - k.mean(0)
    some = k[:: max(1, len(k) // 4096)]
    values, vectors = torch.linalg.eigh(some.mT @ some / len(some))
    axes = vectors.flip(1)
    return q @ axes, k @ axes, values.flip(0).clamp_min(0)


def near_sums(
    blocks: Blocks,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: np.ndarray,
    ends: np.ndarray,
    floor: torch.Tensor,
    low: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums and numerators (rows, 1 + d_v) over the near keys, and the log that each block's are divided by.

    Block b's near keys are chosen[ends[b-1]:ends[b]]; its log is at least floor[b].
    """
    count, d_v = len(blocks.sizes), v.shape[1]
    sums, shifts = torch.empty(len(blocks.deltas), 1 + d_v), torch.empty(count)
    loops = compiled_loops() if d_v <= _FEW_COLUMNS else None
    if loops is not None:
        starts, sizes = np.array(blocks.starts), np.array(blocks.sizes)
        tensors = [t.contiguous().numpy() for t in (k, v, blocks.centres, floor, shifts, sums)]
        given = (blocks.deltas.numpy(), starts, sizes, tensors[0], tensors[1], chosen, ends, *tensors[2:])
        over_threads(lambda first, last: loops.near_sums(first, last, *given), count)
        return sums, shifts
    step = _KEYS_OF_BFLOAT16 if low == torch.bfloat16 else 1
    indices = torch.from_numpy(chosen)
    most = int(np.diff(ends, prepend=0).max())
    most = -(-most // step) * step
    keys = torch.zeros(most, k.shape[1])
    low_keys = keys if low == torch.float32 else torch.zeros(most, k.shape[1], dtype=low)
    pairs = torch.zeros(most, 1 + d_v)
    space = torch.empty(max(blocks.sizes) * most, dtype=low)
    low_deltas = blocks.deltas.to(low)
    begin = 0
    for b, (start, rows, end) in enumerate(zip(blocks.starts, blocks.sizes, ends.tolist(), strict=True)):
        here = indices[begin:end]
        m = end - begin
        wide = -(-m // step) * step
        begin = end
        torch.index_select(k, 0, here, out=keys[:m])
        base = keys[:m] @ blocks.centres[b]
        shifts[b] = torch.maximum(base.max(), floor[b])
        part = pairs[:wide]
        part[m:] = 0
        torch.exp(base - shifts[b], out=part[:m, 0])
        torch.mul(v[here], part[:m, :1], out=part[:m, 1:])
        if low == torch.bfloat16:
            low_keys[:m] = keys[:m]
        logits = space[: rows * wide].view(rows, wide)
        torch.mm(low_deltas[start : start + rows], low_keys[:wide].mT, out=logits)
        logits.exp_()
        if low == torch.bfloat16:
            sums[start : start + rows] = torch.mm(logits, part.to(low)).float()
        elif d_v < _FEW_COLUMNS:
            for c in range(1 + d_v):
                sums[start : start + rows, c] = torch.mv(logits, part[:, c])
        else:
            torch.mm(logits, part, out=sums[start : start + rows])
    return sums, shifts


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    *,
    scale: float,
    block: int,
    near: int,
    directions: int,
    iterations: int,
    sampled: int,
    products: str,
) -> torch.Tensor:
    """The method for one batch entry on a CPU: float32 q (n_q, d), k (n_k, d), v (n_k, d_v) to (n_q, d_v)."""
    n, n_k, d, d_v = len(q), len(k), q.shape[1], v.shape[1]
    if near >= n_k:
        return exact_fused.attend(q, k, v, scale, 512)
    low = torch.bfloat16 if products == "bfloat16" else torch.float32
    looped = d_v <= _FEW_COLUMNS and compiled_loops() is not None
    multiple = _ROWS_OF_LOOP if looped else _ROWS_OF_BFLOAT16 if low == torch.bfloat16 else 1
    original = q, k
    q, k, spread = rotate(q * scale, k)
    if d % 4:
        q, k = (torch.nn.functional.pad(t, (0, -d % 4)) for t in (q, k))
        d = q.shape[1]
    # A step of the query along an axis changes its logits by the keys' spread along it; the power below one half
    # keeps some weight on the other axes, along which the keys near the top may still differ.
    metric = spread[:directions].pow(0.4)
    labels = k_means(q[:, :directions] * metric, -(-n // block), iterations, sampled, generator)
    blocks = make_blocks(q, labels, multiple)
    count = len(blocks.sizes)

    # log of the first factor, for all blocks and keys, in one product
    squares = k.square()
    ranked = torch.cat([k, squares], 1).to(low)
    logs = torch.mm(torch.cat([blocks.centres, 0.5 * blocks.variances], 1).to(low), ranked.mT)
    highest = logs.amax(1, keepdim=True)
    sample = logs[:, generator.initial_seed() % _SAMPLED_KEYS :: _SAMPLED_KEYS].float().contiguous()
    kept = min(max(1, near // _SAMPLED_KEYS), sample.shape[1])
    thresholds = torch.from_numpy(
        np.partition(sample.numpy(), sample.shape[1] - kept, axis=1)[:, sample.shape[1] - kept].copy()
    ).unsqueeze(1)
    is_near = logs >= thresholds.to(low)

    # far sums
    weights = (logs - highest).exp_().masked_fill_(is_near, 0)
    tilted = d_v <= _TILTED_COLUMNS
    features = [k.new_ones(n_k, 1), v, k, *([v[:, c : c + 1] * k for c in range(d_v)] if tilted else [])]
    sums = torch.mm(weights, torch.cat(features, 1).to(low)).float()
    total = sums[:, :1].clamp_min(1e-30)
    far_v = sums[:, 1 : 1 + d_v] / total
    far_k = sums[:, 1 + d_v : 1 + d_v + d] / total
    # The virtual key's own second-order term is in its weight already.
    far_log = (sums[:, 0].clamp_min(1e-30).log() + highest[:, 0].float()) - 0.5 * (
        blocks.variances * far_k.square()
    ).sum(1)
    directions_of_far = [far_k.unsqueeze(2)]
    if tilted:
        tilts = sums[:, 1 + d_v + d :].view(count, d_v, d) / total.unsqueeze(2) - far_v.unsqueeze(2) * far_k.unsqueeze(1)
        directions_of_far.append(tilts.mT)
    far_axes = torch.cat(directions_of_far, 2)

    chosen = np.flatnonzero(is_near.numpy())
    ends = np.searchsorted(chosen, np.arange(1, count + 1) * n_k)
    chosen %= n_k
    exact_sums, shifts = near_sums(blocks, k, v, chosen, ends, far_log, low)

    # the far key of each block, seen from each of its queries
    offsets = torch.empty(len(blocks.deltas), far_axes.shape[2])
    for b, (start, rows) in enumerate(zip(blocks.starts, blocks.sizes, strict=True)):
        torch.mm(blocks.deltas[start : start + rows], far_axes[b], out=offsets[start : start + rows])
    of_row = torch.from_numpy(np.repeat(np.arange(count), blocks.sizes))
    far_weight = (offsets[:, :1] + (far_log - shifts)[of_row].unsqueeze(1)).exp_()
    far_value = far_v[of_row] + offsets[:, 1:] if tilted else far_v[of_row]
    answer = (exact_sums[:, 1:] + far_weight * far_value) / (exact_sums[:, :1] + far_weight)

    out = torch.empty(n, d_v)
    out[blocks.order] = answer[blocks.rows]
    if not bool(out.sum().isfinite()):
        # A query so far from its block that exp overflowed: those rows exactly
        lost = (~out.isfinite().all(1)).nonzero().squeeze(1)
        out[lost] = exact_fused.attend(original[0][lost], original[1], v, scale, 512)
    return out


def _local_expansion(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    block: int,
    near: int,
    directions: int,
    iterations: int,
    sampled: int,
    products: str,
) -> torch.Tensor:
    if products == "fastest":
        products = "bfloat16" if native_bfloat16() else "float32"
    if q.device.type != "cpu":
        raise UnavailableError(f"local-expansion has no kernel for the device {q.device}")

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return attend(
            q,
            k,
            v,
            generator,
            scale=scale,
            block=block,
            near=near,
            directions=directions,
            iterations=iterations,
            sampled=sampled,
            products=products,
        )

    return per_batch(single, q, k, v, seed)


method = Method(
    name="local-expansion",
    compute=_local_expansion,
    summary="near keys exactly, far keys expanded around the centre of a block of queries",
    defaults={
        "block": 64,
        "near": 512,
        "directions": 48,
        "iterations": 3,
        "sampled": 16,
        "products": "fastest",
    },
    grid=[
        {"block": 512, "near": 64},
        {"block": 256, "near": 128},
        {"block": 128, "near": 256},
        {"block": 128, "near": 512},
        {"block": 64, "near": 512},
        {"block": 64, "near": 1024},
        {"block": 32, "near": 1024},
        {"block": 32, "near": 2048},
    ],
)
