"""Statistics of attention kernels: the two experiments of the paper, head by head and prefix by prefix."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from approxkmv.lazy import attributes

if TYPE_CHECKING:
    from approxkmv.statistics.attention import AttentionStatistics as AttentionStatistics
    from approxkmv.statistics.attention import attention_statistics as attention_statistics
    from approxkmv.statistics.heads import HeadStatistics as HeadStatistics
    from approxkmv.statistics.heads import OrderRatios as OrderRatios
    from approxkmv.statistics.heads import head_statistics as head_statistics
    from approxkmv.statistics.heads import head_to_tail_ratios as head_to_tail_ratios
    from approxkmv.statistics.heads import order_ratios as order_ratios
    from approxkmv.statistics.heads import unmasked_and_masked_statistics as unmasked_and_masked_statistics

# On demand: figures and tables import names from here, but do not need numba and torch.
_NAMES = {
    "attention": ["AttentionStatistics", "attention_statistics"],
    "heads": [
        *("HeadStatistics", "OrderRatios", "head_statistics", "head_to_tail_ratios", "order_ratios"),
        "unmasked_and_masked_statistics",
    ],
}
__all__ = sorted(chain(*_NAMES.values()))
__getattr__ = attributes(__name__, _NAMES)
