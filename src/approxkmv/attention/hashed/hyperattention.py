"""HyperAttention: sorted angular hashing, and the rest of each row from one uniform sample shared by all.

Keys of the sample that lie in a query's block are summed exactly there and are left out of the estimate, so that
nothing is counted twice. m of the sampled keys lying outside of a block that n keys lie outside of, each counts n / m:
given that m > 0, which a sample larger than a block is sure of, numerators and row sums are unbiased.

Source: Han, Jayaram, Karbasi, Mirrokni, Woodruff & Zandieh (2024); the causal form is their recursion.
"""

from __future__ import annotations

from typing import Any

import torch

from approxkmv.attention.causal import Sums, causal_attention
from approxkmv.attention.contract import Method, per_batch
from approxkmv.attention.hashed.angular_hashing import block_sums, sort_into_blocks, sorted_sample
from approxkmv.attention.hashed.column_sampling import with_ones

# In the causal form, triangles of at most so many queries are exact.
_EXACT_BELOW = 256


def sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    *,
    block: int,
    samples: int,
    projections: int,
) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and the logs (n_q,) that both are divided by, for scaled queries."""
    n_q, n_k = len(q), len(k)
    blocks = sort_into_blocks(q, k, generator, block=block, projections=projections)
    drawn = torch.randperm(n_k, generator=generator, device=k.device)[:samples]
    if len(blocks.queries) == 1:
        # In a single block nothing is left to estimate.
        drawn = drawn[:0]
    extended = with_ones(v)
    sample, _ = sorted_sample(drawn, blocks)
    # Keys outside of each block for each of the sample that is outside
    weights = (n_k - blocks.keys_in_block()) / (len(drawn) - sample.starts.diff()).clamp_min(1)
    out, logs = q.new_empty(*blocks.queries.shape, extended.shape[1]), q.new_empty(blocks.queries.shape)
    for here, heavy, _, light, shift in block_sums(q, k, extended, blocks, sample, extended[sample.keys]):
        out[here] = heavy + weights[here].view(-1, 1, 1) * light
        logs[here] = shift
    both = blocks.unsorted(out, n_q)
    return both[:, :-1], both[:, -1], blocks.unsorted(logs, n_q)


def _hyperattention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, **parameters: Any
) -> torch.Tensor:
    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        numerators, row_sums, _ = sums(q * scale, k, v, generator, **parameters)
        return numerators / row_sums.unsqueeze(1)

    return per_batch(single, q, k, v, seed)


def causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    exact_below: int = _EXACT_BELOW,
    **parameters: Any,
) -> torch.Tensor:
    """The method with query i seeing the keys 0..i alone, by recursion: (batch, n, d_v).

    Triangles on the diagonal of at most `exact_below` queries are exact; the other parameters are the method's.
    """

    def square(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> Sums:
        return sums(q, k, v, generator, **parameters)

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return causal_attention(q * scale, k, v, generator, square, exact_below)

    return per_batch(single, q, k, v, seed)


method = Method(
    name="hyperattention",
    compute=_hyperattention,
    causal=causal,
    summary="sorted angular hashing, the rest from uniform keys shared by all queries",
    defaults={"block": 128, "samples": 256, "projections": 7},
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
    ],
)
