"""torch's scaled_dot_product_attention in bfloat16, whatever the inputs: the exact baseline with 8-bit mantissas."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from approxkmv.attention.contract import Method
from approxkmv.attention.exact import sdpa


def _exact_sdpa_bf16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
    rounded = (tensor.bfloat16() for tensor in (q, k, v))
    return sdpa.attend(*rounded, **given).to(v.dtype)


method = Method(
    name="exact-sdpa-bf16",
    compute=_exact_sdpa_bf16,
    causal=partial(_exact_sdpa_bf16, is_causal=True),
    summary="the same in bfloat16: inputs are rounded and the answer widened within the call",
    defaults={"backend": "fastest"},
    exact=True,
    dtype=torch.bfloat16,
    seeded=False,
)
