"""KDEformer in practice: sorted angular hashing, and a residual from columns sampled by the norms of their values.

Numerators and row sums of the estimate outside a query's block are both unbiased: a column drawn with probability P
counts 1 / (m P), or 0 if its key is in the block, which is summed exactly. Values are taken relative to their mean,
without which their norms would show little but their common offset.

Source: Zandieh, Han, Daliri & Karbasi (2023). The form with spectral guarantees is `approxkmv.kmv.spectral_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from approxkmv.attention.causal import Sums, with_ones
from approxkmv.attention.contract import Method
from approxkmv.attention.hashed.angular_hashing import block_sums, sort_into_blocks, sorted_sample
from approxkmv.attention.hashed.column_sampling import column_probabilities
from approxkmv.compute.drawing import drawn


@dataclass(frozen=True)
class Parameters:
    """Most queries per block, sampled columns, and bits of a code."""

    block: int = 128
    samples: int = 128
    projections: int = 7


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,), for scaled queries; sums are divided by exp(log)."""
    blocks = sort_into_blocks(q, k, generator, block=parameters.block, projections=parameters.projections)
    samples = parameters.samples
    probabilities = column_probabilities(v)
    chosen = drawn(probabilities, samples, generator)
    if len(blocks.queries) == 1:
        # With a single block nothing is left to estimate.
        chosen = chosen[:0]
    extended = with_ones(v)
    sample, _ = sorted_sample(chosen, blocks)
    weighted = extended[sample.keys] / (samples * probabilities[sample.keys]).unsqueeze(1)
    out = q.new_empty(*blocks.queries.shape, extended.shape[1] + 1)
    for here, heavy, _, light, shift in block_sums(q, k, extended, blocks, sample, weighted):
        out[here] = torch.cat([heavy + light, shift.unsqueeze(-1)], -1)
    answers = blocks.unsorted(out, len(q))
    return answers[:, :-2], answers[:, -2], answers[:, -1]


method = Method.from_sums(
    "kdeformer",
    sums,
    Parameters,
    around_mean=True,
    summary="sorted angular hashing, the rest from columns sampled by the norms of their values",
    grid=[
        {"block": 32, "samples": 32},
        {"block": 64, "samples": 64},
        {"block": 64, "samples": 128},
        {"block": 128, "samples": 256},
        {"block": 256, "samples": 512},
        {"block": 256, "samples": 1024},
        {"block": 512, "samples": 1024},
        {"block": 512, "samples": 2048},
        {"block": 1024, "samples": 2048},
        {"block": 2048, "samples": 4096},
    ],
)
