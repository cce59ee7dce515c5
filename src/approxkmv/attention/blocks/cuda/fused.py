"""Local expansion in few kernels: of clusters x keys only bits are stored. As `expansion`, in bfloat16 products.

A sample of the keys gives each cluster a threshold: one pass marks the keys above it and sums all others.
"""

from __future__ import annotations

from typing import Any

import torch

from approxkmv.attention.blocks.cuda import kernels
from approxkmv.attention.blocks.cuda.clustering import Sampled, labels_of_queries, one_cluster, ranks_of, tiles_of
from approxkmv.attention.blocks.cuda.clustering import launches as clustering_launches
from approxkmv.attention.blocks.cuda.expansion import TILE, TILTED_COLUMNS, most_tiles
from approxkmv.attention.blocks.expansion import Clustering
from approxkmv.attention.blocks.reach import REACH, most_off
from approxkmv.attention.kernels.triton import triton

# Of at most so many keys one is in the sample that gives the threshold, which holds at most _SAMPLE.
_STRIDE, _SAMPLE = 16, 8192
# Multiprocessors of an H100 (SXM) or H200. Each holds three programs of the pass over all keys, or two of wide rows.
_MULTIPROCESSORS = 132
# Widest keys and values
_WIDEST = 128


def listing(near: int, n_k: int) -> tuple[int, int, int]:
    """For lists of about `near` of n_k keys: one key in how many is sampled, which of the sample is the threshold, and
    the longest list.

    The number of keys above the r-th largest of a sample of one key in s is about s r, with deviation s sqrt(r). The
    rows of a list that is too long, about two in a million at most, are made exactly.
    """
    stride = max(-(-n_k // _SAMPLE), min(_STRIDE, max(1, near // 8)))
    rank = max(1, round(near / stride))
    return stride, rank, -(-int(stride * (rank + 6 * rank**0.5 + 6)) // 64) * 64


def fits(n_k: int, d: int, d_v: int, near: int) -> bool:
    """Whether these sizes have a fused form."""
    stride, rank, _ = listing(near, n_k)
    return max(d, d_v) <= _WIDEST and (d_v == 1 or d_v > TILTED_COLUMNS) and 2 * rank <= n_k // stride


def evaluations(batch: int, n_q: int, n_k: int, blocks: int, near: int) -> int:
    """Kernel evaluations of a call: all keys, a sample and near keys at the centres; for each query near, far and own
    keys.
    """
    stride, _, _ = listing(near, n_k)
    own = n_q if n_q == n_k else 0
    return batch * (blocks * (n_k + n_k // stride + near) + TILE * most_tiles(n_q, blocks) * near + n_q + own)


def launches(d: int, d_v: int, clusters: int) -> dict[str, dict[str, Any]]:
    """Constants and options of each kernel, by its name, but for those that say how long the inputs are."""
    width = max(16, triton.next_power_of_2(d))
    widths = {"D": d, "D_V": d_v, "BD": width, "BV": 1 if d_v == 1 else max(16, triton.next_power_of_2(d_v))}
    # Rows of whole 16 columns can be loaded 16 bytes at a time.
    pairs = {"W": -(-d // 16) * 16, "BD": width}
    rows = min(64, max(16, triton.next_power_of_2(clusters)))
    far = {"BN": 32 if rows > 16 and width > 64 else 64, "num_stages": 2}
    few_registers: dict[str, int] = {}
    if d_v == 1 or max(d, d_v) <= 64:
        # More programs on a multiprocessor, without spills
        few_registers = {"maxnreg": 128, "num_stages": 2}
        if d_v == 1 and width <= 64:
            few_registers |= {"maxnreg": 144, "num_warps": 2}
    return clustering_launches(d, d_v) | {
        "keys_kernel": {"BN": 64, **widths, **pairs},
        "sample_kernel": {"BM": rows, "BN": 64, **pairs},
        "threshold_kernel": {"num_warps": 8},
        "far_kernel": {"BM": rows, **widths, **pairs, **far},
        "lists_kernel": {"BN": 512},
        "finish_kernel": {"BN": 16, **widths, **pairs},
        "bases_kernel": {"D": d, "BN": 64, **pairs},
        "rows_kernel": {"BM": TILE, "BN": 32, **widths, **pairs, **few_registers},
    }


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
    s = Sampled.of(q, k, v, scale)
    if clusters == 1:
        queries, of_tile = one_cluster(q)
        ranks = s.ranks
    else:
        labels, sizes = labels_of_queries(q, s, first, clusters, clustering.iterations, clustering.sampled)
        queries, of_tile, ends = tiles_of(labels, sizes, clusters)
        ranks = ranks_of(q, queries, ends, scale)
    stride, rank, room = listing(near, n_k)
    sample = n_k // stride

    launched = launches(d, d_v, clusters)
    wide, rows = launched["far_kernel"]["W"], launched["far_kernel"]["BM"]
    groups = triton.cdiv(clusters, rows)
    # Pieces of the keys, so that even one cluster keeps the whole GPU busy
    programs = _MULTIPROCESSORS * (3 if max(d, d_v) <= 64 else 2)
    parts = max(1, min(programs // (groups * batch), n_k // 512))
    piece = triton.cdiv(triton.cdiv(n_k, parts), 64) * 64
    parts = triton.cdiv(n_k, piece)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=q.device)

    padded = parts * piece
    pairs, apart = empty(batch, padded, 2 * wide, dtype=torch.bfloat16), empty(batch, padded)
    centred = empty(batch, padded, d_v, dtype=torch.float32 if d_v == 1 else torch.bfloat16)
    kernels.keys_kernel[(padded // 64, batch)](
        k, v, s.key_mean, s.value_mean, s.query_variance, s.bar, pairs, centred, apart, n_k, padded,
        **launched["keys_kernel"],
    )  # fmt: skip
    logs, bound = empty(batch, clusters, sample), empty(batch, clusters)
    kernels.sample_kernel[(triton.cdiv(sample, 64), groups, batch)](
        ranks, pairs, apart, logs, clusters, padded, sample, stride, **launched["sample_kernel"]
    )
    kernels.threshold_kernel[(batch * clusters,)](
        logs, bound, sample, rank, ROOM=triton.next_power_of_2(sample), **launched["threshold_kernel"]
    )
    words = empty(batch, clusters, padded // 32, dtype=torch.int32)
    sums = parts, batch, clusters
    totals, values, keys, tilts = empty(*sums), empty(*sums, d_v), empty(*sums, d), empty(*sums, d if d_v == 1 else 1)
    kernels.far_kernel[(parts, groups, batch)](
        ranks, pairs, apart, centred, bound, words, totals, values, keys, tilts, clusters, padded, piece,
        **launched["far_kernel"],
    )  # fmt: skip
    counts, lists = empty(batch, clusters, dtype=torch.int32), empty(batch, clusters, room, dtype=torch.int32)
    kernels.lists_kernel[(clusters, batch)](words, counts, lists, words.shape[2], room, **launched["lists_kernel"])
    far_log = empty(batch, clusters)
    kernels.finish_kernel[(clusters, batch)](
        ranks, bound, counts, totals, values, keys, tilts, far_log, clusters, parts, room,
        **launched["finish_kernel"],
    )  # fmt: skip
    bases = empty(batch, clusters, room)
    kernels.bases_kernel[(clusters, triton.cdiv(room, launched["bases_kernel"]["BN"]), batch)](
        ranks, k, s.key_mean, counts, lists, bases, clusters, n_k, room, **launched["bases_kernel"]
    )
    out, lost = empty(batch, n_q, d_v, dtype=v.dtype), torch.zeros(1, dtype=torch.int32, device=q.device)
    kernels.rows_kernel[(queries.shape[1], batch)](
        q, queries, of_tile, k, pairs, v, centred, s.key_mean, s.value_mean, s.key_spread,
        counts, lists, bases, bound, ranks, totals, values, keys, tilts, far_log, out, lost,
        n_q, n_k, padded, room, clusters, scale, REACH, most_off(n_k - near),
        OWN=n_q == n_k, **launched["rows_kernel"],
    )  # fmt: skip
    return out, lost
