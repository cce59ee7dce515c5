"""The algorithm's idea in practice: heavy keys exactly, unbiased estimates of the light keys' sums.

The heavy keys are the near keys of a block of queries (`expansion`); the light keys are sampled with probability
proportional to their expected weight in the block. The far key of the expansion, whose sums over all light keys
are known, is the control variate: what is sampled is the difference. Numerators and row sums are unbiased for every
query, given the clustering. The budget of samples is spread over the blocks in proportion to the predicted deviation
of their rows, which depends on no sample, so that it leaves the estimates unbiased.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from approxkmv.attention import exact_fused
from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.attention.expansion import Expansion, expand, project, sums_of_keys
from approxkmv.attention.local_expansion import exactly_where_lost
from approxkmv.attention.recursive import Sums, causal_attention, exact_sums

_LEAST_SAMPLES = 4
# Beyond this variance of a query's logits around its block's, the far key says too little to be a control variate.
_CONTROLLED = 2.0
# In the causal form, triangles of at most so many queries are exact.
_EXACT_BELOW = 256


def row_variance(e: Expansion) -> torch.Tensor:
    """Variance (rows,) over the keys of delta.k, by which a query's logits differ from its block's centre's.

    Along the leading axes; without any, nothing is known and it is zero.
    """
    return (e.blocks.deltas @ e.axes).square() @ e.spread


def budgets(e: Expansion, share: torch.Tensor, variance: torch.Tensor, samples: int) -> torch.Tensor:
    """Samples (blocks,) for each block, `samples` on average, from the deviation predicted for its rows.

    share (rows,) is the part of each row's sum that is far, variance (rows,) that of row_variance. Relative to it,
    one sample of the difference has about the variance exp(s) - 1 - s of a lognormal beyond its first order, s being
    that of the query's logits.
    """
    s = variance.clamp_max(10.0)
    # Padded rows have no delta, hence no predicted variance.
    predicted = share.square() * (s.exp() - 1 - s)
    of_row = np.repeat(np.arange(len(e.blocks)), e.blocks.sizes)
    per_block = np.bincount(of_row, weights=predicted.double().numpy(), minlength=len(e.blocks))
    deviation = torch.from_numpy(np.sqrt(per_block / e.blocks.sizes))
    rows = torch.from_numpy(e.blocks.sizes).double()
    average = (deviation * rows).sum() / rows.sum()
    counts = samples * deviation / average.clamp_min(1e-30)
    return counts.clamp(min(_LEAST_SAMPLES, samples), 4 * samples).round().long()


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
    """Numerators (n_q, d_v), row sums (n_q,) and the logs (n_q,) that both are divided by.

    with_own_keys: key i is the query's own, of as many keys as queries, and is summed exactly.
    """
    # Bfloat16 sums of the control variate would be a bias.
    e = expand(q, k, v, generator, low=torch.float32, **clustering)
    blocks, d_v = e.blocks, v.shape[1]
    heavy, scales = sums_of_keys(blocks, k, e.mean, v, e.chosen, e.ends, None, torch.float32)
    log_weight, far_value = e.far()
    row_scale = blocks.of_rows(scales)
    # A row whose sums left float32 is made again in the end; until then its light keys count as all there is.
    share = torch.sigmoid(log_weight - row_scale - heavy[:, 0].log()).nan_to_num(1.0)
    # One scale for all parts, so that none overflows
    shift = torch.maximum(row_scale, log_weight)
    own = e.own_keys(k, v) if with_own_keys else None
    if own is not None:
        shift = torch.maximum(shift, own.log)
    heavy *= (row_scale - shift).exp_().unsqueeze(1)
    weight = (log_weight - shift).exp_()

    variance = row_variance(e)
    counts = budgets(e, share, variance, samples)
    drawn, of_draw, logs, control = draw(e, counts, generator)
    estimate, scale = sums_of_keys(blocks, k, e.mean, v, drawn.numpy(), counts.cumsum(0).numpy(), logs, torch.float32)
    estimate *= (blocks.of_rows(scale) - shift).exp_().unsqueeze(1)

    # The control variate: the far key's sums, less the same sums over the sample, where it is worth its own noise.
    weight = torch.where(variance < _CONTROLLED, weight, 0.0)
    values = v[drawn]
    centred = (k[drawn] - e.mean - e.far_key[of_draw]) * control
    plain = torch.cat([control, control * values], 1)
    means = torch.zeros(len(blocks), 1 + d_v).index_add_(0, of_draw, plain)
    # first-order sums over the sample: of the weights, then of each column of the values
    columns = [centred]
    if e.far_tilt is not None:
        columns += [centred * values[:, c : c + 1] for c in range(d_v)]
    tilts = [torch.zeros_like(e.far_key).index_add_(0, of_draw, column) for column in columns]
    seen = project(blocks, torch.stack(tilts, 1))
    sampled = blocks.of_rows(means)
    row_sums = heavy[:, 0] + estimate[:, 0] + weight * (1 - sampled[:, 0] - seen[:, 0])
    sampled_value = sampled[:, 1:] + seen[:, 1:] if e.far_tilt is not None else sampled[:, 1:]
    numerators = heavy[:, 1:] + estimate[:, 1:] + weight.unsqueeze(1) * (far_value - sampled_value)
    if own is not None:
        left = 1 - sampled_own(e, drawn, of_draw, logs)
        # A light key like the others, but its term is known: of the difference from its control nothing is estimated.
        exact = torch.exp(own.log - shift)
        light = torch.isfinite(own.log)
        seen_value = own.share_seen if e.far_tilt is not None else own.share
        row_sums = row_sums + torch.where(light, left * (exact - weight * own.share_seen), 0.0)
        numerators = (
            numerators + torch.where(light, left * (exact - weight * seen_value), 0.0).unsqueeze(1) * own.values
        )
    together = e.unpermute(torch.cat([numerators, row_sums.unsqueeze(1), shift.unsqueeze(1)], 1))
    return together[:, :d_v], together[:, d_v], together[:, d_v + 1]


def sampled_own(e: Expansion, drawn: torch.Tensor, of_draw: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Per row, the sum of 1 / (counts p) over the draws of its block that drew its own key; its mean is one."""
    blocks = e.blocks
    row_of, block_of = torch.empty(len(blocks.order), dtype=torch.int64), torch.empty_like(blocks.order)
    row_of[blocks.order] = blocks.rows
    block_of[blocks.order] = blocks.of_rows(torch.arange(len(blocks)))[blocks.rows]
    met = block_of[drawn] == of_draw
    return torch.zeros(len(blocks.deltas)).index_add_(0, row_of[drawn[met]], logs[met].exp())


def draw(
    e: Expansion, counts: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Light keys (m,), independent, counts[b] of them for block b; the block of each; and two weights for each.

    Half of the probability of a key is in proportion to its expected weight, half is the same for all: no term can
    then be more than twice as large as under uniform sampling, however far a query lies from its block. The first
    weight is the logarithm of 1 / (counts p), with which exp(q.k) counts; the second (m, 1), w / (sum(w) counts p),
    is that of the control variate.
    """
    n_k = e.weights.shape[1]
    near = np.diff(e.ends, prepend=0)
    cumulative = e.weights.cumsum(1).numpy()
    of_draw = np.repeat(np.arange(len(counts)), counts.numpy())
    points = torch.rand(len(of_draw), generator=generator, dtype=torch.float64).numpy()
    drawn = np.empty(len(of_draw), np.int64)
    begin = first = 0
    for b, count in enumerate(counts.tolist()):
        some = points[begin : begin + count]
        # A point below one half is a place among the light keys, one above it a place in the running sum.
        even = some < 0.5
        place = (2 * some[even] * (n_k - near[b])).astype(np.int64)
        # As many near keys come before the light key at a place as lie less than that many places behind it.
        skipped = e.chosen[first : e.ends[b]] - np.arange(near[b])
        here = drawn[begin : begin + count]
        here[even] = place + np.searchsorted(skipped, place, side="right")
        # right: a near key, whose interval is empty, is never drawn
        height = ((2 * some[~even] - 1) * cumulative[b, -1]).astype(np.float32)
        here[~even] = np.searchsorted(cumulative[b], height, side="right").clip(max=n_k - 1)
        begin, first = begin + count, int(e.ends[b])
    keys, blocks = torch.from_numpy(drawn), torch.from_numpy(of_draw)
    share = e.weights[blocks, keys].double() / e.total.double()[blocks]
    # counts times the probability
    rate = counts[blocks] * 0.5 * (share + 1.0 / torch.from_numpy(n_k - near).double()[blocks])
    return keys, blocks, -rate.log().float(), (share / rate).float().unsqueeze(1)


def _approxkmv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, near: int, **parameters: Any
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"approxkmv runs on a CPU only, not on {q.device.type}")

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if near >= len(k):
            return exact_fused.attend(q, k, v, scale, 512)
        numerators, row_sums, _ = sums(
            q, k, v, generator, scale=scale, near=near, with_own_keys=len(q) == len(k), **parameters
        )
        # A row sum is positive; an estimate of one need not be.
        answer = numerators / torch.where(row_sums > 0, row_sums, torch.nan).unsqueeze(1)
        return exactly_where_lost(answer, q, k, v, scale)

    return per_batch(single, q, k, v, seed)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, near: int, **parameters: Any
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"approxkmv runs on a CPU only, not on {q.device.type}")

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
        # One block, first order: for attention that is nearly uniform.
        {"block": 2**24, "near": 16, "samples": 8, "directions": 0},
        {"block": 2**24, "near": 32, "samples": 32, "directions": 0},
        {"block": 2**24, "near": 64, "samples": 128, "directions": 0},
        {"block": 512, "near": 64, "samples": 8},
        {"block": 256, "near": 128, "samples": 16},
        {"block": 256, "near": 256, "samples": 32},
        {"block": 128, "near": 256, "samples": 32},
        {"block": 128, "near": 512, "samples": 64},
        {"block": 64, "near": 512, "samples": 64},
        {"block": 64, "near": 1024, "samples": 128},
        {"block": 32, "near": 1024, "samples": 256},
        {"block": 32, "near": 2048, "samples": 512},
    ],
)
