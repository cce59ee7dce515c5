"""Which queries are out of reach of their block, and which keys stand apart, from the variances of their logits."""

from __future__ import annotations

import math

import numpy as np
import torch

from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.causal import Sums, add_sums, exact_sums

# Keys whose logits vary more over the queries than those of other keys by this factor, and by this many nats, stand
# apart; on some heads and on GloVe no key varies over twice as much as the others.
APART, APART_NATS = 4.0, 4.0
# Rows from which the spread of the others is estimated.
_SAMPLED_FOR_VARIANCES = 256
# A query whose logits vary more than this around those of its block's centre is out of reach however little the far
# keys weigh; on heads of models and GloVe the variance is 0.1 to 60 at blocks of 512 or fewer. Below it, a query is out
# of reach if its sum is expected to be off by more than this many times itself.
REACH = 64.0
_OFF = 3.0


def spreads(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(n,) variance of the products of each of points (n, d), less their mean, with others (m, d), by column.

    The mean and the variances of the columns are estimated from samples of the rows.
    """
    loops = block_loops()
    if loops is not None:
        out = np.empty(len(points), np.float32)
        loops.clustering.spreads(points.contiguous().numpy(), others.contiguous().numpy(), _SAMPLED_FOR_VARIANCES, out)
        return torch.from_numpy(out)
    return (points - _sample(points).mean(0)).square() @ variances_of(others)


def most_variance(far_keys: int) -> float:
    """The variance of its logits around its block's up to which no row with this many far keys is lost."""
    return min(REACH, math.log(_OFF**2 * far_keys))


def most_off(far_keys: int) -> float:
    """The log of how far a sum over this many far keys may be off, as a multiple of a row's: see `beyond_reach`."""
    return math.log(_OFF * far_keys**0.5)


def beyond_reach(variances: torch.Tensor, known: torch.Tensor, far_log: torch.Tensor, far_keys: int) -> torch.Tensor:
    """(rows,) whether a row is out of reach of its block: its sum is expected to be off by more than _OFF times itself.

    The exponentials of n far keys whose logits have a variance s around the block's are approximately lognormal: the
    relative error of their sum is sqrt(exp(s) / n), since a few of them dominate it and the centre cannot tell which.

    Args:
        variances: (rows,) s. far_keys: n.
        known, far_log: (rows,) logs of the sums over the keys that the row sees individually, and over the far ones.
    """
    share = torch.nn.functional.logsigmoid(far_log - known)
    # NaN counts as lost.
    return ~(share + 0.5 * variances <= most_off(far_keys)) | (variances > REACH)


def _sample(points: torch.Tensor) -> torch.Tensor:
    return points[:: max(1, len(points) // _SAMPLED_FOR_VARIANCES)]


def variances_of(points: torch.Tensor) -> torch.Tensor:
    """(d,) of the columns of points (n, d), from a sample of the rows."""
    some = _sample(points)
    return (some - some.mean(0)).square_().mean(0)


def stand_apart(q: torch.Tensor, k: torch.Tensor, scale: float) -> np.ndarray:
    """The keys of k (n_k, d) that are so much larger than the others that no block's centre can represent its queries.

    With a key a hundred times as long as the others some queries q (n_q, d) have a logit of a hundred and some of minus
    a hundred. Such a key is summed exactly for every query.
    """
    found = spreads(k, q).numpy()
    some = found[:: max(1, len(found) // _SAMPLED_FOR_VARIANCES)]
    usual = np.partition(some, len(some) // 2)[len(some) // 2]
    bar = max(APART**2 * float(usual), (APART_NATS / scale) ** 2)
    if not float(found.max()) > bar:
        return np.empty(0, np.int64)
    apart = np.flatnonzero(found > bar)
    # This many are not exceptions.
    return apart if len(apart) <= len(k) / 16 else apart[:0]


def without(points: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """points (n, d) without those rows."""
    return torch.from_numpy(np.delete(points.numpy(), rows, axis=0)) if len(rows) else points


def with_keys_apart(
    rest: Sums, apart: np.ndarray, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mean: torch.Tensor, scale: float
) -> Sums:
    """Add the sums over the keys that stand apart to those over the other keys, taken less `mean`, in place."""
    if len(apart):
        keys = torch.from_numpy(apart)
        add_sums(rest, exact_sums(q * scale, k[keys] - mean, v[keys]))
    return rest
