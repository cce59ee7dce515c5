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

_LEAST_SAMPLES = 4


def budgets(e: Expansion, share: torch.Tensor, samples: int) -> torch.Tensor:
    """Samples (blocks,) for each block, `samples` on average, from the deviation predicted for its rows.

    share (rows,) is the part of each row's sum that is far. Relative to it, one sample of the difference has about
    the variance exp(s) - 1 - s of a lognormal beyond its first order, s being that of the query's logits.
    """
    spread = torch.nn.functional.pad(e.spread, (0, e.blocks.deltas.shape[1] - len(e.spread)))
    s = (e.blocks.deltas.square() @ spread).clamp_max(10.0)
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, *, samples: int, **clustering: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numerators (n_q, d_v), row sums (n_q,) and the logs (n_q,) that both are divided by, for scaled queries."""
    # Bfloat16 sums of the control variate would be a bias.
    e = expand(q, k, v, generator, low=torch.float32, **clustering)
    blocks, d_v = e.blocks, v.shape[1]
    heavy, scales = sums_of_keys(blocks, e.k, v, e.chosen, e.ends, None, torch.float32)
    log_weight, far_value = e.far()
    row_scale = blocks.of_rows(scales)
    # One scale for both parts, so that neither overflows
    shift = torch.maximum(row_scale, log_weight)
    heavy *= (row_scale - shift).exp_().unsqueeze(1)
    weight = (log_weight - shift).exp_()
    share = weight / (weight + heavy[:, 0])

    counts = budgets(e, share, samples)
    total = e.weights.sum(1)
    has_light = total > 0
    counts = torch.where(has_light, counts, 0)
    # Systematic draws would be correlated; these are independent, by inversion of the running sum.
    drawn, logs = draw(e, counts, generator)
    ends = counts.cumsum(0).numpy()
    estimate, scale = sums_of_keys(blocks, e.k, v, drawn.numpy(), ends, logs, torch.float32)
    estimate *= (blocks.of_rows(torch.where(has_light, scale, 0.0)) - shift).exp_().unsqueeze(1)

    # The control variate: the far key's sums, less the same sums over the sample.
    of_draw = torch.repeat_interleave(torch.arange(len(blocks)), counts)
    per_draw = (1.0 / counts.clamp_min(1))[of_draw].unsqueeze(1)
    centred = (e.k[drawn] - e.far_key[of_draw]) * per_draw
    values = v[drawn]
    mean_value = torch.zeros(len(blocks), d_v).index_add_(0, of_draw, values * per_draw)
    # first-order sums over the sample: of the weights, then of each column of the values
    tilts = [torch.zeros_like(e.far_key).index_add_(0, of_draw, centred)]
    if e.far_tilt is not None:
        tilts += [
            torch.zeros_like(e.far_key).index_add_(0, of_draw, centred * values[:, c : c + 1]) for c in range(d_v)
        ]
    seen = project(blocks, torch.stack(tilts, 2))
    sample_value = blocks.of_rows(mean_value)
    if e.far_tilt is not None:
        sample_value = sample_value + seen[:, 1:]
    row_sums = heavy[:, 0] + estimate[:, 0] - weight * seen[:, 0]
    numerators = heavy[:, 1:] + estimate[:, 1:] + weight.unsqueeze(1) * (far_value - sample_value)
    together = e.unpermute(torch.cat([numerators, row_sums.unsqueeze(1), shift.unsqueeze(1)], 1))
    return together[:, :d_v], together[:, d_v], together[:, d_v + 1]


def draw(e: Expansion, counts: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Light keys (sum of counts,), counts[b] independent ones of block b, and the log weights of their terms.

    Block b's are drawn with probability w_j / sum(w); a term exp(q.k_j) then counts 1 / (counts[b] probability).
    """
    cumulative = e.weights.double().cumsum(1)
    blocks = torch.repeat_interleave(torch.arange(len(counts)), counts)
    points = torch.rand(len(blocks), generator=generator, dtype=torch.float64) * cumulative[blocks, -1]
    drawn = np.empty(len(blocks), np.int64)
    begin = 0
    for b, count in enumerate(counts.tolist()):
        end = begin + count
        # right: a key of weight zero, whose interval is empty, is never drawn
        drawn[begin:end] = np.searchsorted(cumulative[b].numpy(), points[begin:end].numpy(), side="right")
        begin = end
    keys = torch.from_numpy(drawn.clip(max=e.weights.shape[1] - 1))
    weight = e.weights[blocks, keys].double() / cumulative[blocks, -1]
    return keys, -(weight.clamp_min(1e-300).log() + counts[blocks].double().log()).float()


def _approxkmv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, near: int, **parameters: Any
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"approxkmv runs on a CPU only, not on {q.device.type}")

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if near >= len(k):
            return exact_fused.attend(q, k, v, scale, 512)
        numerators, row_sums, _ = sums(q * scale, k, v, generator, near=near, **parameters)
        # A row sum is positive; an estimate of one need not be.
        answer = numerators / torch.where(row_sums > 0, row_sums, torch.nan).unsqueeze(1)
        return exactly_where_lost(answer, q, k, v, scale)

    return per_batch(single, q, k, v, seed)


method = Method(
    name="approxkmv",
    compute=_approxkmv,
    summary="heavy keys exactly, light keys by unbiased sampling with a control variate and budgets by variance",
    defaults={"block": 128, "near": 256, "samples": 32, "directions": 48, "iterations": 3, "sampled": 16},
    grid=[
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
