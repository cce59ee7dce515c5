"""The idea of ApproxKMV in practice: heavy keys exactly, unbiased estimates of the light keys' sums.

The heavy keys are the near keys of a block of queries (`expansion`); the light keys are sampled with probability
proportional to their expected weight in the block. The expansion's far key, whose sums over all light keys are known,
is the control variate: the difference from it is what is sampled. Given the clustering, numerators and row sums are
unbiased for every query; their quotient, the answer, is not. If all values are equal, the numerator is the row sum
times that value, so the answer is that value, and it shifts with a common offset of the values. Rows whose estimate is
mostly noise (`MOST_PARTS`) are recomputed exactly; the other answers stay, up to the tilt of a far key, within that
many times the range of the values. The sample budget is divided among the blocks in proportion to the predicted
deviation of their rows, which does not depend on the samples, so the estimates stay unbiased.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from approxkmv.attention.blocks.arrays import KeyArrays, ScaledSums
from approxkmv.attention.blocks.chunks import EarlierKeys, chunk_length
from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.blocks.expansion import Clustering, KeySide, expand, in_one_block, key_side, of_one_block
from approxkmv.attention.blocks.grouping import block_size, project
from approxkmv.attention.blocks.light_keys import (
    CONTROLLED,
    budgets,
    draw,
    predicted_deviation,
    sampled_moments,
    sampled_own,
    trusted,
)
from approxkmv.attention.blocks.near_keys import sums_of_keys
from approxkmv.attention.blocks.reach import stand_apart, with_keys_apart
from approxkmv.attention.causal import Flash, Sums, add_sums, causal_answers, with_ones
from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.attention.exact.fused import exactly_where_lost
from approxkmv.compute.counting import count
from approxkmv.compute.threads import over_threads


@dataclass(frozen=True)
class Parameters(Clustering):
    """The parameters of the clustering, and the average number of light keys sampled per block."""

    samples: int = 32


def sums(
    q: torch.Tensor,
    side: KeySide,
    generator: torch.Generator,
    parameters: Parameters,
    *,
    scale: float,
    with_own_keys: bool,
) -> Sums:
    """Numerators (n_q, d_v + 1), row sums (n_q,) and logs (n_q,) for keys less their `mean`; NaN if out of reach.

    Sums are divided by exp(log). The last column is the sum of the absolute values of the parts of the row sum:
    `trusted` compares the two. side: in float32, since bfloat16 sums of the control variate would introduce a bias.
    with_own_keys: key i is query i's own (as many keys as queries), and is summed exactly.
    """
    k, v, apart = side.k, side.v, side.apart
    loops, d_v = block_loops(), v.shape[1]
    e = expand(q, side, generator, parameters, scale=scale)
    blocks = e.blocks
    heavy, scales = sums_of_keys(blocks, k, e.mean, v, e.chosen, e.ends)
    seen = e.seen(k if with_own_keys else None)
    lost = e.lost(heavy[:, 0], scales, seen)
    counts = budgets(e, predicted_deviation(e, heavy, scales, seen.log_weight), parameters.samples)
    sample = draw(e, counts, generator)
    if len(apart):
        # Replaced by a key whose exponentials are finite, with weight 0
        drawn = np.isin(sample.keys, apart)
        sample.logs[drawn], sample.keys[drawn] = -np.inf, e.chosen[0]
    extra = torch.from_numpy(sample.logs)
    estimate, estimate_scales = sums_of_keys(blocks, k, e.mean, v, sample.keys, sample.ends, extra)

    def finished(rest: torch.Tensor) -> Sums:
        rest[lost, d_v + 1] = torch.nan
        found = rest[:, : d_v + 1], rest[:, d_v + 1], rest[:, d_v + 2]
        return with_keys_apart(found, apart, q, k, with_ones(v), e.mean, scale) if len(apart) else found

    # The control variate: the far key's sums, less the same sums over the sample, where this reduces the noise.
    if loops is not None:
        out = torch.empty(len(q), d_v + 3)
        near = ScaledSums(heavy.numpy(), scales.numpy())
        draws = sample, ScaledSums(estimate.numpy(), estimate_scales.numpy())
        keys = KeyArrays(k.contiguous().numpy(), e.mean.numpy(), v.contiguous().numpy())
        given = blocks.arrays, near, draws, np.float32(CONTROLLED), keys, seen.arrays, out.numpy()
        over_threads(
            lambda first, last: loops.sampling.controlled_sums(first, last, with_own_keys, *given), len(blocks)
        )
        return finished(out)
    means, tilts = sampled_moments(e, sample, k, v)
    leaning = project(blocks, tilts)

    # One scale for all parts, so that none overflows.
    row_scale = blocks.of_rows(scales)
    shift = torch.maximum(torch.maximum(row_scale, seen.log_weight), seen.own_log)
    heavy *= (row_scale - shift).exp_().unsqueeze(1)
    estimate *= (blocks.of_rows(estimate_scales) - shift).exp_().unsqueeze(1)
    weight = torch.where(blocks.row_variances < CONTROLLED, (seen.log_weight - shift).exp_(), 0.0)
    sampled = blocks.of_rows(means)
    row_sums = heavy[:, 0] + estimate[:, 0]
    absolute = row_sums + weight * (1 + sampled[:, 0] + leaning[:, 0].abs())
    row_sums = row_sums + weight * (1 - sampled[:, 0] - leaning[:, 0])
    far_value = seen.value - leaning[:, 1:] if e.tilted else blocks.of_rows(seen.value) * (1 - leaning[:, :1])
    numerators = heavy[:, 1:] + estimate[:, 1:] + weight.unsqueeze(1) * (far_value - sampled[:, 1:])
    if with_own_keys:
        # A light key like the others, but its term is known, so its difference from the control is not estimated.
        left = torch.where(torch.isfinite(seen.own_log), 1 - sampled_own(e, sample), 0.0)
        exact = torch.exp(seen.own_log - shift)
        row_sums = row_sums + left * (exact - weight * seen.own_share_seen)
        absolute = absolute + left.abs() * (exact + weight * seen.own_share_seen.abs())
        counted = weight * (seen.own_share_seen if e.tilted else seen.own_share)
        numerators = numerators + (left * (exact - counted)).unsqueeze(1) * blocks.in_rows(v)
        if not e.tilted:
            rest = left * weight * (seen.own_share_seen - seen.own_share)
            numerators = numerators - rest.unsqueeze(1) * blocks.of_rows(seen.value)
    return finished(blocks.of_queries(torch.cat([numerators, torch.stack([absolute, row_sums, shift], 1)], 1)))


def _approxkmv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, **given: Any
) -> torch.Tensor:
    if q.device.type == "cuda":
        from approxkmv.attention.blocks.cuda import approxkmv as approxkmv_cuda

        return approxkmv_cuda.attend(q, k, v, scale=scale, seed=seed, **given)
    if q.device.type != "cpu":
        raise UnavailableError(f"approxkmv has no kernel for the device {q.device}")
    parameters = Parameters(**given)
    parameters = replace(parameters, block=block_size(parameters.block, q.shape[1], k.shape[1]))
    near, loops = parameters.near, block_loops()

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if near >= len(k) or parameters.block == 1:
            return exact_fused.attend(q, k, v, scale)
        own = len(q) == len(k)
        apart = stand_apart(q, k, scale)
        if loops is not None and parameters.directions == 0 and not len(apart) and in_one_block(q, k, scale, near):
            found = torch.empty(len(q), v.shape[1] + 3)
            one = of_one_block(q, k, v, generator.initial_seed(), scale, near)
            points = torch.rand(parameters.samples, generator=generator, dtype=torch.float64).numpy()
            number = loops.one_block.controlled_sums_of_one_block(
                own, one, np.float32(CONTROLLED), points, found.numpy()
            )
            count(kernel_evaluations=len(k) + (len(q) + 1) * (number + len(points)) + len(q) * (1 + own))
            numerators, row_sums = found[:, :-2], found[:, -2]
        else:
            side = key_side(k, v, apart, parameters, v)
            numerators, row_sums, _ = sums(q, side, generator, parameters, scale=scale, with_own_keys=own)
        numerators, row_sums = trusted(numerators, row_sums)
        return exactly_where_lost(numerators / row_sums.unsqueeze(1), q, k, v, scale)

    return per_batch(single, q, k, v, seed, around_mean=True)


def chunked_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    parameters: Parameters,
    scale: float,
    length: int,
) -> Sums:
    """The same `sums` over the keys up to each query's own, for keys as they are: exactly within chunks of `length`."""
    flash = Flash(q, k, v, scale, length, torch.float32)
    answers, logs = flash.triangles()
    whole = with_ones(answers), torch.ones(len(q)), logs
    earlier = EarlierKeys(q, k, v, flash, parameters)
    for here, apart in earlier:
        side, shifts = earlier.before(here, apart)
        # Query i and key i of these belong to different tokens.
        numerators, row_sums, log = sums(q[here], side, generator, parameters, scale=scale, with_own_keys=False)
        add_sums((whole[0][here], whole[1][here], logs[here]), (numerators, row_sums, log + shifts))
    return whole


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, **given: Any
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"the causal form of approxkmv runs on a CPU only, not on {q.device.type}")
    parameters = Parameters(**given)
    length = chunk_length(q.shape[1], parameters.near)

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        # The noise must not depend on a common offset; the first value is seen by every row.
        values = v - v[0]
        numerators, row_sums, _ = chunked_sums(q, k, values, generator, parameters, scale, length)
        return causal_answers(*trusted(numerators, row_sums), q * scale, k, values).add_(v[0])

    return per_batch(single, q, k, v, seed)


method = Method(
    name="approxkmv",
    compute=_approxkmv,
    causal=_causal,
    summary="heavy keys exactly, light keys by unbiased sampling with a control variate and budgets by variance",
    defaults=asdict(Parameters()),
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
