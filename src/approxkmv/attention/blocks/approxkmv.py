"""The algorithm's idea in practice: heavy keys exactly, unbiased estimates of the light keys' sums.

The heavy keys are the near keys of a block of queries (`expansion`); the light keys are sampled with probability
proportional to their expected weight in the block. The far key of the expansion, whose sums over all light keys
are known, is the control variate: what is sampled is the difference. Numerators and row sums are unbiased for every
query, given the clustering; their quotient, the answer, is not. Where values are all the same, both are one estimate
times that value, so that the answer is that value, and moves with a common offset of the values. The budget of samples
is spread over the blocks in proportion to the predicted deviation of their rows, which depends on no sample, so that it
leaves the estimates unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from approxkmv.attention.blocks.expansion import (
    Expansion,
    expand,
    lost_of_one_block,
    of_one_block,
    project,
    stand_apart,
    sums_of_keys,
    with_keys_apart,
)
from approxkmv.attention.blocks.local_expansion import exactly_where_lost
from approxkmv.attention.causal import Sums, causal_attention, exact_sums
from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.compute.counting import count
from approxkmv.compute.loops import compiled_loops
from approxkmv.compute.threads import over_threads

LEAST_SAMPLES = 4
# Beyond this variance of a query's logits around its block's, the far key says too little to be a control variate.
CONTROLLED = 2.0
# In the causal form, triangles of at most so many queries are exact.
_EXACT_BELOW = 256


def budgets(e: Expansion, deviation: torch.Tensor, samples: int) -> np.ndarray:
    """Samples (blocks,) for each block, `samples` on average over the queries, from its predicted deviation."""
    sizes = e.blocks.sizes
    average = float(deviation.numpy() @ sizes) / float(sizes.sum())
    # Without axes nothing is known of the deviation: the same for all.
    counts = samples * (deviation.numpy() / average if average > 1e-30 else np.ones(len(sizes)))
    return counts.clip(min(LEAST_SAMPLES, samples), 4 * samples).round().astype(np.int64)


def predicted_deviation(
    e: Expansion, heavy: torch.Tensor, scales: torch.Tensor, log_weight: torch.Tensor
) -> torch.Tensor:
    """Root mean square (blocks,), float64, over a block's rows, of what one sample would leave uncertain.

    Relative to the row's sum: the far part of it, times the deviation of one sample of the difference from the
    control variate, which is about that of a lognormal beyond its first order, exp(s) - 1 - s, s being the variance
    of the query's logits around its block's.
    """
    loops = compiled_loops("attention.blocks.loops")
    if loops is not None:
        out = torch.empty(len(e.blocks), dtype=torch.float64)
        tensors = (heavy, scales, log_weight, e.blocks.row_variances, out)
        given = e.blocks.starts, e.blocks.sizes, *(t.numpy() for t in tensors)
        over_threads(lambda first, last: loops.far_deviations(first, last, *given), len(e.blocks))
        return out
    # A row whose sums left float32 is made again in the end; until then its light keys count as all there is.
    share = torch.sigmoid(log_weight - e.blocks.of_rows(scales) - heavy[:, 0].log()).nan_to_num(1.0)
    s = e.blocks.row_variances.clamp_max(10.0)
    # Padded rows have no variance.
    predicted = share.square() * (s.exp() - 1 - s)
    return torch.from_numpy(np.add.reduceat(predicted.double().numpy(), e.blocks.starts) / e.blocks.sizes).sqrt()


def sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    *,
    samples: int,
    with_own_keys: bool,
    **clustering: Any,
) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and the logs (n_q,) that both are divided by; a sum out of reach is NaN.

    with_own_keys: key i is the query's own, of as many keys as queries, and is summed exactly.
    """
    loops, d_v, scale = compiled_loops("attention.blocks.loops"), v.shape[1], clustering["scale"]
    apart = stand_apart(q, k, scale)
    if loops is not None and clustering["directions"] == 0 and not len(apart):
        out = torch.empty(len(q), d_v + 2)
        inputs, room = of_one_block(q, k, v, generator.initial_seed(), scale, clustering["near"])
        points = torch.rand(samples, generator=generator, dtype=torch.float64).numpy()
        given = [*inputs, np.float32(CONTROLLED), points, *room, out.numpy()]
        number = loops.controlled_sums_of_one_block(with_own_keys, *given)
        count(kernel_evaluations=len(k) + (len(q) + 1) * (number + samples) + len(q) * (1 + with_own_keys))
        out[lost_of_one_block(k, room), d_v] = torch.nan
        return out[:, :d_v], out[:, d_v], out[:, d_v + 1]
    # Bfloat16 sums of the control variate would be a bias.
    e = expand(q, k, v, generator, apart, low=torch.float32, **clustering)
    blocks = e.blocks
    heavy, scales = sums_of_keys(blocks, k, e.mean, v, e.chosen, e.ends, None, torch.float32)
    seen = e.seen(k if with_own_keys else None)
    counts = budgets(e, predicted_deviation(e, heavy, scales, seen.log_weight), samples)
    sample = draw(e, counts, generator)
    if len(apart):
        # In their place one whose exponentials are finite, at weight 0
        drawn = np.isin(sample.keys, apart)
        sample.logs[drawn], sample.keys[drawn] = -np.inf, e.chosen[0]
    estimate, estimate_scales = sums_of_keys(
        blocks, k, e.mean, v, sample.keys, sample.ends, torch.from_numpy(sample.logs), torch.float32
    )

    def finished(rest: torch.Tensor) -> Sums:
        rest[e.lost, d_v] = torch.nan
        return with_keys_apart((rest[:, :d_v], rest[:, d_v], rest[:, d_v + 1]), apart, q, k, v, e.mean, scale)

    # The control variate: the far key's sums, less the same sums over the sample, where it is worth its own noise.
    if loops is not None:
        out = torch.empty(len(q), d_v + 2)
        given = [blocks.starts, blocks.sizes, blocks.queries, blocks.rows, blocks.labels]
        given += [*(t.numpy() for t in (heavy, scales, estimate, estimate_scales, blocks.row_variances))]
        given += [np.float32(CONTROLLED), sample.ends, sample.keys, sample.logs, sample.control]
        parts = (
            *(blocks.deltas, k.contiguous(), e.mean, v.contiguous(), seen.value, e.far_axes),
            *(seen.log_weight, seen.own_log, seen.own_share, seen.own_share_seen, out),
        )
        given += [t.numpy() for t in parts]
        over_threads(lambda first, last: loops.controlled_sums(first, last, with_own_keys, *given), len(blocks))
        return finished(out)
    means, tilts = sampled_moments(e, sample, k, v)
    leaning = project(blocks, tilts)

    # One scale for all parts, so that none overflows
    row_scale = blocks.of_rows(scales)
    shift = torch.maximum(torch.maximum(row_scale, seen.log_weight), seen.own_log)
    heavy *= (row_scale - shift).exp_().unsqueeze(1)
    estimate *= (blocks.of_rows(estimate_scales) - shift).exp_().unsqueeze(1)
    weight = torch.where(blocks.row_variances < CONTROLLED, (seen.log_weight - shift).exp_(), 0.0)
    sampled = blocks.of_rows(means)
    row_sums = heavy[:, 0] + estimate[:, 0] + weight * (1 - sampled[:, 0] - leaning[:, 0])
    far_value = seen.value - leaning[:, 1:] if e.tilted else blocks.of_rows(seen.value) * (1 - leaning[:, :1])
    numerators = heavy[:, 1:] + estimate[:, 1:] + weight.unsqueeze(1) * (far_value - sampled[:, 1:])
    if with_own_keys:
        # A light key like the others, but its term is known: of the difference from its control nothing is estimated.
        left = torch.where(torch.isfinite(seen.own_log), 1 - sampled_own(e, sample), 0.0)
        exact = torch.exp(seen.own_log - shift)
        row_sums = row_sums + left * (exact - weight * seen.own_share_seen)
        counted = weight * (seen.own_share_seen if e.tilted else seen.own_share)
        numerators = numerators + (left * (exact - counted)).unsqueeze(1) * blocks.in_rows(v)
        if not e.tilted:
            rest = left * weight * (seen.own_share_seen - seen.own_share)
            numerators = numerators - rest.unsqueeze(1) * blocks.of_rows(seen.value)
    return finished(blocks.of_queries(torch.cat([numerators, row_sums.unsqueeze(1), shift.unsqueeze(1)], 1)))


@dataclass(frozen=True)
class Sample:
    """Light keys (m,), independent, so many of them for each block, block after block."""

    keys: np.ndarray
    ends: np.ndarray
    """Those of block b are keys[ends[b-1]:ends[b]]."""
    logs: np.ndarray
    """(m,) logarithm of 1 / (counts p), p being the probability of the key: with it exp(q.k) counts."""
    control: np.ndarray
    """(m,) w / (sum(w) counts p), with which the key counts in the sums of the control variate."""

    def blocks(self) -> torch.Tensor:
        """(m,) the block of each."""
        return torch.from_numpy(np.searchsorted(self.ends, np.arange(len(self.keys)), side="right"))


def draw(e: Expansion, counts: np.ndarray, generator: torch.Generator) -> Sample:
    """counts[b] light keys for block b.

    Half of the probability of a key is in proportion to its expected weight w, half is the same for all: no term can
    then be more than twice as large as under uniform sampling, however far a query lies from its block.
    """
    blocks, n_k = len(counts), e.weights.shape[2]
    ends = counts.cumsum()
    points = torch.rand(int(ends[-1]), generator=generator, dtype=torch.float64).numpy()
    keys = np.empty(len(points), np.int64)
    loops = compiled_loops("attention.blocks.loops")
    if loops is not None:
        logs, control = np.empty(len(keys), np.float32), np.empty(len(keys), np.float32)
        given = ends, e.ends, e.chosen, e.weights.numpy(), e.total.numpy(), points, keys, logs, control
        over_threads(lambda first, last: loops.draw_light(first, last, *given), blocks)
        return Sample(keys, ends, logs, control)
    # Without a light key there is nothing to draw: any key, of weight 0.
    with np.errstate(divide="ignore"):
        even = 1.0 / (n_k - np.diff(e.ends, prepend=0)).astype(np.float64)
    heights = e.weights[:, 0].double().cumsum(1).numpy()
    by_weight = heights[:, -1] > 0
    begin = first = 0
    for b, end in enumerate(ends):
        u = points[begin:end] * (2 if by_weight[b] else 1)
        near = e.chosen[first : e.ends[b]]
        # A point below one half is a place among the light keys, one above it a place in the running sum.
        place = (u * (n_k - len(near))).astype(np.int64).clip(max=max(n_k - len(near) - 1, 0))
        # As many near keys come before the light key at a place as lie less than that many places behind it.
        evenly = place + np.searchsorted(near - np.arange(len(near)), place, side="right")
        # right: a near key, whose interval is empty, is never drawn
        weighed = np.searchsorted(heights[b], (u - 1) * heights[b, -1], side="right")
        keys[begin:end] = np.where(u < 1, evenly, weighed).clip(max=n_k - 1)
        begin, first = end, int(e.ends[b])
    of_draw = np.repeat(np.arange(blocks), counts)
    share = e.weights.numpy()[of_draw, 0, keys].astype(np.float64) / e.total.double().numpy()[of_draw]
    rate = counts[of_draw] * np.where(by_weight[of_draw], 0.5 * (share + even[of_draw]), even[of_draw])
    return Sample(keys, ends, -np.log(rate).astype(np.float32), (share / rate).astype(np.float32))


def sampled_moments(
    e: Expansion, sample: Sample, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over each block's sample with the weights of the control variate, to first order around its far key.

    Of one and the values, (blocks, 1 + d_v); of the distances from the far key and, where the far values are tilted,
    of these times each value, (blocks, 1 or 1 + d_v, d).
    """
    number, keys, of_draw = len(e.blocks), torch.from_numpy(sample.keys), sample.blocks()
    control, values = torch.from_numpy(sample.control).unsqueeze(1), v[keys]
    weighed = torch.cat([control, control * values], 1)
    means = torch.zeros(number, weighed.shape[1]).index_add_(0, of_draw, weighed)
    centred = k[keys] - e.mean - e.far_axes[of_draw, 0]
    tilts = torch.zeros_like(e.far_axes)
    for c in range(tilts.shape[1]):
        tilts[:, c].index_add_(0, of_draw, centred * weighed[:, c : c + 1])
    return means, tilts


def sampled_own(e: Expansion, sample: Sample) -> torch.Tensor:
    """Per row, the sum of 1 / (counts p) over the draws of its block that drew its own key; its mean is one."""
    blocks, keys = e.blocks, torch.from_numpy(sample.keys)
    met = torch.from_numpy(blocks.labels)[keys] == sample.blocks()
    rows = torch.from_numpy(blocks.rows)[keys[met]]
    return torch.zeros(len(blocks.deltas)).index_add_(0, rows, torch.from_numpy(sample.logs)[met].exp())


def _approxkmv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, near: int, **parameters: Any
) -> torch.Tensor:
    if q.device.type == "cuda":
        from approxkmv.attention.blocks.cuda import approxkmv as approxkmv_cuda

        return approxkmv_cuda.attend(q, k, v, scale=scale, seed=seed, near=near, **parameters)
    if q.device.type != "cpu":
        raise UnavailableError(f"approxkmv has no kernel for the device {q.device}")

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if near >= len(k):
            return exact_fused.attend(q, k, v, scale, 512)
        numerators, row_sums, _ = sums(
            q, k, v, generator, scale=scale, near=near, with_own_keys=len(q) == len(k), **parameters
        )
        # A row sum is positive; an estimate of one need not be.
        answer = numerators / row_sums.unsqueeze(1)
        return exactly_where_lost(answer, ~(row_sums > 0), q, k, v, scale)

    return per_batch(single, q, k, v, seed, around_mean=True)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, near: int, **parameters: Any
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"the causal form of approxkmv runs on a CPU only, not on {q.device.type}")

    def square(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> Sums:
        if near >= len(k):
            return exact_sums(q, k, v)
        # Query i and key i of a square belong to different tokens.
        numerators, row_sums, logs = sums(q, k, v, generator, scale=1.0, near=near, with_own_keys=False, **parameters)
        # The sums are those of centred keys, which are the same for one set of keys but not for two.
        return numerators, row_sums, logs + q @ k.mean(0)

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return causal_attention(q * scale, k, v, generator, square, max(_EXACT_BELOW, near))

    return per_batch(single, q, k, v, seed)


method = Method(
    name="approxkmv",
    compute=_approxkmv,
    causal=_causal,
    summary="heavy keys exactly, light keys by unbiased sampling with a control variate and budgets by variance",
    defaults={"block": 128, "near": 256, "samples": 32, "directions": 48, "iterations": 3, "sampled": 16},
    may_be_zero=frozenset({"directions"}),
    grid=[
        # One block, first order: for attention that is nearly uniform, and for few keys.
        {"block": 2**24, "near": 16, "samples": 8, "directions": 0},
        {"block": 2**24, "near": 32, "samples": 32, "directions": 0},
        {"block": 2**24, "near": 64, "samples": 128, "directions": 0},
        {"block": 2**24, "near": 128, "samples": 256, "directions": 0},
        {"block": 2**24, "near": 256, "samples": 512, "directions": 0},
        {"block": 1024, "near": 64, "samples": 32},
        {"block": 512, "near": 64, "samples": 32},
        {"block": 512, "near": 128, "samples": 32},
        {"block": 256, "near": 128, "samples": 32},
        {"block": 256, "near": 256, "samples": 32},
        {"block": 256, "near": 384, "samples": 32},
        {"block": 128, "near": 384, "samples": 32},
        {"block": 128, "near": 512, "samples": 32},
        {"block": 96, "near": 512, "samples": 64},
        {"block": 64, "near": 512, "samples": 64},
        {"block": 96, "near": 1024, "samples": 128},
        {"block": 64, "near": 1024, "samples": 128},
        {"block": 48, "near": 1024, "samples": 128},
        {"block": 64, "near": 1536, "samples": 128},
        {"block": 32, "near": 1024, "samples": 256},
        {"block": 32, "near": 2048, "samples": 512},
    ],
)
