"""Appendix A.1.4 of Indyk, Kapralov, Sheth & Wagner (ICLR 2025), on values less their mean.

Sorted angular hashing (KDEformer, Zandieh et al. 2023): the signs of Gaussian projections give queries and keys a code,
queries and keys are sorted by the Gray order of their codes and cut into blocks, and a block of queries attends to its
block of keys exactly. The residual is estimated from columns sampled by norm. Rows whose empirical variance is above
average take 1.5 times the samples. One change is ours: values are taken relative to their mean, without which sampling
by norm sees little but their common offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from approxkmv.attention.causal import Sums, with_ones
from approxkmv.attention.contract import Method
from approxkmv.attention.hashed.angular_hashing import block_sums, sort_into_blocks, sorted_sample
from approxkmv.attention.hashed.column_sampling import column_probabilities
from approxkmv.attention.kernels.exponentials import flushed_
from approxkmv.compute.drawing import drawn

_MORE = 1.5


@dataclass(frozen=True)
class Parameters:
    """Most queries per block, sampled columns, bits of a code; whether variances are relative to the row sums."""

    block: int = 128
    samples: int = 128
    projections: int = 7
    normalised: bool = False


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,), for scaled queries; sums are divided by exp(log)."""
    blocks = sort_into_blocks(q, k, generator, block=parameters.block, projections=parameters.projections)
    samples = parameters.samples
    probabilities = column_probabilities(v)
    more = round(_MORE * samples)
    chosen = drawn(probabilities, more, generator)
    extended = with_ones(v)
    sample, order = sorted_sample(chosen, blocks)
    drawn_v = extended[sample.keys] / probabilities[sample.keys].unsqueeze(1)
    # Every row uses the first draws; rows of high variance use all of them.
    is_first = (order < samples).unsqueeze(1)
    first_v = drawn_v * is_first
    first_size = first_v.square().sum(1)

    width = extended.shape[1]
    heavy = q.new_empty(*blocks.queries.shape, width)
    first, all_of_them = torch.empty_like(heavy), torch.empty_like(heavy)
    variance, shifts = torch.empty_like(heavy[..., 0]), torch.empty_like(heavy[..., 0])
    columns = torch.cat([first_v, drawn_v], 1)
    for here, near, light, far, shift in block_sums(q, k, extended, blocks, sample, columns):
        heavy[here], shifts[here] = near, shift
        first[here], all_of_them[here] = far[..., :width], far[..., width:]
        variance[here] = flushed_(light.square_()) @ first_size / samples
        variance[here] -= (first[here] / samples).square().sum(-1)
    # The average is over the variances of the estimates, with each row's factor exp(shift) restored.
    if parameters.normalised:
        size = (heavy + first / samples)[..., -1]
        log_variance = variance.clamp_min(1e-37).log() - 2 * size.clamp_min(1e-37).log()
    else:
        log_variance = variance.clamp_min(1e-37).log() + 2 * shifts
    logs = blocks.unsorted(log_variance, len(q)).double()
    average = torch.logsumexp(logs, 0) - math.log(len(q))
    above = (log_variance.double() > average).unsqueeze(-1)
    answers = blocks.unsorted(heavy + torch.where(above, all_of_them / more, first / samples), len(q))
    # A row may underflow relative to its largest logit, if that belongs to a sample that the row does not use.
    row_sums = answers[:, -1].clamp_min(torch.finfo(q.dtype).tiny)
    return answers[:, :-1], row_sums, blocks.unsorted(shifts, len(q))


method = Method.from_sums(
    "approxkmv-paper",
    sums,
    Parameters,
    around_mean=True,
    summary="A.1.4 of the paper: sorted hashing, column-norm sampling, more samples where the variance is high",
    grid=[
        {"block": 32, "samples": 32},
        {"block": 64, "samples": 64},
        {"block": 64, "samples": 128},
        {"block": 128, "samples": 128},
        {"block": 128, "samples": 256},
        {"block": 256, "samples": 256},
        {"block": 256, "samples": 512},
        {"block": 512, "samples": 512},
        {"block": 512, "samples": 1024},
        {"block": 1024, "samples": 2048},
    ],
)
