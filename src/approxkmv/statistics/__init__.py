"""Statistics of attention kernels: the two experiments of the paper, head by head and prefix by prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from approxkmv.statistics.heads import HeadStatistics as HeadStatistics
    from approxkmv.statistics.heads import OrderRatios as OrderRatios
    from approxkmv.statistics.heads import head_statistics as head_statistics
    from approxkmv.statistics.heads import head_to_tail_ratios as head_to_tail_ratios
    from approxkmv.statistics.heads import order_ratios as order_ratios
    from approxkmv.statistics.heads import unmasked_and_masked_statistics as unmasked_and_masked_statistics

__all__ = [
    "HeadStatistics",
    "OrderRatios",
    "head_statistics",
    "head_to_tail_ratios",
    "order_ratios",
    "unmasked_and_masked_statistics",
]


def __getattr__(name: str) -> Any:
    # Figures and tables need this package's words, not numba and torch.
    if name not in __all__:
        raise AttributeError(f"module 'approxkmv.statistics' has no attribute {name!r}")
    from approxkmv.statistics import heads

    return getattr(heads, name)
