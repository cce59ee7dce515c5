"""Keys of largest inner product, exactly or by a hierarchical small-world graph, with keys added incrementally."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from approxkmv.compute.counting import count as report
from approxkmv.errors import InputError, UnavailableError
from approxkmv.kernels import reduce_attention


class Index(Protocol):
    """A searchable set of keys to which more can be added; keys are numbered in the order of insertion."""

    def add(self, first: int, last: int) -> None:
        """Make keys first to last - 1 searchable; those before `first` already are."""

    def search(self, q: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (n_q, count) int64 of the best keys of each query, and their inner products (n_q, count).

        -1 and -inf if fewer were found.
        """


def load_faiss(what: str) -> ModuleType:
    """The module faiss, using as many threads as torch. Raises UnavailableError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UnavailableError(f"{what} needs faiss: pip install 'approxkmv[faiss]'") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _found(index: Any, q: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    products, keys = index.search(np.ascontiguousarray(q.numpy()), count)
    keys = torch.from_numpy(keys)
    return keys, torch.from_numpy(products).masked_fill_(keys < 0, -torch.inf)


class FlatIndex:
    """Exact search: faiss' IndexFlatIP on a CPU, matrix products and torch.topk elsewhere."""

    def __init__(self, k: torch.Tensor) -> None:
        """k (n_k, d) float32: the keys that will be added."""
        self._k = k
        self._count = 0
        self._index = load_faiss("an exact index of keys").IndexFlatIP(k.shape[1]) if k.device.type == "cpu" else None

    def add(self, first: int, last: int) -> None:
        """Make keys first to last - 1 searchable."""
        self._count = last
        if self._index is not None:
            self._index.add(np.ascontiguousarray(self._k[first:last].numpy()))

    def search(self, q: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See Index."""
        # The products of found keys are counted by the code that weighs them.
        report(other_products=len(q) * max(0, self._count - count))
        if self._index is not None:
            return _found(self._index, q, count)
        there = min(count, self._count)
        parts = [(some @ self._k[: self._count].mT).topk(there) for some in q.split(512)]
        pad = torch.nn.functional.pad
        return (
            pad(torch.cat([part.indices for part in parts]), (0, count - there), value=-1),
            pad(torch.cat([part.values for part in parts]), (0, count - there), value=-torch.inf),
        )


class HNSWIndex:
    """A hierarchical navigable small-world graph (Malkov & Yashunin 2018) in faiss, of the keys of Lemma 4.1.

    The lemma's keys all have the same norm, so inner products rank them as Euclidean distances do, for which the graph
    is built; the queries' extra coordinate is zero, so the products are those of the original keys.
    """

    def __init__(self, k: torch.Tensor, links: int, construction: int, breadth: int) -> None:
        """k (n_k, d) float32: the keys that will be added.

        Args:
            links: neighbours of a key on each level above the lowest, which has twice as many; at least 2.
            construction, breadth: candidates kept while the graph is built and while it is searched.
        Raises:
            InputError: fewer links. UnavailableError: another device than a CPU, or no faiss.
        """
        if links < 2:
            # With one, faiss would put keys on infinitely many levels.
            raise InputError(f"links is {links}: a graph needs at least 2")
        if k.device.type != "cpu":
            raise UnavailableError(f"graph search runs on a CPU only, not on {k.device.type}")
        faiss = load_faiss("a graph index of keys")
        self._keys = torch.as_tensor(reduce_attention(k, k).keys).float().numpy()
        self._index = faiss.IndexHNSWFlat(self._keys.shape[1], links, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = construction
        self._breadth = breadth

    def add(self, first: int, last: int) -> None:
        """Make keys first to last - 1 searchable, on one thread: with several the order of the links would vary."""
        # If torch's OpenMP is in the process faiss shares it, so save the number of threads before changing it.
        threads = torch.get_num_threads()
        faiss = load_faiss("a graph index of keys")
        try:
            faiss.omp_set_num_threads(1)
            self._index.add(np.ascontiguousarray(self._keys[first:last]))
        finally:
            faiss.omp_set_num_threads(threads)

    def search(self, q: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See Index."""
        self._index.hnsw.efSearch = max(self._breadth, count)
        statistics = load_faiss("a graph index of keys").cvar.hnsw_stats
        before = statistics.ndis
        found = _found(self._index, torch.nn.functional.pad(q, (0, 1)), count)
        # faiss counts the distances of a search, but not those of building the graph.
        report(other_products=statistics.ndis - before)
        return found


def make_index(name: str, k: torch.Tensor, *, links: int, construction: int, breadth: int) -> Index:
    """An empty index for keys k (n_k, d): "flat" or "hnsw". Raises InputError for another name."""
    if name == "flat":
        return FlatIndex(k)
    if name == "hnsw":
        return HNSWIndex(k, links, construction, breadth)
    raise InputError(f"unknown index {name!r}: use flat or hnsw")
