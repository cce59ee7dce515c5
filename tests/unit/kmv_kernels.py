"""Kernels that the tests of ApproxKMV share: three that satisfy assumption (A), and one of a real head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from approxkmv.kernels import reduce_attention

DATA = Path(__file__).parents[1] / "data" / "minilm_squad_heads.npz"


@dataclass(frozen=True)
class Case:
    """Queries, keys, bandwidth, and the kernel matrix itself."""

    queries: np.ndarray
    keys: np.ndarray
    sigma: float

    @property
    def matrix(self) -> np.ndarray:
        difference = self.queries[:, None, :] - self.keys[None, :, :]
        return np.exp(-(difference**2).sum(-1) / (2 * self.sigma**2))


def background(n: int, seed: int = 0, d: int = 16) -> Case:
    """Gaussian points, self-attention: a diagonal of ones and n^2 small entries of mean 1/n."""
    points = np.random.default_rng([seed, 1]).standard_normal((n, d))
    # E exp(-|p - q|^2 / 2 sigma^2) = (1 + 2 / sigma^2)^(-d/2) for independent standard Gaussians: 1/n at this sigma.
    return Case(points, points, float(np.sqrt(2 / (n ** (2 / d) - 1))))


def clusters(n: int, seed: int = 0, d: int = 6) -> Case:
    """Far-apart clusters of 8 keys, queries near them: heavy keys and hardly a tail."""
    rng = np.random.default_rng([seed, 2])
    centres = 6.0 * rng.standard_normal((-(-n // 8), d))
    keys = (centres[:, None, :] + 0.25 * rng.standard_normal((len(centres), 8, d))).reshape(-1, d)[:n]
    queries = keys[rng.permutation(n)] + 0.3 * rng.standard_normal((n, d))
    return Case(queries, keys, 0.9)


def even_spread(n: int, seed: int = 0, d: int = 3) -> Case:
    """Points of one density in a box that grows with n: entries of every size, row sums that do not grow."""
    rng = np.random.default_rng([seed, 3])
    side = (n / 2.0) ** (1 / d)
    return Case(side * rng.random((n, d)), side * rng.random((n, d)), 0.55)


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


def tail_to_head(matrix: np.ndarray) -> float:
    """c of assumption (A): the sum of all but the n largest entries over the sum of those."""
    entries = np.sort(matrix.ravel())[::-1]
    n = max(matrix.shape)
    return float(entries[n:].sum() / entries[:n].sum())
