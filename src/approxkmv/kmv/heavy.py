"""FindHeavy (Algorithm 1): every pair of a query and a key whose kernel value is at least n^-alpha."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from approxkmv.arrays import Array
from approxkmv.kmv import hashing, inputs
from approxkmv.kmv.constants import PRINTED, PaperConstants
from approxkmv.kmv.costs import Tally
from approxkmv.kmv.gaussian import GaussianKernel

# Tables are drawn and hashed in groups of this size for any memory bound, so that the answer does not depend on it.
_GROUP = 8
DEFAULT_MEMORY = 1 << 30


@dataclass(frozen=True)
class HeavyKeys(Sequence[np.ndarray]):
    """The sets S_i, as a sequence of sorted index arrays over compressed rows."""

    starts: np.ndarray
    """(n_q + 1,): S_i is indices[starts[i]:starts[i+1]]."""
    indices: np.ndarray
    """Keys, row after row, ascending within a row."""
    log_values: np.ndarray
    """log K of each pair; at least -alpha ln n."""
    tables: int
    """T, the number of hash tables used; 0 if none were needed."""
    tally: Tally
    """Collisions scanned (with repetition), pairs evaluated, and hash functions evaluated."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, i: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, i: slice) -> list[np.ndarray]: ...
    def __getitem__(self, i: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = range(len(self))[i]
        return self.indices[self.starts[row] : self.starts[row + 1]]

    def rows(self) -> np.ndarray:
        """The query of each pair."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))


def least_heavy_memory(n_q: int, n_k: int, d: int) -> int:
    """The least memory, in bytes, that FindHeavy accepts."""
    return 8 * _GROUP * (n_q + n_k) + 256 * n_k + (1 << 14) * d + (1 << 20)


def find_heavy(
    queries: Array,
    keys: Array,
    *,
    sigma: float,
    alpha: float = 1 / 3,
    seed: int | None = None,
    family: str = "p-stable",
    constants: PaperConstants = PRINTED,
    memory: int = DEFAULT_MEMORY,
) -> HeavyKeys:
    """Find for each query all keys with K_ij >= n^-alpha (Algorithm 1, FindHeavy).

    >>> points = np.arange(5.0)[:, None]
    >>> find_heavy(points, points, sigma=0.5, seed=0)[2]
    array([2])

    Evaluates the pairs that collide in one of T = 10 n^alpha ln n hash tables and keeps the heavy ones: no light pair
    is returned, and a heavy one is missed with probability n^-10. n is the number of keys, except in the logarithm
    of T, a union bound over all pairs, where it is the larger side. At small n the printed T exceeds n, and scanning
    all pairs would be cheaper; `constants` changes it.

    Args:
        queries: (n_q, d). keys: (n_k, d). Torch tensors or NumPy arrays.
        sigma: the bandwidth. alpha: of the threshold, in [0, 1]. seed: None, or an integer for a reproducible answer.
        family: "p-stable" (fast) or "ball-carving" (the one quoted by Lemma 2.1); both have its near property.
        constants: the printed constants. memory: bound on temporary storage, in bytes.
    Returns:
        HeavyKeys: result[i] is S_i.
    Raises:
        InputError: mismatched shapes, a non-finite value, sigma not positive, alpha outside [0, 1], an unknown
        family, too little memory.
    Source: Definition 3.3, Algorithm 1 and Lemma 3.4.
    """
    q, k = inputs.points(queries, keys)
    width, power = inputs.positive(sigma, "sigma"), inputs.fraction(alpha, "alpha")
    source = inputs.seed_sequence(seed)
    inputs.choice(family, "family", hashing.FAMILIES)
    inputs.enough_memory(memory, least_heavy_memory(len(q), len(k), q.shape[1]), "finding the heavy keys")
    kernel = GaussianKernel(q, k, width)
    return scan_buckets(kernel, alpha=power, source=source, family=family, constants=constants, memory=memory)


def scan_buckets(
    kernel: GaussianKernel,
    *,
    alpha: float,
    source: np.random.SeedSequence,
    family: str,
    constants: PaperConstants,
    memory: int,
) -> HeavyKeys:
    """Algorithm 1 for arguments that are already checked."""
    n_q, n_k, d = kernel.n_queries, kernel.n_keys, kernel.keys.shape[1]
    # A small slack, so that rounding does not lose a pair that meets it exactly
    threshold = -alpha * math.log(n_k) - 1e-12
    tables = constants.tables(n_k, alpha, max(n_q, n_k))
    # The kernel's coordinates are in units of sigma sqrt(2), where K = n^-alpha at distance sqrt(alpha ln n).
    near = math.sqrt(alpha * math.log(n_k))
    hash_family = hashing.near_family(family, near, math.exp(-alpha * math.log(n_k)), n=n_k)
    groups = math.ceil(tables / _GROUP)
    block = int(max(1, min(n_q, (memory // 4) // n_k)))

    asked = 0
    before = kernel.computed
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, n_q, block):
        rows = slice(start, min(start + block, n_q))
        seen = np.zeros((rows.stop - rows.start, n_k), dtype=bool)
        # Each block of rows redraws the functions from the same seeds: the same tables, without storing them.
        # A table counts once in `hash_evaluations`, since the algorithm stores it.
        for group in range(groups):
            drawn = hash_family.draw(d, min(_GROUP, tables - group * _GROUP), inputs.generator(source, group))
            step = int(max(64, (memory // 4) // drawn.bytes_per_point()))
            codes_k = _codes(drawn, kernel.keys, step)
            codes_q = _codes(drawn, kernel.queries[rows], step)
            for table in range(len(codes_k)):
                _, sizes = hashing.mark_collisions(seen, codes_q[table], codes_k[table], max(4096, memory // 256))
                asked += int(sizes.sum())
        step = int(max(1, (memory // 4) // (64 * n_k)))
        for part in range(0, len(seen), step):
            i, j = np.nonzero(seen[part : part + step])
            i += start + part
            values = kernel.log_pairs(i, j, max(256, (memory // 16) // (8 * d)))
            heavy = values >= threshold
            parts.append((i[heavy], j[heavy], values[heavy]))
    i, j, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    starts = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=n_q))])
    return HeavyKeys(starts, j, values, tables, Tally(asked, kernel.computed - before, tables * (n_q + n_k)))


def _codes(drawn: hashing.HashTables, points: np.ndarray, step: int) -> np.ndarray:
    return np.concatenate([drawn.codes(points[s : s + step]) for s in range(0, len(points), step)], axis=1)
