"""softmax(scale q k^T) v by bfloat16 products, some queries at a time, so that their logits stay in the cache.

torch's fused attention multiplies bfloat16 no faster than float32 on CPUs without matrix units (AMX), though torch's
matrix products use the instructions that some of them have for it (AVX512_BF16). There this takes two thirds of the
time at thousands of queries and keys.
"""

from __future__ import annotations

from functools import partial

import torch

from approxkmv.attention.causal import pairs_seen
from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.compute.counting import count
from approxkmv.compute.scratch import scratch

# Their logits over 8,192 keys are 1 MiB, and their weights as much. Half or twice as many took as long or longer.
_QUERIES = 64
# Numbers of keys under a mask. With AMX, oneDNN compiles a product for each shape and keeps 1,024: with more in turn,
# every product is compiled at every call, which took four to five times as long. Each number is _QUERIES more than a
# multiple of the step: at multiples of 512 the rows of logits share few sets of the cache, which took a third longer.
_SHAPES = 64


def _exact_tiles_bf16(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, is_causal: bool = False
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"exact-tiles-bf16 runs on a CPU only, not on {q.device.type}")

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        keys = len(k)
        count(kernel_evaluations=pairs_seen(keys) if is_causal else len(q) * keys)
        q, k, v = (q * scale).bfloat16(), k.bfloat16(), v.bfloat16()
        step = _QUERIES * -(-keys // (_QUERIES * _SHAPES))
        future = torch.ones(_QUERIES, _QUERIES + step, dtype=torch.bool).triu_(1)
        out = torch.empty(len(q), v.shape[1])
        # Written again and again: memory that is new each time takes a tenth longer.
        space = [scratch(f"tiles {name}", _QUERIES * keys, dtype=q.dtype) for name in ("logits", "weights")]
        for first in range(0, len(q), _QUERIES):
            here = slice(first, min(first + _QUERIES, len(q)))
            size = here.stop - first
            keys = min(_QUERIES + -(-first // step) * step, len(k)) if is_causal else len(k)
            logits, weights = (one[: size * keys].view(size, keys) for one in space)
            torch.mm(q[here], k[:keys].mT, out=logits)
            if is_causal:
                count(other_products=size * keys - pairs_seen(here.stop) + pairs_seen(first))
                logits[:, first:].masked_fill_(future[:size, : keys - first], -torch.inf)
            # Subnormal weights stay: the instructions for bfloat16 take them as 0, at no cost.
            out[here] = torch.softmax(logits, 1, out=weights) @ v[:keys]
        return out

    return per_batch(single, q, k, v, seed)


method = Method(
    name="exact-tiles-bf16",
    compute=_exact_tiles_bf16,
    causal=partial(_exact_tiles_bf16, is_causal=True),
    summary="softmax and products in bfloat16 for 64 queries at a time",
    exact=True,
    dtype=torch.bfloat16,
    seeded=False,
)
