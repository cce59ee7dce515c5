"""Statistics of attention kernels: the two experiments of the paper, head by head and prefix by prefix."""

from approxkmv.statistics.heads import (
    HeadStatistics,
    OrderRatios,
    head_statistics,
    head_to_tail_ratios,
    order_ratios,
    unmasked_and_masked_statistics,
)

__all__ = [
    "HeadStatistics",
    "OrderRatios",
    "head_statistics",
    "head_to_tail_ratios",
    "order_ratios",
    "unmasked_and_masked_statistics",
]
