"""Appendix A.1.4 of Indyk, Kapralov, Sheth & Wagner (ICLR 2025), on values less their mean.

Sorted angular hashing (KDEformer, Zandieh et al. 2023): signs of Gaussian projections give queries and keys a code,
the codes are put in Gray order, queries and keys sorted by it are cut into blocks, and a block of queries meets its
block of keys exactly. The residual is estimated from columns sampled by norm. Rows whose empirical variance is above
the average take 1.5 times the samples. One thing is ours: values are taken relative to their mean, without which
sampling by norm sees little but a common offset of the values.
"""

from __future__ import annotations

import math

import torch

from approxkmv.attention.contract import Method, per_batch
from approxkmv.attention.hashed.angular_hashing import block_sums, sort_into_blocks, sorted_sample
from approxkmv.attention.hashed.column_sampling import column_probabilities, with_ones
from approxkmv.attention.kernels.exponentials import flushed_

_MORE = 1.5


def sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    *,
    block: int,
    samples: int,
    projections: int,
    normalised: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numerators (n_q, d_v), row sums (n_q,) and the logs (n_q,) that both are divided by, for scaled queries."""
    blocks = sort_into_blocks(q, k, generator, block=block, projections=projections)
    probabilities = column_probabilities(v)
    more = round(_MORE * samples)
    drawn = torch.multinomial(probabilities, more, replacement=True, generator=generator)
    extended = with_ones(v)
    sample, order = sorted_sample(drawn, blocks)
    drawn_v = extended[sample.keys] / probabilities[sample.keys].unsqueeze(1)
    # Every row takes the first of the draws; all of them serve where the variance is high.
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
    # The average is over the variances of the estimates, each with its row's own factor exp(shift) back in place.
    if normalised:
        size = (heavy + first / samples)[..., -1]
        log_variance = variance.clamp_min(1e-37).log() - 2 * size.clamp_min(1e-37).log()
    else:
        log_variance = variance.clamp_min(1e-37).log() + 2 * shifts
    logs = blocks.unsorted(log_variance, len(q)).double()
    average = torch.logsumexp(logs, 0) - math.log(len(q))
    above = (log_variance.double() > average).unsqueeze(-1)
    answers = blocks.unsorted(heavy + torch.where(above, all_of_them / more, first / samples), len(q))
    return answers[:, :-1], answers[:, -1], blocks.unsorted(shifts, len(q))


def _approxkmv_paper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    block: int,
    samples: int,
    projections: int,
    normalised: bool,
) -> torch.Tensor:
    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        numerators, row_sums, _ = sums(
            q * scale,
            k,
            v,
            generator,
            block=block,
            samples=samples,
            projections=projections,
            normalised=normalised,
        )
        # A row may vanish beside its largest logit, if that is of a sample that it does not use.
        return numerators / row_sums.clamp_min(torch.finfo(q.dtype).tiny).unsqueeze(1)

    return per_batch(single, q, k, v, seed, around_mean=True)


method = Method(
    name="approxkmv-paper",
    compute=_approxkmv_paper,
    summary="A.1.4 of the paper: sorted hashing, column-norm sampling, more samples where the variance is high",
    defaults={"block": 128, "samples": 128, "projections": 7, "normalised": False},
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
