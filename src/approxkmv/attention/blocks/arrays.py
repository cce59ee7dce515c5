"""What the compiled loops are given: named tuples of NumPy arrays and numbers, which numba passes as if one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class BlockArrays(NamedTuple):
    """The fields of `grouping.Blocks`."""

    queries: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    centres: np.ndarray
    deltas: np.ndarray
    variances: np.ndarray
    row_variances: np.ndarray


class KeyArrays(NamedTuple):
    """Keys k (n_k, d), their mean (d,) and values v (n_k, d_v)."""

    k: np.ndarray
    mean: np.ndarray
    v: np.ndarray


class Threshold(NamedTuple):
    """Which keys are near: those with a log of at least that of ascending `rank` among every step-th, from `first`."""

    rank: int
    first: int
    step: int


class WeightSums(NamedTuple):
    """What `fill_weights` finds: the highest log of a far key, the threshold of near ones, sums of weights (blocks,),
    and of weights times value columns (blocks, tilts)."""

    highest: np.ndarray
    thresholds: np.ndarray
    totals: np.ndarray
    values: np.ndarray


class FarArrays(NamedTuple):
    """The fields of `expansion.Expansion` that tell of the far keys; bfloat16 numbers as bits."""

    logs: np.ndarray
    weights: np.ndarray
    thresholds: np.ndarray
    total: np.ndarray
    log: np.ndarray
    value: np.ndarray
    axes: np.ndarray


class SeenArrays(NamedTuple):
    """The fields of `expansion.Seen`."""

    log_weight: np.ndarray
    value: np.ndarray
    axes: np.ndarray
    own_log: np.ndarray
    own_share: np.ndarray
    own_share_seen: np.ndarray


class ScaledSums(NamedTuple):
    """Row sums and numerators (rows, 1 + d_v), divided by exp(scales) of their block; scales (blocks,)."""

    sums: np.ndarray
    scales: np.ndarray


class Sample(NamedTuple):
    """Independent light keys (m,), block by block."""

    keys: np.ndarray
    ends: np.ndarray
    """Those of block b are keys[ends[b-1]:ends[b]]."""
    logs: np.ndarray
    """(m,) logarithm of 1 / (counts p), where p is the key's probability: the weight of exp(q.k)."""
    control: np.ndarray
    """(m,) w / (sum(w) counts p), the weight of the key in the sums of the control variate."""

    def blocks(self) -> np.ndarray:
        """(m,) the block of each."""
        return np.searchsorted(self.ends, np.arange(len(self.keys)), side="right")


class OneBlock(NamedTuple):
    """One block of all queries q (n_q, d), times scale, without axes: inputs k and v, the number of tilted columns, and
    scratch: deltas (n_q, d), logs (1, n_k), weights (1, 1 + tilts, n_k)."""

    q: np.ndarray
    scale: np.float32
    k: np.ndarray
    v: np.ndarray
    threshold: Threshold
    tilts: int
    deltas: np.ndarray
    logs: np.ndarray
    weights: np.ndarray
