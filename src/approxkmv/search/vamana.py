"""The graph of DiskANN (Subramanya et al. 2019) with its robust prune and greedy search, in Euclidean space.

An edge p-v makes an edge p-w redundant if alpha |v - w| <= |p - w|. If the prune runs over all other points, the graph
is alpha-shortcut reachable, and greedy search from any start ends within a factor (alpha + 1) / (alpha - 1) of the
nearest distance (Indyk & Xu 2023; Theorem 7 of the lecture). `build` is the practical version: candidates from a
search, a bound on the degree, and no guarantee.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from approxkmv.arrays import Array, as_float64, is_whole
from approxkmv.compute.counting import count as report
from approxkmv.compute.threads import over_threads
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError, UnavailableError

_LARGEST = 1e17
_WIDTH = 16  # coordinates are padded to whole vector registers


@dataclass(frozen=True)
class Found:
    """The candidates of each query, nearest first."""

    keys: torch.Tensor
    """(n_q, count) int64, -1 where fewer were found."""
    distances: torch.Tensor
    """(n_q, count), inf if there is none."""
    steps: torch.Tensor
    """(n_q,) the number of points whose neighbours were examined."""
    evaluations: torch.Tensor
    """(n_q,) the number of distances computed."""


@dataclass(frozen=True)
class VamanaGraph:
    """Points (n, d) and the neighbours of each."""

    points: np.ndarray
    neighbours: np.ndarray
    """(n, largest degree); entries beyond `degrees` are undefined."""
    degrees: np.ndarray
    start: int
    width: int
    """d; the columns of `points` beyond it are 0."""

    @plain_torch()
    def search(self, queries: Array, count: int, beam: int) -> Found:
        """The `count` best candidates for each of queries (n_q, d); with a beam of 1 this is greedy search.

        Args:
            beam: candidates kept during the search, at least `count`.
        Raises:
            InputError: queries of another width than the points or beyond float32, a count or beam below 1.
        """
        _check_counts(count=count, beam=beam)
        padded = _padded(queries, "queries")
        n_q = len(padded)
        if queries.shape[1] != self.width:
            raise InputError(f"queries have width {queries.shape[1]}, another than the graph's points")
        keys, distances = np.full((n_q, count), -1, np.int64), np.full((n_q, count), np.inf, np.float32)
        steps, evaluations = np.zeros(n_q, np.int64), np.zeros(n_q, np.int64)
        out = keys, distances, steps, evaluations
        loops = _loops()
        graph = loops.Graph(self.points, self.neighbours, self.degrees, self.start)
        over_threads(lambda low, high: loops.search_all(low, high, graph, padded, max(beam, count), *out), n_q)
        report(other_products=int(evaluations.sum()))
        found = (torch.from_numpy(array) for array in (keys, np.sqrt(distances), steps, evaluations))
        return Found(*found)


def _loops() -> ModuleType:
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise UnavailableError("the Vamana graph needs numba: pip install 'approxkmv[pipeline]'") from error
    from approxkmv.search import vamana_loops

    return vamana_loops


def _padded(points: Array, name: str) -> np.ndarray:
    given = as_float64(points, name)
    if given.ndim != 2 or 0 in given.shape:
        raise InputError(f"{name} have shape {tuple(given.shape)}: give (n, d), neither of them 0")
    if given.device.type != "cpu":
        raise UnavailableError(f"graph search runs on a CPU only, not on {given.device.type}")
    if float(given.abs().max()) > _LARGEST:
        raise InputError(f"{name} hold a number beyond {_LARGEST:g}: squared distances are float32")
    wide = torch.nn.functional.pad(given.float(), (0, -given.shape[1] % _WIDTH))
    return wide.contiguous().numpy()


def _start(points: np.ndarray) -> int:
    """The point nearest to the mean of all points."""
    return int(np.square(points - points.mean(0)).sum(1).argmin())


def _check(alpha: float) -> None:
    if not alpha >= 1:
        raise InputError(f"alpha is {alpha}: it must be at least 1")


def _check_counts(**given: int) -> None:
    for name, value in given.items():
        # The loops write to arrays of this length without looking.
        if not (is_whole(value) and value >= 1):
            raise InputError(f"{name} is {value!r}: it must be a whole number of at least 1")


@plain_torch()
def build(points: Array, *, alpha: float, degree: int, beam: int, generator: torch.Generator) -> VamanaGraph:
    """The practical graph of points (n, d): each point in turn is searched for, pruned and linked both ways.

    Args:
        alpha: how much nearer a shortcut must be, at least 1. degree: the most neighbours of a point.
        beam: candidates kept while searching for a point. generator: shuffles the points.
    Raises:
        InputError: alpha, degree or beam below 1, no points, or some beyond float32. UnavailableError: no numba.
    """
    _check(alpha)
    _check_counts(degree=degree, beam=beam)
    padded = _padded(points, "points")
    n = len(padded)
    start = _start(padded)
    order = torch.randperm(n, generator=generator).numpy()
    order = np.concatenate([[start], order[order != start]])
    neighbours, degrees = np.zeros((n, min(degree, max(1, n - 1))), np.int32), np.zeros(n, np.int32)
    made = _loops().insert_all(padded, order, neighbours, degrees, beam, np.float32(alpha * alpha))
    report(other_products=int(made))
    return VamanaGraph(padded, neighbours, degrees, start, points.shape[1])


@plain_torch()
def build_exhaustively(points: Array, *, alpha: float) -> VamanaGraph:
    """The graph of points (n, d) with the guarantee: every point is pruned over all others, in time n^2 times degree.

    Raises InputError for alpha below 1, no points, or some beyond float32, and UnavailableError if numba is missing.
    """
    _check(alpha)
    loops = _loops()
    padded = _padded(points, "points")
    n = len(padded)
    lists = []
    for i in range(n):
        gaps = np.square(padded - padded[i]).sum(1)
        order = np.argsort(gaps, kind="stable")
        order = order[order != i]
        kept = np.empty(max(1, n - 1), np.int64)
        # Points at the same place link to each other first.
        size, made = loops.prune(padded, order, gaps[order], len(order), np.float32(alpha * alpha), kept)
        lists.append(kept[:size])
        report(other_products=n - 1 + int(made))
    degrees = np.array([len(some) for some in lists], np.int32)
    neighbours = np.zeros((n, max(1, int(degrees.max()))), np.int32)
    for i, some in enumerate(lists):
        neighbours[i, : len(some)] = some
    return VamanaGraph(padded, neighbours, degrees, _start(padded), points.shape[1])
