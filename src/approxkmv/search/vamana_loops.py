"""Loops of the Vamana graph, compiled by numba, single-threaded: import this only where numba is installed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from approxkmv.compute.compiling import cached_njit

_FLAGS = {"reassoc", "contract", "nsz"}


class Graph(NamedTuple):
    """The fields of `vamana.VamanaGraph`."""

    points: np.ndarray
    neighbours: np.ndarray
    degrees: np.ndarray
    start: int


class Beam(NamedTuple):
    """The candidates of a search, nearest first: keys, their squared distances, and which are expanded."""

    keys: np.ndarray
    distances: np.ndarray
    expanded: np.ndarray


@njit(fastmath=_FLAGS, nogil=True, inline="always")
def _squared(a, i, b, j):
    total = np.float32(0.0)
    for p in range(a.shape[1]):
        x = a[i, p] - b[j, p]
        total += x * x
    return total


@cached_njit(fastmath=_FLAGS, nogil=True)
def prune(points, candidates, distances, count, bar, out):
    """Robust prune: writes neighbours to `out` from candidates (count,) sorted by squared distance to a point.

    The nearest candidate v stays and removes every w with alpha |v - w| <= |p - w|; this repeats with the remaining
    ones. `bar` is alpha squared. Returns how many stay, at most len(out), and the number of distances computed.
    """
    kept = 0
    evaluations = 0
    for c in range(count):
        is_covered = False
        for i in range(kept):
            evaluations += 1
            if bar * _squared(points, out[i], points, candidates[c]) <= distances[c]:
                is_covered = True
                break
        if not is_covered:
            out[kept] = candidates[c]
            kept += 1
            if kept == len(out):
                break
    return kept, evaluations


@cached_njit(fastmath=_FLAGS, nogil=True)
def beam_search(graph, queries, query, stamps, stamp, held, trail):
    """Search from the start of a Graph for row `query`, with as many candidates as the Beam `held` has room for.

    stamps (n,) marks visited points with `stamp`; trail receives the expanded points in order, as many as fit. Returns
    the number of candidates, of expanded points and of distances computed.
    """
    points, neighbours, degrees, start = graph
    keys, distances, expanded = held
    beam = len(keys)
    keys[0] = start
    distances[0] = _squared(queries, query, points, start)
    expanded[0] = False
    stamps[start] = stamp
    count = 1
    steps = 0
    evaluations = 1
    at = 0
    while at < count:
        if expanded[at]:
            at += 1
            continue
        expanded[at] = True
        point = keys[at]
        if steps < len(trail):
            trail[steps] = point
        steps += 1
        lowest = at
        for i in range(degrees[point]):
            other = neighbours[point, i]
            if stamps[other] == stamp:
                continue
            stamps[other] = stamp
            evaluations += 1
            distance = _squared(queries, query, points, other)
            if count == beam and distance >= distances[beam - 1]:
                continue
            place = count if count < beam else beam - 1
            while place > 0 and distances[place - 1] > distance:
                distances[place] = distances[place - 1]
                keys[place] = keys[place - 1]
                expanded[place] = expanded[place - 1]
                place -= 1
            distances[place] = distance
            keys[place] = other
            expanded[place] = False
            if count < beam:
                count += 1
            lowest = min(lowest, place)
        at = lowest
    return count, steps, evaluations


@cached_njit(fastmath=_FLAGS, nogil=True)
def insert_all(points, order, neighbours, degrees, beam, bar):
    """Build the graph point by point in `order`: search, robust prune, and back links, pruned if there are too many.

    Returns the number of distances computed.
    """
    n = len(points)
    degree = neighbours.shape[1]
    stamps = np.full(n, -1, np.int64)
    searched = Beam(np.empty(beam, np.int64), np.empty(beam, np.float32), np.empty(beam, np.bool_))
    trail = np.empty(n, np.int64)
    gap = np.empty(n, np.float32)
    kept = np.empty(degree, np.int64)
    others = np.empty(degree + 1, np.int64)
    gaps = np.empty(degree + 1, np.float32)
    total = 0
    graph = Graph(points, neighbours, degrees, order[0])
    for turn in range(1, n):
        point = order[turn]
        _, count, evaluations = beam_search(graph, points, point, stamps, turn, searched, trail)
        # The whole path is a candidate: the points near its start become the long links.
        for i in range(count):
            gap[i] = _squared(points, point, points, trail[i])
        sorting = np.argsort(gap[:count])
        size, compared = prune(points, trail[sorting], gap[sorting], count, bar, kept)
        total += evaluations + count + compared
        degrees[point] = size
        for i in range(size):
            neighbours[point, i] = kept[i]
        for i in range(size):
            other = neighbours[point, i]
            held = degrees[other]
            if held < degree:
                neighbours[other, held] = point
                degrees[other] = held + 1
                continue
            for j in range(held):
                others[j] = neighbours[other, j]
                gaps[j] = _squared(points, other, points, others[j])
            others[held] = point
            gaps[held] = _squared(points, other, points, point)
            sorting = np.argsort(gaps)
            total += held + 1
            held, compared = prune(points, others[sorting], gaps[sorting], held + 1, bar, kept)
            total += compared
            degrees[other] = held
            for j in range(held):
                neighbours[other, j] = kept[j]
    return total


@cached_njit(fastmath=_FLAGS, nogil=True)
def search_all(low, high, graph, queries, beam, found, distances, steps, evaluations):
    """Fill rows low to high - 1 of found (n_q, count), -1 if fewer were found, and distances, steps and evaluations."""
    stamps = np.full(len(graph.points), -1, np.int64)
    held = Beam(np.empty(beam, np.int64), np.empty(beam, np.float32), np.empty(beam, np.bool_))
    trail = np.empty(0, np.int64)
    for i in range(low, high):
        count, steps[i], evaluations[i] = beam_search(graph, queries, i, stamps, i, held, trail)
        for j in range(min(count, found.shape[1])):
            found[i, j] = held.keys[j]
            distances[i, j] = held.distances[j]
