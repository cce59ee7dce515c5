"""HyperAttention: sorted angular hashing, and the rest of each row from one uniform sample shared by all.

Sampled keys that lie in a query's block are summed exactly there and left out of the estimate, so that nothing is
counted twice. If n keys and m sampled keys lie outside a block, each sampled one counts n / m: given m > 0, which a
sample larger than a block guarantees, numerators and row sums are unbiased.

Source: Han, Jayaram, Karbasi, Mirrokni, Woodruff & Zandieh (2024); the causal form is their recursion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from approxkmv.attention.causal import EXACT_BELOW, Sums, with_ones
from approxkmv.attention.contract import Method
from approxkmv.attention.hashed.angular_hashing import block_sums, sort_into_blocks, sorted_sample


@dataclass(frozen=True)
class Parameters:
    """Most queries per block, keys in the shared sample, bits of a code, and queries of a triangle that is exact.

    The last is for the causal form, and 4,096 as published.
    """

    block: int = 128
    samples: int = 256
    projections: int = 7
    exact_below: int = EXACT_BELOW


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,), for scaled queries; sums are divided by exp(log)."""
    n_q, n_k = len(q), len(k)
    blocks = sort_into_blocks(q, k, generator, block=parameters.block, projections=parameters.projections)
    drawn = torch.randperm(n_k, generator=generator, device=k.device)[: parameters.samples]
    if len(blocks.queries) == 1:
        # With a single block nothing is left to estimate.
        drawn = drawn[:0]
    extended = with_ones(v)
    sample, _ = sorted_sample(drawn, blocks)
    # The number of keys outside each block per sampled key outside it
    weights = (n_k - blocks.keys_in_block()) / (len(drawn) - sample.starts.diff()).clamp_min(1)
    out, logs = q.new_empty(*blocks.queries.shape, extended.shape[1]), q.new_empty(blocks.queries.shape)
    for here, heavy, _, light, shift in block_sums(q, k, extended, blocks, sample, extended[sample.keys]):
        out[here] = heavy + weights[here].view(-1, 1, 1) * light
        logs[here] = shift
    both = blocks.unsorted(out, n_q)
    return both[:, :-1], both[:, -1], blocks.unsorted(logs, n_q)


method = Method.from_sums(
    "hyperattention",
    sums,
    Parameters,
    summary="sorted angular hashing, the rest from uniform keys shared by all queries",
    grid=[
        {"block": 32, "samples": 64},
        {"block": 64, "samples": 128},
        {"block": 128, "samples": 256},
        {"block": 256, "samples": 512},
        {"block": 256, "samples": 1024},
        {"block": 512, "samples": 1024},
        {"block": 512, "samples": 2048},
        {"block": 1024, "samples": 2048},
        {"block": 2048, "samples": 4096},
        # The published length of exact triangles, which without a mask does nothing
        {"block": 256, "samples": 256, "exact_below": 4096},
        {"block": 256, "samples": 1024, "exact_below": 4096},
        {"block": 512, "samples": 2048, "exact_below": 4096},
    ],
)
