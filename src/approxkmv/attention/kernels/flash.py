"""The library's flash attention on a CPU, with the logs of its row sums."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# A trial of its products, for `fastest_dtype`
FLASH = "attention.kernels.trials.flash_attention"


def flash(qkv: Iterable[torch.Tensor], scale: float, is_causal: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers (batch, heads, n_q, width) and logs of row sums (batch, heads, n_q) for q, k, v of one dtype and width.

    is_causal: query i attends to keys 0 to i.
    """
    # The kernel takes rows for contiguous.
    given = (t.contiguous() for t in qkv)
    answers, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, is_causal, scale=scale)
    return answers, logs
