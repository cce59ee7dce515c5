"""CUDA work that is recorded once and replayed, so that the GPU does not wait for Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

T = TypeVar("T", torch.Tensor, tuple[torch.Tensor, ...])

# More than the settings of all grids together, since their runs alternate: with fewer, each would find its graph
# evicted. Apart from its copy of the inputs a graph is small, since all graphs share their memory.
_GRAPHS = 64


@dataclass(frozen=True)
class _Graph:
    """A recorded run."""

    inputs: list[torch.Tensor]
    """The tensors from which a replay reads its inputs."""
    replay: Callable[[], Any]
    """The answer, a tensor or some, in memory that the next replay of any graph overwrites."""
    pool: Any


_graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()
_recordings = 0


def recordings() -> int:
    """The number of graphs recorded so far: do not time a run during which it rises."""
    return _recordings


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    # Graphs share memory only if recorded on one stream; torch's own belongs to the first device used.
    return torch.cuda.Stream(device)


def _record(work: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Callable[[], Any], Any]:
    """Record `work` as a graph with memory from `pool` (None: its own pool); returns its replay and its pool."""
    stream = _recording_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Run once before: a graph cannot record the compilation of kernels and the loading of libraries.
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        out = work()

    def replay() -> Any:
        graph.replay()
        return out

    return replay, graph.pool()


def _graph_of(steps: Callable[..., Any], inputs: Sequence[torch.Tensor], given: Mapping[str, Any]) -> _Graph:
    """The graph for inputs of these shapes and dtype, recorded unless it is among the most recently used."""
    global _recordings
    device = inputs[0].device
    key = (steps, device, *((t.shape, t.dtype) for t in inputs), *given.values())
    if key in _graphs:
        _graphs.move_to_end(key)
        return _graphs[key]
    while len(_graphs) >= _GRAPHS:
        _graphs.popitem(last=False)
    # The pool of a living graph: torch frees a pool with the last graph that uses it.
    pool = next((graph.pool for graph in _graphs.values() if graph.inputs[0].device == device), None)
    # A tensor made in inference mode cannot be written outside it.
    with torch.inference_mode(False), torch.no_grad():
        mine = [t.clone(memory_format=torch.contiguous_format) for t in inputs]
        replay, pool = _record(lambda: steps(*mine, **given), device, pool)
    _recordings += 1
    _graphs[key] = _Graph(mine, replay, pool)
    return _graphs[key]


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def replayed(steps: Callable[..., T], inputs: Sequence[torch.Tensor], given: Mapping[str, Any]) -> T:
    """steps(*inputs, **given), a tensor or a tuple of tensors, through a graph if the inputs are on CUDA.

    steps must have no size or branch that depends on the contents of the inputs, and must not draw random numbers.
    Replay on one stream at a time, since graphs share their memory.
    """
    if not _has_graphs(inputs[0].device):
        return steps(*inputs, **given)
    graph = _graph_of(steps, inputs, given)
    for mine, theirs in zip(graph.inputs, inputs, strict=True):
        mine.copy_(theirs)
    found = graph.replay()
    return tuple(t.clone() for t in found) if isinstance(found, tuple) else found.clone()  # type: ignore[return-value]
