"""The Gaussian kernel between queries and keys, by rows or by pairs, counting every evaluation."""

from __future__ import annotations

import numpy as np

from approxkmv.errors import InputError

# Above this squared norm the expansion |q|^2 + |k|^2 - 2<q,k> loses too many digits for nearby pairs.
CANCELLATION = 1e7


def restore_digits(logs: np.ndarray, queries: np.ndarray, keys: np.ndarray, largest: float, unit: float = 1.0) -> None:
    """Recompute the entries of logs = -|q_i - k_j|^2 unit^2 that may be visible after exp, from the differences.

    logs: (n_q, n_k), made by the expansion and changed in place. largest: the largest squared norm in it.
    """
    i, j = np.nonzero(logs > -800.0 - 64.0 * largest * np.finfo(np.float64).eps)
    for part in range(0, len(i), 65536):
        s = slice(part, part + 65536)
        difference = (queries[i[s]] - keys[j[s]]) * unit
        logs[i[s], j[s]] = -np.einsum("pd,pd->p", difference, difference)


class GaussianKernel:
    """log K_ij = -|q_i - k_j|^2 / (2 sigma^2), evaluated on demand and counted.

    >>> kernel = GaussianKernel(np.zeros((2, 3)), np.ones((4, 3)), sigma=1.0)
    >>> kernel.log_rows(slice(0, 2)).shape, kernel.log_pairs(np.array([0]), np.array([1])), kernel.computed
    ((2, 4), array([-1.5]), 9)

    Args:
        queries: (n_q, d). keys: (n_k, d). Float64. sigma: the bandwidth.
    Raises:
        InputError: the points are so many bandwidths apart that their squares overflow.
    Source: section 1, with 2 sigma^2 in the exponent everywhere (section 1 prints 2 sigma once).
    """

    def __init__(self, queries: np.ndarray, keys: np.ndarray, sigma: float) -> None:
        # The kernel depends on differences only; centring minimises the norms, and so the cancellation. Where it cannot
        # avoid that, pairs are computed from the points as given: a far centre rounds the points near the origin.
        centre = keys.mean(0)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            unit = 1.0 / (sigma * np.sqrt(2.0))
            self.queries = (queries - centre) * unit
            self.keys = (keys - centre) * unit
            self._query_norms = np.einsum("id,id->i", self.queries, self.queries)
            self._key_norms = np.einsum("jd,jd->j", self.keys, self.keys)
            largest = max(self._query_norms.max(), self._key_norms.max())
        if not largest < 1e300:
            raise InputError(f"the points lie more than 1e150 bandwidths apart at sigma = {sigma!r}: rescale them")
        self._largest = float(largest)
        self._cancels = largest > CANCELLATION
        self._given = (queries, keys, unit) if self._cancels else (self.queries, self.keys, 1.0)
        self.n_queries, self.n_keys = len(queries), len(keys)
        self.computed = 0

    def log_rows(self, rows: slice | np.ndarray, columns: np.ndarray | None = None) -> np.ndarray:
        """log K of the given rows against all keys, or against the given columns."""
        q, k = self.queries[rows], self.keys if columns is None else self.keys[columns]
        k_norms = self._key_norms if columns is None else self._key_norms[columns]
        values = (2.0 * q) @ k.T
        values -= self._query_norms[rows][:, None]
        values -= k_norms[None, :]
        np.minimum(values, 0.0, out=values)
        self.computed += values.size
        if self._cancels:
            q, k, unit = self._given
            restore_digits(values, q[rows], k if columns is None else k[columns], self._largest, unit)
        return values

    def log_pairs(self, i: np.ndarray, j: np.ndarray, chunk: int = 65536) -> np.ndarray:
        """log K of the pairs (i_p, j_p), gathered in chunks."""
        values = np.empty(len(i))
        queries, keys, unit = self._given
        for part in range(0, len(i), chunk):
            s = slice(part, part + chunk)
            difference = (queries[i[s]] - keys[j[s]]) * unit
            np.einsum("pd,pd->p", difference, difference, out=values[s])
        self.computed += len(i)
        return np.negative(values, out=values)
