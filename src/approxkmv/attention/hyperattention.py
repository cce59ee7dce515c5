"""HyperAttention: sorted angular hashing, and the rest of each row from one uniform sample shared by all.

Keys of the sample that lie in a query's block are summed exactly there and are left out of the estimate, so that
nothing is counted twice. m of the sampled keys lying outside of a block that n keys lie outside of, each counts n / m:
given that m > 0, which a sample larger than a block is sure of, numerators and row sums are unbiased.

Source: Han, Jayaram, Karbasi, Mirrokni, Woodruff & Zandieh (2024); the causal form is their recursion.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from approxkmv.arrays import resolve_scale
from approxkmv.attention.angular_hashing import block_sums, sort_into_blocks, sorted_sample
from approxkmv.attention.column_sampling import with_ones
from approxkmv.attention.contract import Method, check_inputs, per_batch
from approxkmv.attention.counting import count
from approxkmv.errors import InputError

# Rows of the exact causal product at a time: the part of a tile above the diagonal is wasted.
_TILE = 256
# In the causal form of the method, squares on the diagonal up to this size are exact.
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """[Numerators, row sums] (n_q, d_v + 1) for scaled queries, and the logs (n_q,) that they are divided by."""
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
    return blocks.unsorted(out, n_q), blocks.unsorted(logs, n_q)


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add sums (n, w) with logs (n,) over two sets of keys, whatever the logs are."""
    (a, log_a), (b, log_b) = first, second
    logs = torch.maximum(log_a, log_b)
    return a * (log_a - logs).exp().unsqueeze(1) + b * (log_b - logs).exp().unsqueeze(1), logs


def _exact_causal_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    extended = with_ones(v)
    out, shifts = q.new_empty(len(q), extended.shape[1]), q.new_empty(len(q))
    for i in range(0, len(q), _TILE):
        rows = q[i : i + _TILE]
        end = i + len(rows)
        logits = rows @ k[:end].mT
        later = torch.ones(len(rows), end, dtype=torch.bool, device=q.device).triu_(i + 1)
        logits.masked_fill_(later, -torch.inf)
        count(kernel_evaluations=logits.numel())
        shift = logits.amax(1)
        out[i:end], shifts[i:end] = logits.sub_(shift.unsqueeze(1)).exp_() @ extended[:end], shift
    return out, shifts


def causal_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, *, threshold: int, **parameters: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sums`, query i seeing the keys 0..i alone.

    The first half of the queries sees keys of the first half alone, as does the second half of the second; between
    the second half and the keys of the first nothing is masked.
    """
    n = len(q)
    if n <= max(threshold, 1):
        return _exact_causal_sums(q, k, v)
    half = n // 2
    upper = causal_sums(q[:half], k[:half], v[:half], generator, threshold=threshold, **parameters)
    lower = causal_sums(q[half:], k[half:], v[half:], generator, threshold=threshold, **parameters)
    lower = merge(lower, sums(q[half:], k[:half], v[:half], generator, **parameters))
    return torch.cat([upper[0], lower[0]]), torch.cat([upper[1], lower[1]])


def hyperattention_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    seed: int = 0,
    block: int = 256,
    samples: int = 512,
    threshold: int = 2048,
    projections: int = 7,
) -> torch.Tensor:
    """Causal attention: softmax over the keys j <= i of row i, by recursion over halves.

    >>> q, k, v = torch.randn(2, 50, 16), torch.randn(2, 50, 16), torch.randn(2, 50, 3)
    >>> tuple(hyperattention_causal(q, k, v, threshold=16, block=8, samples=8).shape)
    (2, 50, 3)

    Args:
        q, k: (batch, n, d). v: (batch, n, d_v). Float32 or bfloat16. scale: of the logits; None means 1/sqrt(d).
        seed: the same seed gives the same answer. block: queries of a block, at most. samples: keys of the uniform
        sample of each rectangle below the diagonal. threshold: squares on the diagonal up to this size are exact.
        projections: bits of a code.
    Returns:
        (batch, n, d_v), of the type of v.
    Raises:
        InputError: inputs that are not sound, and as many queries as keys are needed.
    """
    check_inputs(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise InputError(f"causal attention needs a key for each query, there are {q.shape[1]} and {k.shape[1]}")
    factor = resolve_scale(scale, q.shape[-1])

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        both, _ = causal_sums(
            q * factor, k, v, generator, threshold=threshold, block=block, samples=samples, projections=projections
        )
        return both[:, :-1] / both[:, -1:]

    return per_batch(single, q, k, v, seed)


def _hyperattention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, **parameters: Any
) -> torch.Tensor:
    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        both, _ = sums(q * scale, k, v, generator, **parameters)
        return both[:, :-1] / both[:, -1:]

    return per_batch(single, q, k, v, seed)


method = Method(
    name="hyperattention",
    compute=_hyperattention,
    causal=partial(hyperattention_causal, threshold=_EXACT_BELOW),
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
