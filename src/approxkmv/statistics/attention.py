"""Statistics of the rows of softmax attention and of its matrix as a whole, without any n x n array."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch

from approxkmv.arrays import Array
from approxkmv.compute.loops import compiled_loops
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError
from approxkmv.statistics import rows as plain_rows
from approxkmv.statistics.entries import SHARES
from approxkmv.statistics.largest import Largest
from approxkmv.statistics.logits import Logits, checked_logits, checked_sinks
from approxkmv.statistics.spectrum import column_norm_and_stable_rank

# Logits of one tile per thread, and its keys: a tile then stays in the L2 cache.
TILE = 2**18
KEYS = 512
# Columns of q and k of which tiles fit on a GPU's chip.
_WIDEST_ON_CHIP = 256
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class AttentionStatistics:
    """Statistics of P = D^-1 A, the softmax of attention, and of the kernel K; float64, of the same kind of array as q.

    The first pass over the logits gives everything down to `sink_mass`. The others take further passes when first
    accessed: `keys_per_share` one; c and the order ratios together one; `column_norm` and `stable_rank` together as
    many as the iteration needs, from 8 to a few dozen. For these a copy of q and k is kept, and bias and mask as given.
    """

    def __init__(self, logits: Logits, sinks: torch.Tensor | None, shares: tuple[float, ...], as_numpy: bool) -> None:
        """Use attention_statistics."""
        self._logits, self._shares, self._as_numpy = logits, shares, as_numpy
        heads, n_q = logits.q.shape[:2]
        # Below any logit, and above hidden ones.
        largest = logits.row_terms.new_full((heads * n_q,), logits.hidden / 2)
        sums = plain_rows.RowSums.of_no_keys(largest)
        form = self._form()
        for group, rows in logits.pieces(KEYS, TILE, per_thread=True):
            here = sums[group.start * n_q + rows.start : (group.stop - 1) * n_q + rows.stop]
            for tile in logits.tiles(group, rows, KEYS):
                form.add_tile(tile.flatten(0, 1), here)
        seen = sums.others >= 0
        top, others, moment = sums.largest, sums.others, sums.moment
        if sinks is not None:
            sink = sinks.reshape(-1)
            top = torch.maximum(top, sink)
            fade, own = torch.exp(sums.largest - top), torch.exp(sink - top)
            moment = fade * (moment + (top - sums.largest).where(seen, 0.0) * (others + 1.0)) + own * (top - sink)
            others = torch.where(sink > sums.largest, fade * (others + 1.0), others + own)
        # Empty rows get an infinite sum, so that each of their weights is 0.
        exists = others >= 0
        self._exists = exists.view(heads, n_q)
        log_sums = torch.where(exists, top + others.log1p(), math.inf)
        self._log_sums = log_sums.view(heads, n_q)
        peaks = torch.where(seen, sums.largest - log_sums, -math.inf).view(heads, n_q).amax(1)
        self._log_largest = torch.where(peaks > -math.inf, peaks, 0.0)
        self._entropy = torch.where(exists, others.log1p() + moment / (others + 1.0), 0.0).view(heads, n_q)
        self._largest = torch.where(seen, torch.exp(sums.largest - log_sums), 0.0).view(heads, n_q)
        self._sink = torch.zeros_like(self._largest) if sinks is None else torch.exp(sinks - self._log_sums)

    def _form(self) -> ModuleType:
        """Compiled loops for float32 on a CPU; plain torch otherwise."""
        q = self._logits.q
        loops = compiled_loops("statistics.row_loops") if q.dtype == torch.float32 and q.device.type == "cpu" else None
        return plain_rows if loops is None else loops

    def _back(self, values: torch.Tensor) -> Array:
        # A copy, so that a caller who changes it changes nothing here.
        whole = values.reshape((*self._logits.batch, *values.shape[1:])).clone()
        return whole.numpy() if self._as_numpy else whole

    @property
    def entropy(self) -> Array:
        """(..., n_q): - sum p log p of each row, in nats. A sink counts as one more outcome, as in the softmax."""
        return self._back(self._entropy)

    @property
    def mean_entropy(self) -> Array:
        """(...): mean over the rows that have keys or a sink; 0 if none has."""
        return self._back((self._entropy * self._exists).sum(1) / self._exists.sum(1).clamp_min(1))

    @property
    def entropy_quantiles(self) -> Array:
        """(..., 7): least, 5 %, 25 %, 50 %, 75 %, 95 % and largest entropy of the rows that have keys or a sink."""
        values = torch.where(self._exists, self._entropy, math.inf).sort(1).values
        last = (self._exists.sum(1, keepdim=True) - 1).clamp_min(0)
        places = last * torch.tensor(QUANTILES, dtype=torch.float64, device=values.device)
        low, high = (values.gather(1, place.long()) for place in (places.floor(), places.ceil()))
        found = low + (high - low) * (places - places.floor())
        return self._back(torch.where(self._exists.any(1, keepdim=True), found, 0.0))

    @property
    def support(self) -> Array:
        """(..., n_q): exp(entropy), the number of equal weights with this entropy; 0 for an empty row."""
        return self._back(self._entropy.exp() * self._exists)

    @property
    def largest_weight(self) -> Array:
        """(..., n_q): the largest weight of a key."""
        return self._back(self._largest)

    @cached_property
    @plain_torch()
    def first_mass(self) -> Array:
        """(..., n_q): the weight of the first key."""
        out = torch.zeros_like(self._log_sums)
        for group, rows in self._logits.pieces(1, TILE, per_thread=True):
            tile = self._logits.tile(group, rows, slice(0, 1))
            if tile is not None:
                out[group, rows] = torch.exp(tile[..., 0].double() - self._log_sums[group, rows])
        return self._back(torch.minimum(out, self._largest))

    @property
    def sink_mass(self) -> Array:
        """(..., n_q): the share of each row that its sink takes; 0 without sinks."""
        return self._back(self._sink)

    @cached_property
    @plain_torch()
    def keys_per_share(self) -> Array:
        """(..., n_q, shares) int64: the fewest keys that hold each share of a row's weight (excluding its sink).

        Keys are taken from the largest weight down, in any order among equal weights, until their sum in float64 is at
        least the share times the sum over all keys. 0 for a row without keys.
        """
        logits, form = self._logits, self._form()
        n_q, n_k = logits.q.shape[1], logits.k.shape[1]
        out = torch.zeros(len(logits.q) * n_q, len(self._shares), dtype=torch.long, device=logits.q.device)
        for group, rows in logits.pieces(n_k, TILE, per_thread=True):
            for tile in logits.tiles(group, rows, n_k):
                here = slice(group.start * n_q + rows.start, (group.stop - 1) * n_q + rows.stop)
                out[here] = form.count_keys(tile.flatten(0, 1), logits.hidden, self._shares)
        return self._back(out.view(len(logits.q), n_q, len(self._shares)))

    @cached_property
    @plain_torch()
    def _ratios(self) -> torch.Tensor:
        """(heads, 4): c of K, c of D^-1 A, log K_(n)/K_(n+1), log K_(n)/K_(2n)."""
        logits = self._logits
        n_k = logits.k.shape[1]
        fits = logits.plain and logits.q.shape[2] <= _WIDEST_ON_CHIP
        if logits.q.device.type == "cuda" and fits and find_spec("triton"):
            from approxkmv.statistics.largest_cuda import largest_of

            given = zip(logits.q, logits.k, -logits.row_terms, -self._log_sums, strict=True)
            return self._table_of([(largest_of(q, k, 1.0, a), largest_of(q, k, 1.0, b)) for q, k, a, b in given])
        heads = [(Largest(n_k, logits.q.device), Largest(n_k, logits.q.device)) for _ in logits.q]
        for group, rows in logits.pieces(n_k, 2 * TILE):
            for tile in logits.tiles(group, rows, n_k):
                values = tile.double().masked_fill_(tile <= logits.hidden / 2, -math.inf)
                for head, strip in zip(range(group.start, group.stop), values, strict=True):
                    shifts = logits.row_terms[head, rows], self._log_sums[head, rows]
                    for target, shift in zip(heads[head], shifts, strict=True):
                        target.add_strip(strip - shift.unsqueeze(1))
        return self._table_of(heads)

    def _table_of(self, heads: Sequence[tuple[Largest, Largest]]) -> torch.Tensor:
        found = [(kernel.finish(), softmax.finish()) for kernel, softmax in heads]
        return torch.tensor(
            [[k[0], p[0], k[1] - k[2], k[1] - k[3]] for k, p in found],
            dtype=torch.float64,
            device=self._logits.q.device,
        ).reshape(-1, 4)

    @property
    def ratio(self) -> Array:
        """(...): c of K: the sum of all but its n_k largest entries over the sum of those; 0 if there are no others.

        log K is the logits (with cap, bias and mask) less scale |q_i|^2 / 2, the row factor of Lemma 4.1.
        """
        return self._back(self._ratios[:, 0])

    @property
    def softmax_ratio(self) -> Array:
        """(...): c of D^-1 A, in which the row factors cancel."""
        return self._back(self._ratios[:, 1])

    @property
    def log_next(self) -> Array:
        """(...): log of K_(n) / K_(n+1), n = n_k. Raises InputError if the mask leaves fewer than 2n entries."""
        return self._order(2)

    @property
    def log_double(self) -> Array:
        """(...): log of K_(n) / K_(2n), n = n_k. Raises InputError if the mask leaves fewer than 2n entries."""
        return self._order(3)

    def _order(self, column: int) -> Array:
        found = self._ratios[:, column]
        if not bool(torch.isfinite(self._ratios).all()):
            n = self._logits.k.shape[1]
            raise InputError(f"there are fewer than 2n = {2 * n} entries for n = {n} keys: K_(2n) does not exist")
        return self._back(found)

    @cached_property
    @plain_torch()
    def _norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        return column_norm_and_stable_rank(self._form(), self._logits, self._log_sums, self._log_largest)

    @property
    def column_norm(self) -> Array:
        """(...): n_q times the largest squared norm of a column of D^-1 A, alpha of Han et al. (2024), Algorithm 1.

        1 for uniform attention over as many keys as queries, n_q^2 if every query attends to the same key alone.
        """
        return self._back(self._norms[0])

    @property
    def stable_rank(self) -> Array:
        """(...): |P|_F^2 / |P|_2^2 of P = D^-1 A, to 1 %: 1 for uniform attention, n for the identity; 0 for P = 0."""
        return self._back(self._norms[1])


@plain_torch()
def attention_statistics(
    q: Array,
    k: Array,
    *,
    scale: float | None = None,
    mask: Any = "none",
    bias: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    shares: Sequence[float] = SHARES,
    dtype: str = "float32",
) -> AttentionStatistics:
    """Entropy, support, masses and norms of softmax attention, in O((n_q + n_k) d) memory for any length.

    >>> import torch
    >>> found = attention_statistics(torch.randn(2, 8, 300, 16), torch.randn(2, 4, 300, 16), mask="causal")
    >>> tuple(found.entropy.shape), tuple(found.stable_rank.shape), tuple(found.keys_per_share.shape)
    ((2, 8, 300), (2, 8), (2, 8, 300, 2))

    The logits of a row are x_j = scale <q_i, k_j>; a cap makes them softcap tanh(x_j / softcap); then a bias is added.
    The weights are their softmax over the keys that the mask leaves and, if there is one, the sink, which takes its
    share and adds no value. A row that sees no key and has no sink has entropy, support, weights and counts of 0, and
    is left out of means and quantiles.

    Args:
        q, k: (..., heads, n_q, d) and (..., key heads, n_k, d), torch (on any device) or NumPy, any floating dtype and
            any leading dimensions. With fewer key heads, each serves that many consecutive query heads.
        scale: the factor of the logits, above 0; None means 1/sqrt(d).
        mask: "none"; "causal"; an integer w, the window of the last w keys including the query's own; a boolean array
            that broadcasts to (..., n_q, n_k), True for visible keys; or integers (n_q, 2), the first visible key of
            each query and the end of the visible ones, as in `Captured.spans`. For two keys integers that are all 0
            or 1 could mean either, and are refused.
        bias: added to the logits, broadcasts to (..., n_q, n_k).
        softcap: the cap of the logits, applied before the bias.
        sinks: one more logit per row, belonging to no key: broadcasts to (...), one per head, or is (..., n_q).
        shares: between 0 and 1, of `keys_per_share`.
        dtype: of the products, float32 or float64. In float32 statistics are within 1e-5 of float64, relative to
            the value (`log_next` and `log_double` absolutely, `stable_rank` to 1 %), for scale |q| |k| up to 30 (larger
            logits are rounded in proportion); in float64 within 1e-6 up to 10^4.
    Returns:
        AttentionStatistics.
    Raises:
        InputError: mismatched shapes, non-finite values, logits that may exceed the range of the products' dtype.
    """
    logits = checked_logits(q, k, scale, mask, bias, softcap, dtype)
    if not isinstance(shares, Sequence) or not all(_is_share(share) for share in shares):
        raise InputError(f"shares is {shares!r}: give numbers above 0 and below 1")
    chosen = tuple(float(share) for share in shares)
    return AttentionStatistics(logits, checked_sinks(sinks, logits), chosen, isinstance(q, np.ndarray))


def _is_share(share: object) -> bool:
    return isinstance(share, (float, np.floating)) and 0.0 < float(share) < 1.0
