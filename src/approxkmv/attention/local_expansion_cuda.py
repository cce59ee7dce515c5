"""Local expansion on CUDA: blocks of equal size, no size that depends on the data, so that a graph can replay it.

A query's own key is one of many here; on a CPU it is always exact.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from approxkmv.attention import triton_kernels
from approxkmv.attention.counting import count
from approxkmv.attention.expansion import _METRIC_POWER, _TILTED_COLUMNS

# More than a grid has settings, whose runs alternate: with fewer, each would find its graph gone. Beside its copy of
# the inputs a graph is small, since all share their memory.
_GRAPHS = 32


@dataclass(frozen=True)
class _Graph:
    """A recorded run of `steps`."""

    inputs: list[torch.Tensor]
    """q, k, v and first, where a replay reads them."""
    replay: Callable[[], torch.Tensor]
    """Its answer lies in memory that the next replay of any graph writes to."""
    pool: Any


_graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()


def order_of_queries(
    q: torch.Tensor, k: torch.Tensor, first: torch.Tensor, clusters: int, iterations: int, sampled: int
) -> torch.Tensor:
    """Order (batch, n) in which queries of one k-means cluster, and clusters near each other, follow one another.

    Every so many-th query is a first centre, counted from `first` (1,). No more centres than queries.
    """
    batch, n, d = q.shape
    clusters = min(clusters, n)
    spread = k.square().mean(1, keepdim=True)
    points = q * spread.pow(_METRIC_POWER)
    step = n // clusters
    # From a tensor, so that a graph need not be recorded for each seed.
    centres = points.index_select(1, torch.arange(clusters, device=q.device) * step + first % step)
    some = points[:, :: max(1, n // (sampled * clusters))]
    for _ in range(iterations):
        labels = torch.baddbmm(centres.square().sum(2).unsqueeze(1), some, centres.mT, alpha=-2).argmin(2)
        totals = torch.zeros_like(centres).scatter_add_(1, labels.unsqueeze(2).expand(-1, -1, d), some)
        counts = centres.new_zeros(batch, centres.shape[1]).scatter_add_(1, labels, torch.ones_like(some[..., 0]))
        centres = torch.where(counts.unsqueeze(2) > 0, totals / counts.clamp_min(1).unsqueeze(2), centres)
    labels = torch.baddbmm(centres.square().sum(2).unsqueeze(1), points, centres.mT, alpha=-2).argmin(2)
    # Blocks are cut across clusters, so that the next cluster should be a near one: by the widest axis.
    widest = centres.var(1, correction=0).argmax(1)
    place = centres.gather(2, widest.view(-1, 1, 1).expand(-1, centres.shape[1], 1)).squeeze(2)
    rank = place.argsort(1).argsort(1)
    return rank.gather(1, labels).argsort(1)


def steps(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    *,
    scale: float,
    block: int,
    near: int,
    iterations: int,
    sampled: int,
    products: torch.dtype,
) -> torch.Tensor:
    """The method without a single size or branch that depends on the data: (batch, n_q, d_v).

    first (1,) is the query from which k-means takes its first centres.
    """
    batch, n, d = q.shape
    d_v = v.shape[2]
    keys = k.float() - k.float().mean(1, keepdim=True)
    values = v.float()
    scaled = q.float() * scale
    blocks = -(-n // block)
    order = order_of_queries(scaled, keys, first, blocks, iterations, sampled)
    # The last block is filled with its own last query, so that it stays one block.
    padded = torch.cat([order, order[:, -1:].expand(-1, blocks * block - n)], 1)
    sorted_q = scaled.gather(1, padded.unsqueeze(2).expand(-1, -1, d))
    in_blocks = sorted_q.view(batch, blocks, block, d)
    centres = in_blocks.mean(2)
    deltas = in_blocks - centres.unsqueeze(2)
    variances = deltas.square().mean(2)

    squares = keys.square()
    rank = torch.cat([centres, 0.5 * variances], 2).to(products)
    logs = torch.bmm(rank, torch.cat([keys, squares], 2).to(products).mT).float()
    chosen = logs.topk(near, 2, sorted=False).indices
    highest = logs.amax(2, keepdim=True)
    weights = (logs - highest).exp_().scatter_(2, chosen, 0.0)
    tilted = d_v <= _TILTED_COLUMNS
    features = [torch.ones_like(values[..., :1]), values, keys]
    features += [values[..., c : c + 1] * keys for c in range(d_v)] if tilted else []
    sums = torch.bmm(weights.to(products), torch.cat(features, 2).to(products)).float()
    total = sums[..., :1].clamp_min(1e-30)
    far_value, far_key = sums[..., 1 : 1 + d_v] / total, sums[..., 1 + d_v : 1 + d_v + d] / total
    far_log = total.squeeze(2).log() + highest.squeeze(2) - 0.5 * (variances * far_key.square()).sum(2)
    seen = torch.einsum("bngd,bnd->bng", deltas, far_key) + far_log.unsqueeze(2)
    value = far_value.unsqueeze(2).expand(-1, -1, block, -1)
    if tilted:
        tilt = sums[..., 1 + d_v + d :].view(batch, blocks, d_v, d) / total.unsqueeze(3)
        tilt = tilt - far_value.unsqueeze(3) * far_key.unsqueeze(2)
        value = value + torch.einsum("bngd,bncd->bngc", deltas, tilt)
    out = triton_kernels.listed(
        sorted_q.to(products),
        keys.to(products),
        values.to(products),
        chosen,
        seen.flatten(1),
        value.flatten(1, 2),
        block,
        1.0,
    )
    answer = torch.empty(batch, n, d_v, device=q.device, dtype=torch.float32)
    return answer.scatter_(1, order.unsqueeze(2).expand(-1, -1, d_v), out[:, :n]).to(v.dtype)


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    # Graphs share memory only where they are recorded on one stream; torch's own would be of the first device used.
    return torch.cuda.Stream(device)


def _record(
    work: Callable[[], torch.Tensor], device: torch.device, pool: Any
) -> tuple[Callable[[], torch.Tensor], Any]:
    """Record `work` as a graph whose memory comes from `pool` (None: a pool of its own): its replay, and its pool."""
    stream = _recording_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Kernels are compiled and libraries loaded before, since a graph cannot record that.
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        out = work()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay, graph.pool()


def _graph_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: dict[str, Any]) -> _Graph:
    """The graph for inputs of these shapes and this type, recorded unless it is one of the last that were used."""
    key = (q.shape, k.shape, v.shape, q.dtype, q.device, *given.values())
    if key in _graphs:
        _graphs.move_to_end(key)
        return _graphs[key]
    while len(_graphs) >= _GRAPHS:
        _graphs.popitem(last=False)
    # That of a living graph: torch gives up a pool with the last graph that uses it.
    pool = next((graph.pool for graph in _graphs.values() if graph.inputs[0].device == q.device), None)
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        mine = [t.clone(memory_format=torch.contiguous_format) for t in (q, k, v)]
        mine.append(torch.zeros(1, dtype=torch.int64, device=q.device))
        replay, pool = _record(lambda: steps(*mine, **given), q.device, pool)
    _graphs[key] = _Graph(mine, replay, pool)
    return _graphs[key]


def _replayed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, given: dict[str, Any]) -> torch.Tensor:
    """`steps` by a graph, which replays all that a GPU does without waiting for Python: (batch, n_q, d_v).

    Replays are for one stream at a time, since graphs share their memory.
    """
    graph = _graph_of(q, k, v, given)
    *static, start = graph.inputs
    for mine, theirs in zip(static, (q, k, v), strict=True):
        mine.copy_(theirs)
    start.fill_(first)
    return graph.replay().clone()


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


@torch.no_grad()
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    products: str,
    block: int,
    near: int,
    directions: int,
    iterations: int,
    sampled: int,
) -> torch.Tensor:
    """Local expansion of q (batch, n_q, d), k (batch, n_k, d), v (batch, n_k, d_v) on their device, without gradients.

    The seed shifts the queries that k-means starts from; `directions` has no use here, since all axes fit.
    """
    batch, n_q, _ = q.shape
    n_k = k.shape[1]
    if near >= n_k:
        count(kernel_evaluations=batch * n_q * n_k)
        return triton_kernels.exact(q, k, v, scale)
    # All queries together are the largest block.
    block = min(block, n_q)
    blocks = -(-n_q // block)
    # Counted from the sizes, since a replayed graph runs no Python: all keys at the centres, near keys and the far key
    # for each query, and the distances of k-means. The last block is padded to a whole one.
    count(kernel_evaluations=batch * blocks * (n_k + block * (near + 1)))
    of_sample = len(range(0, n_q, max(1, n_q // (sampled * blocks))))
    count(other_products=batch * blocks * (n_q + iterations * of_sample))
    first = seed % block
    given: dict[str, Any] = {
        "scale": scale,
        "block": block,
        "near": near,
        "iterations": iterations,
        "sampled": sampled,
        "products": torch.float32 if products == "float32" else torch.bfloat16,
    }
    with triton_kernels.on_device(q.device):
        if _has_graphs(q.device):
            return _replayed(q, k, v, first, given)
        return steps(q, k, v, torch.full((1,), first, device=q.device), **given)
