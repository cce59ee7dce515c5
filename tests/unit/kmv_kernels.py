"""Kernels shared by the tests of ApproxKMV: three that satisfy assumption (A), and one from a real head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from approxkmv.kernels import reduce_attention
from approxkmv.kmv import sparse_kernels

DATA = Path(__file__).parents[1] / "data" / "minilm_squad_heads.npz"


@dataclass(frozen=True)
class Case:
    """Queries, keys, bandwidth, and the kernel matrix itself."""

    queries: np.ndarray
    keys: np.ndarray
    sigma: float

    @cached_property
    def matrix(self) -> np.ndarray:
        difference = self.queries[:, None, :] - self.keys[None, :, :]
        return np.exp(-(difference**2).sum(-1) / (2 * self.sigma**2))


def background(n: int, seed: int = 0, d: int = 16) -> Case:
    """A diagonal of ones over n^2 entries of mean 1/n."""
    return Case(*sparse_kernels.background(n, seed, d))


def clusters(n: int, seed: int = 0) -> Case:
    """Clusters of 8 keys: heavy keys and almost no tail."""
    return Case(*sparse_kernels.clusters(n, seed))


def even_spread(n: int, seed: int = 0) -> Case:
    """Entries of every size, row sums that do not grow."""
    return Case(*sparse_kernels.even_spread(n, seed))


def real_head(which: int = 1) -> Case:
    """A head of all-MiniLM-L6-v2 on a context of SQuAD, by Lemma 4.1, keys centred, q and k of balanced length.

    Neither changes the attention; both make the kernel's entries larger, so that some are heavy.
    """
    with np.load(DATA) as heads:
        q, k = heads["q"][which].astype(np.float64), heads["k"][which].astype(np.float64)
    k -= k.mean(0)
    balance = np.sqrt(np.linalg.norm(k, axis=1).max() / np.sqrt((q**2).sum(1).mean()))
    reduction = reduce_attention(q * balance, k / balance)
    return Case(np.asarray(reduction.queries), np.asarray(reduction.keys), reduction.sigma)


SPARSE = {"background": background, "clusters": clusters, "even spread": even_spread}


def raw_head(which: int = 0) -> Case:
    """A head by Lemma 4.1, unchanged."""
    with np.load(DATA) as heads:
        reduction = reduce_attention(heads["q"][which], heads["k"][which])
    return Case(np.asarray(reduction.queries), np.asarray(reduction.keys), reduction.sigma)


def tail_to_head(matrix: np.ndarray) -> float:
    """c of assumption (A): the sum of all but the n largest entries over the sum of those."""
    entries = np.sort(matrix.ravel())[::-1]
    n = max(matrix.shape)
    return float(entries[n:].sum() / entries[:n].sum())
