"""Measure the sparsity of attention kernels, and race ApproxKMV against other methods. The public interface."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from approxkmv.lazy import attributes

if TYPE_CHECKING:
    from approxkmv.errors import ApproxKMVError as ApproxKMVError
    from approxkmv.kernels import AttentionReduction as AttentionReduction
    from approxkmv.kernels import log_kernel as log_kernel
    from approxkmv.kernels import reduce_attention as reduce_attention
    from approxkmv.kmv.algorithm import KMVResult as KMVResult
    from approxkmv.kmv.algorithm import approx_kmv as approx_kmv
    from approxkmv.kmv.attention_product import approx_attention as approx_attention
    from approxkmv.operator.eigenvalue import top_eigenvalue as top_eigenvalue
    from approxkmv.operator.kernel_operator import KernelOperator as KernelOperator
    from approxkmv.statistics import AttentionStatistics as AttentionStatistics
    from approxkmv.statistics import OrderRatios as OrderRatios
    from approxkmv.statistics import attention_statistics as attention_statistics
    from approxkmv.statistics import head_to_tail_ratios as head_to_tail_ratios
    from approxkmv.statistics import order_ratios as order_ratios

__version__ = "0.1.0"

# Imported on first use, so that a machine with only torch can import the parts that need nothing else.
_NAMES = {
    "errors": ["ApproxKMVError"],
    "kernels": ["AttentionReduction", "log_kernel", "reduce_attention"],
    "kmv.algorithm": ["KMVResult", "approx_kmv"],
    "kmv.attention_product": ["approx_attention"],
    "operator.eigenvalue": ["top_eigenvalue"],
    "operator.kernel_operator": ["KernelOperator"],
    "statistics": [
        *("AttentionStatistics", "OrderRatios", "attention_statistics", "head_to_tail_ratios", "order_ratios"),
    ],
}
__all__ = sorted(chain(*_NAMES.values()))
__getattr__ = attributes(__name__, _NAMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
