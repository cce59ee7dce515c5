"""Local expansion in few kernels: nothing as large as clusters x keys is stored. As `expansion`, in bfloat16 products.

A sample of the keys gives each cluster a threshold: one pass lists the keys above it and sums all others. Means and
spreads come from samples too: centring by any point changes no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from approxkmv.attention.blocks.cuda import kernels
from approxkmv.attention.blocks.cuda.expansion import METRIC_POWER, TILE, TILTED_COLUMNS, Tiles, most_tiles
from approxkmv.attention.blocks.expansion import Clustering
from approxkmv.attention.blocks.reach import APART, APART_NATS, REACH, most_off
from approxkmv.attention.kernels.triton import _INTERPRETED, triton

# Rows from which means and spreads are estimated
_SAMPLED = 512
# Of at most so many keys one is in the sample that gives the threshold, which holds at most _SAMPLE.
_STRIDE, _SAMPLE = 16, 8192
# Tiles of a cluster, evenly spaced, from which its centre is made
_TILES_OF_A_CENTRE = 16
# Programs that keep a GPU busy
_PROGRAMS = 528
# Widest keys and values
_WIDEST = 128


def listing(near: int, n_k: int) -> tuple[int, int, int]:
    """For lists of about `near` of n_k keys: one key in how many is sampled, which of the sample is the threshold, and
    the longest list.

    The number of keys above the r-th largest of a sample of one key in s is about s r, with deviation s sqrt(r). The
    rows of a list that is too long, far fewer than one in a million, are made exactly.
    """
    stride = max(-(-n_k // _SAMPLE), min(_STRIDE, max(1, near // 8)))
    rank = max(1, round(near / stride))
    return stride, rank, -(-int(stride * (rank + 6 * rank**0.5 + 6)) // 64) * 64


def fits(n_q: int, n_k: int, d: int, d_v: int, near: int) -> bool:
    """Whether these sizes have a fused form."""
    stride, rank, _ = listing(near, n_k)
    return max(d, d_v) <= _WIDEST and (d_v == 1 or d_v > TILTED_COLUMNS) and 2 * rank <= n_k // stride and n_q > 1


def evaluations(batch: int, n_q: int, n_k: int, blocks: int, near: int) -> int:
    """Kernel evaluations of a call: all keys and a sample at the centres; for each query near, far and own keys."""
    stride, _, _ = listing(near, n_k)
    own = n_q if n_q == n_k else 0
    return batch * (blocks * (n_k + n_k // stride) + TILE * most_tiles(n_q, blocks) * near + n_q + own)


@dataclass(frozen=True)
class _Sampled:
    """What samples say of the inputs; (batch, d), float32."""

    query_mean: torch.Tensor
    query_variance: torch.Tensor
    """Of scaled queries."""
    key_mean: torch.Tensor
    key_spread: torch.Tensor
    """Mean squares of the keys less their mean, without those that stand apart."""
    bar: torch.Tensor
    """(batch,) keys apart have a larger sum of squares times query_variance, as in `reach.stand_apart`."""
    value_mean: torch.Tensor


def _some(t: torch.Tensor) -> torch.Tensor:
    return t[:, :: max(1, t.shape[1] // _SAMPLED)].float()


def _sampled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> _Sampled:
    variance, mean = torch.var_mean(_some(q), 1, correction=0)
    variance = variance * scale**2
    some = _some(k)
    key_mean = some.mean(1, keepdim=True)
    squares = (some - key_mean).square()
    spreads = (squares * variance.unsqueeze(1)).sum(2)
    bar = (APART**2 * spreads.median(1).values).clamp_min(APART_NATS**2)
    apart = spreads > bar.unsqueeze(1)
    many = apart.sum(1) > apart.shape[1] / 16
    apart = apart & ~many.unsqueeze(1)
    spread = squares.masked_fill_(apart.unsqueeze(2), 0.0).sum(1) / (~apart).sum(1, keepdim=True)
    bar = bar.masked_fill(many, torch.inf)
    return _Sampled(mean, variance, key_mean.squeeze(1), spread, bar, _some(v).mean(1))


def clustering_launches(d: int) -> dict[str, dict[str, Any]]:
    """What `launches` has of the kernels that cluster the queries."""
    width = max(16, triton.next_power_of_2(d))
    return {
        "nearest_kernel": {"D": d, "BM": 128, "BN": 64, "BD": width, "WIDEN": _INTERPRETED, "num_warps": 8},
        "centres_kernel": {"D": d, "BM": TILE, "BD": width},
    }


def launches(d: int, d_v: int, clusters: int, near: int) -> dict[str, dict[str, Any]]:
    """Constants and options of each kernel, by its name, but for those that say how long the inputs are."""
    width = max(16, triton.next_power_of_2(d))
    widths = {"D": d, "D_V": d_v, "BD": width, "BV": 1 if d_v == 1 else max(16, triton.next_power_of_2(d_v))}
    # Rows of whole 16 columns can be loaded 16 bytes at a time.
    pairs = {"W": -(-d // 16) * 16, "BD": width}
    rows = min(64, max(16, triton.next_power_of_2(clusters)))
    widen = {"WIDEN": _INTERPRETED}
    far = {"BN": 32 if rows > 16 and width > 64 else 64, "num_warps": 8 if rows == 64 and width > 64 else 4}
    # Four programs on a multiprocessor rather than two or three: faster although a few numbers are spilled.
    few_registers = {} if _INTERPRETED or max(d, d_v) > 64 < d_v else {"maxnreg": 128}
    return clustering_launches(d) | {
        "keys_kernel": {"D": d, "BN": 64, **pairs},
        "sample_kernel": {"BM": rows, "BN": 64, **pairs, **widen},
        "threshold_kernel": {"num_warps": 8},
        "far_kernel": {"BM": rows, **widths, **pairs, **widen, **far},
        "finish_kernel": widths,
        "rows_kernel": {"BM": TILE, "BN": 16 if near <= 32 else 32, **widths, **widen, **few_registers},
    }


def nearest(
    q: torch.Tensor, s: _Sampled, weight: torch.Tensor, centres: torch.Tensor, step: int, dtype: torch.dtype
) -> torch.Tensor:
    """The nearest of centres (batch, C, d) to each step-th of q (batch, n, d), in the metric of weight (batch, d)."""
    batch, n, d = q.shape
    clusters, points = centres.shape[1], len(range(0, n, step))
    labels = torch.empty(batch, points, dtype=dtype, device=q.device)
    kernels.nearest_kernel[(triton.cdiv(points, 128), batch)](
        q, s.query_mean, weight, centres.bfloat16(), centres.square().sum(2), labels, n, points, step, clusters,
        LENGTH=clusters if _INTERPRETED else 0, **clustering_launches(d)["nearest_kernel"],
    )  # fmt: skip
    return labels


def tiles_and_centres(
    q: torch.Tensor, s: _Sampled, first: torch.Tensor, scale: float, clusters: int, iterations: int, sampled: int
) -> tuple[Tiles, torch.Tensor, torch.Tensor]:
    """Clusters of the queries by k-means, as in `expansion.labels_of_queries`, their centres and variances.

    Both (batch, clusters, d); the centres are rounded to bfloat16.
    """
    batch, n, d = q.shape
    if clusters == 1:
        tiles = Tiles.of(torch.zeros(batch, n, dtype=torch.int64, device=q.device), 1)
        return tiles, (scale * s.query_mean).bfloat16().float().unsqueeze(1), s.query_variance.unsqueeze(1)
    weight = scale * s.key_spread.pow(METRIC_POWER)
    step = n // clusters
    start = torch.arange(clusters, device=q.device) * step + first % step
    centres = (q.index_select(1, start).float() - s.query_mean.unsqueeze(1)) * weight.unsqueeze(1)
    step = max(1, n // (sampled * clusters))
    some = (q[:, ::step].float() - s.query_mean.unsqueeze(1)) * weight.unsqueeze(1)
    ones = torch.ones_like(some[..., 0])
    for _ in range(iterations):
        labels = nearest(q, s, weight, centres, step, torch.int64)
        totals = torch.zeros_like(centres).scatter_add_(1, labels.unsqueeze(2).expand(-1, -1, d), some)
        counts = centres.new_zeros(batch, clusters).scatter_add_(1, labels, ones)
        centres = torch.where(counts.unsqueeze(2) > 0, totals / counts.clamp_min(1).unsqueeze(2), centres)
    labels = nearest(q, s, weight, centres, 1, torch.int16 if clusters < 2**15 else torch.int32)
    tiles = Tiles.of(labels, clusters)
    centres, variances = torch.empty_like(centres), torch.empty_like(centres)
    kernels.centres_kernel[(clusters, batch)](
        q, tiles.queries, tiles.ends, centres, variances, n, tiles.queries.shape[1], clusters, scale,
        _TILES_OF_A_CENTRE,
        LENGTH=_TILES_OF_A_CENTRE if _INTERPRETED else 0, **clustering_launches(d)["centres_kernel"],
    )  # fmt: skip
    return tiles, centres, variances


def steps(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    clustering: Clustering,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The method, without sizes or branches that depend on the data: (batch, n_q, d_v), NaN where lost; the lost rows'
    number (1,).

    first (1,) is the query from which k-means takes its first centres.
    """
    batch, n_q, d = q.shape
    n_k, d_v = v.shape[1:]
    near, clusters = clustering.near, -(-n_q // clustering.block)
    s = _sampled(q, k, v, scale)
    tiles, centres, variances = tiles_and_centres(
        q, s, first, scale, clusters, clustering.iterations, clustering.sampled
    )
    stride, rank, room = listing(near, n_k)
    sample = n_k // stride

    launched = launches(d, d_v, clusters, near)
    wide, rows = launched["far_kernel"]["W"], launched["far_kernel"]["BM"]
    groups = triton.cdiv(clusters, rows)
    # Pieces of the keys, so that even one cluster keeps the whole GPU busy
    parts = max(1, min(_PROGRAMS // (groups * batch), n_k // 512))
    piece = triton.cdiv(triton.cdiv(n_k, parts), 64) * 64
    parts = triton.cdiv(n_k, piece)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=q.device)

    pairs, apart = empty(batch, n_k, 2 * wide, dtype=torch.bfloat16), empty(batch, n_k)
    kernels.keys_kernel[(triton.cdiv(n_k, 64), batch)](
        k, s.key_mean, s.query_variance, s.bar, pairs, apart, n_k, **launched["keys_kernel"]
    )
    ranks = torch.zeros(batch, clusters, 2, wide, dtype=torch.bfloat16, device=q.device)
    ranks[:, :, 0, :d] = centres
    ranks[:, :, 1, :d] = 0.5 * variances
    logs, bound = empty(batch, clusters, sample), empty(batch, clusters)
    kernels.sample_kernel[(triton.cdiv(sample, 64), groups, batch)](
        ranks, pairs, apart, logs, clusters, n_k, sample, stride, **launched["sample_kernel"]
    )
    kernels.threshold_kernel[(batch * clusters,)](
        logs, bound, sample, rank, ROOM=triton.next_power_of_2(sample), **launched["threshold_kernel"]
    )
    counts = torch.zeros(batch * clusters + 1, dtype=torch.int32, device=q.device)
    lost = counts[-1:]
    lists = empty(batch, clusters, room, dtype=torch.int32)
    sums = parts, batch, clusters
    totals, values, keys, tilts = empty(*sums), empty(*sums, d_v), empty(*sums, d), empty(*sums, d if d_v == 1 else 1)
    kernels.far_kernel[(parts, groups, batch)](
        ranks, pairs, apart, v, s.value_mean, bound, counts, lists, totals, values, keys, tilts,
        clusters, n_k, piece, room,
        PIECE=piece if _INTERPRETED else 0, **launched["far_kernel"],
    )  # fmt: skip
    far_log = empty(batch, clusters)
    kernels.finish_kernel[(clusters, batch)](
        variances, bound, counts, totals, values, keys, tilts, far_log, clusters, parts, room,
        LENGTH=parts if _INTERPRETED else 0, **launched["finish_kernel"],
    )  # fmt: skip
    out = empty(batch, n_q, d_v, dtype=v.dtype)
    kernels.rows_kernel[(tiles.queries.shape[1], batch)](
        q, tiles.queries, tiles.clusters, k, v, s.key_mean, s.value_mean, s.key_spread,
        counts, lists, bound, centres, variances, totals, values, keys, tilts, far_log, out, lost,
        n_q, n_k, room, clusters, scale, REACH, most_off(n_k - near),
        LENGTH=room if _INTERPRETED else 0, OWN=n_q == n_k, **launched["rows_kernel"],
    )  # fmt: skip
    return out, lost
