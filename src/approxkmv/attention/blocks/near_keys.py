"""The near keys of each block of queries: choosing them, and exact sums over them."""

from __future__ import annotations

import numpy as np
import torch

from approxkmv.attention.blocks.arrays import KeyArrays, ScaledSums, Threshold, WeightSums
from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.blocks.grouping import Blocks
from approxkmv.compute.counting import count
from approxkmv.compute.loops import has_bfloat16_instructions
from approxkmv.compute.threads import over_threads
from approxkmv.compute.trial import fastest

# With more columns than this a matrix product is faster than a product with each column.
_FEW_COLUMNS = 8
# oneDNN compiles a kernel for each new shape of a bfloat16 product, so shapes should repeat.
_KEYS_OF_BFLOAT16 = 64
# The threshold above which a block's keys are near is estimated from every so-many-th key.
SAMPLED_KEYS = 8
# Trials of the loops in float32 against bfloat16
NEAR_KEYS_FEW = "attention.blocks.trials.near_keys_few_columns"
NEAR_KEYS_MANY = "attention.blocks.trials.near_keys_many_columns"


def as_numbers(stored: torch.Tensor) -> np.ndarray:
    """float32 numbers, or the bits of bfloat16 ones, which NumPy lacks, for the compiled loops."""
    return (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()


def rank_of_bar(n_k: int, near: int, first: int) -> int:
    """The rank, from below, of the threshold among the sampled keys."""
    in_sample = len(range(first, n_k, SAMPLED_KEYS))
    return in_sample - min(max(1, near // SAMPLED_KEYS), in_sample)


def choose_keys(
    logs: torch.Tensor, near: int, first: int, v: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    """The highest log of a far key and the threshold (blocks,), chosen and ends of an expansion, sums of its weights.

    About `near` keys of each block have a log (blocks, n_k) of at least its threshold, which is estimated from a sample
    of the keys starting at `first`. Writes weights (blocks, 1 + tilts, n_k): exp(logs - highest) of the other keys,
    times 1 and the columns of v (n_k, tilts); their sums are (blocks,) and (blocks, tilts). `highest` is over the far
    keys, since relative to a near key with a much higher log all of their weights might vanish.
    """
    blocks, n_k = logs.shape
    tilts = v.shape[1]
    kept = rank_of_bar(n_k, near, first)
    loops = block_loops()
    if loops is not None:
        highest, thresholds = torch.empty(blocks), torch.empty(blocks)
        totals, values = torch.empty(blocks), torch.empty(blocks, tilts)
        counts, columns = np.empty(blocks, np.int64), v.mT.contiguous().numpy()
        bits = as_numbers(logs)
        found = WeightSums(highest.numpy(), thresholds.numpy(), totals.numpy(), values.numpy())
        given = bits, Threshold(kept, first, SAMPLED_KEYS), columns, as_numbers(weights), counts, found
        over_threads(lambda low, high: loops.expansion.fill_weights(low, high, *given), blocks)
        ends = counts.cumsum()
        chosen = np.empty(ends[-1], np.int64)
        over_threads(
            lambda low, high: loops.expansion.list_near(low, high, bits, found.thresholds, ends, chosen), blocks
        )
        return highest, thresholds, chosen, ends, totals, values
    sample = logs[:, first::SAMPLED_KEYS].float()
    thresholds = torch.from_numpy(np.partition(sample.numpy(), kept, axis=1)[:, kept].copy())
    is_near = logs >= thresholds.to(logs.dtype).unsqueeze(1)
    top = logs.masked_fill(is_near, -torch.inf).amax(1).float()
    highest = torch.where(top.isfinite(), top, thresholds)
    torch.sub(logs, highest.to(logs.dtype).unsqueeze(1), out=weights[:, 0]).masked_fill_(is_near, -torch.inf).exp_()
    torch.mul(weights[:, :1], v.mT.to(logs.dtype), out=weights[:, 1:])
    chosen = np.flatnonzero(is_near.numpy())
    ends = np.searchsorted(chosen, np.arange(1, blocks + 1) * n_k)
    return highest, thresholds, chosen % n_k, ends, weights[:, 0].float().sum(1), weights[:, 1:].float().sum(2)


def sums_of_keys(
    blocks: Blocks,
    k: torch.Tensor,
    mean: torch.Tensor,
    v: torch.Tensor,
    chosen: np.ndarray,
    ends: np.ndarray,
    extra: torch.Tensor | None = None,
    rounded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (rows, 1 + d_v) of exp(q.(k - mean) + extra) [1, v] over each block's chosen keys, and their log scales.

    Block b's keys are chosen[ends[b-1]:ends[b]], its sums are divided by exp(scale_b); extra is (len(chosen),) or 0.
    rounded: from the expansion; if given, products are of bfloat16 numbers, in loops if a trial found that faster.
    """
    number, d_v = len(blocks), v.shape[1]
    sums, scales = torch.empty(len(blocks.deltas), 1 + d_v), torch.empty(number)
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    # Each key with each query, including padded rows, and with the block's centre
    count(kernel_evaluations=int((blocks.sizes + 1) @ lengths))
    loops = block_loops()
    if extra is None:
        extra = torch.zeros(len(chosen))
    if loops is not None:
        arrays = KeyArrays(*(t.contiguous().numpy() for t in (k, mean, v)))
        out = ScaledSums(sums.numpy(), scales.numpy())
        few = d_v <= loops.gathered.FEW_COLUMNS
        bits = None
        if rounded is not None and has_bfloat16_instructions():
            question = NEAR_KEYS_FEW if few else NEAR_KEYS_MANY
            bits = as_numbers(rounded) if fastest(question, "float32", "bfloat16") == "bfloat16" else None
        given = blocks.arrays, chosen, ends, extra.contiguous().numpy(), arrays, bits, out
        loop = loops.gathered.sums_of_keys if few else loops.gathered.wide_sums_of_keys
        over_threads(lambda first, last: loop(first, last, *given), number)
        return sums, scales
    low, step = (torch.float32, 1) if rounded is None else (torch.bfloat16, _KEYS_OF_BFLOAT16)
    indices = torch.from_numpy(chosen)
    most = -(-int(lengths.max()) // step) * step
    keys = torch.zeros(most, k.shape[1])
    low_keys = keys if low == torch.float32 else torch.zeros(most, k.shape[1], dtype=low)
    pairs = torch.zeros(most, 1 + d_v)
    space = torch.empty(int(blocks.sizes.max()) * most, dtype=low)
    low_deltas = blocks.deltas.to(low)
    begin = 0
    each = zip(blocks.starts.tolist(), blocks.sizes.tolist(), ends.tolist(), strict=True)
    for b, (start, rows, end) in enumerate(each):
        here, m = indices[begin:end], end - begin
        wide = -(-m // step) * step
        torch.sub(k[here], mean, out=keys[:m])
        base = keys[:m] @ blocks.centres[b] + extra[begin:end]
        begin = end
        # With only keys of weight 0 it would be -inf.
        scales[b] = base.max().clamp_min(-1e30)
        part = pairs[:wide]
        part[m:] = 0
        torch.exp(base - scales[b], out=part[:m, 0])
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
    return sums, scales
