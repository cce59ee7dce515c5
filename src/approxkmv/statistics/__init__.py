"""Statistics of attention kernels: the two experiments of the paper, head by head and prefix by prefix."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from approxkmv.statistics.attention import AttentionStatistics as AttentionStatistics
    from approxkmv.statistics.attention import attention_statistics as attention_statistics
    from approxkmv.statistics.heads import HeadStatistics as HeadStatistics
    from approxkmv.statistics.heads import OrderRatios as OrderRatios
    from approxkmv.statistics.heads import head_statistics as head_statistics
    from approxkmv.statistics.heads import head_to_tail_ratios as head_to_tail_ratios
    from approxkmv.statistics.heads import order_ratios as order_ratios
    from approxkmv.statistics.heads import unmasked_and_masked_statistics as unmasked_and_masked_statistics

__all__ = [
    "AttentionStatistics",
    "HeadStatistics",
    "OrderRatios",
    "attention_statistics",
    "head_statistics",
    "head_to_tail_ratios",
    "order_ratios",
    "unmasked_and_masked_statistics",
]


def __getattr__(name: str) -> Any:
    # Figures and tables need this package's words, not numba and torch.
    if name not in __all__:
        raise AttributeError(f"module 'approxkmv.statistics' has no attribute {name!r}")
    module = "attention" if name in ("AttentionStatistics", "attention_statistics") else "heads"
    return getattr(importlib.import_module(f"approxkmv.statistics.{module}"), name)
