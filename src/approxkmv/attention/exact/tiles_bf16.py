"""softmax(scale q k^T) v by bfloat16 products, some queries at a time, so that their logits stay in the cache.

torch's fused attention multiplies bfloat16 no faster than float32 on CPUs without matrix units (AMX), though torch's
matrix products use the instructions that those CPUs have for it: there this is the fastest exact attention we know.
"""

from __future__ import annotations

from functools import partial

import torch

from approxkmv.attention.causal import pairs_seen
from approxkmv.attention.contract import Method, per_batch
from approxkmv.attention.kernels.exponentials import LOWEST, flushed_
from approxkmv.compute.counting import count

# Their logits over 8,192 keys are 1 MiB, the second-level cache of a core.
_QUERIES = 64


def _exact_tiles_bf16(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, is_causal: bool = False
) -> torch.Tensor:
    # Weights may be subnormal only where logits of a row may be so far apart.
    far = 2 * scale * float(q.norm(dim=2).max()) * float(k.norm(dim=2).max()) > -LOWEST

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        keys = len(k)
        count(kernel_evaluations=pairs_seen(keys) if is_causal else len(q) * keys)
        q, k, v = (q * scale).bfloat16(), k.bfloat16(), v.bfloat16()
        future = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool, device=q.device).triu_(1)
        out = torch.empty(len(q), v.shape[1], device=q.device)
        for first in range(0, len(q), _QUERIES):
            here = slice(first, min(first + _QUERIES, len(q)))
            if is_causal:
                keys, size = here.stop, here.stop - first
                count(other_products=size * keys - pairs_seen(keys) + pairs_seen(first))
            logits = q[here] @ k[:keys].mT
            if is_causal:
                logits[:, first:].masked_fill_(future[:size, :size], -torch.inf)
            weights = logits.softmax(1)
            out[here] = (flushed_(weights) if far else weights) @ v[:keys]
        return out

    return per_batch(single, q, k, v, seed)


method = Method(
    name="exact-tiles-bf16",
    compute=_exact_tiles_bf16,
    causal=partial(_exact_tiles_bf16, is_causal=True),
    summary="softmax in bfloat16 for 64 queries at a time: the fastest exact attention on CPUs without AMX",
    exact=True,
    dtype=torch.bfloat16,
    seeded=False,
)
