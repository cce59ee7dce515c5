"""The logits of attention, tile by tile, with scale, cap, bias and mask; inputs are checked once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from approxkmv.arrays import DTYPES as FLOATS
from approxkmv.arrays import Array, as_float64, is_number, is_whole, queries_and_keys, resolve_scale, tensor_of
from approxkmv.compute.scratch import scratch
from approxkmv.errors import InputError

# Columns of float32 products that are summed together: fewer mean smaller partial sums of a logit, whose rounding is
# the error of a float32 logit. Two sums of 32 have half the error of one of 64, and take a sixth longer.
COLUMNS = 32
# Replaces a logit that a mask hides, by dtype; and the limit on logits, far enough from it.
HIDDEN = {torch.float32: -1e30, torch.float64: -1e300}
LARGEST = {torch.float32: 1e28, torch.float64: 1e290}
# Queries or keys shorter than this, whose squared length may underflow, are balanced as if they had this length.
_SHORTEST = 1e-150
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Logits:
    """scale <q_i, k_j>, capped, plus a bias, some of them hidden; all leading dimensions are merged into heads."""

    q: torch.Tensor
    """(heads, n_q, d) in the dtype of the products, scaled."""
    k: torch.Tensor
    """(heads, n_k, d) likewise."""
    row_terms: torch.Tensor
    """(heads, n_q) float64: scale |q_i|^2 / 2, which is subtracted in the logarithm of Lemma 4.1's Gaussian kernel."""
    softcap: float | None
    bias: torch.Tensor | None
    """(..., n_q, n_k), expanded to all leading dimensions, or (n_q, n_k)."""
    seen: torch.Tensor | None
    """bool, shaped as bias."""
    spans: np.ndarray | None
    """(n_q, 2) int64: query i sees the keys in [first number, second number)."""
    batch: tuple[int, ...]
    """The leading dimensions."""

    @property
    def plain(self) -> bool:
        """Whether a logit is a product alone."""
        return self.softcap is None and self.bias is None and self.seen is None and self.spans is None

    @property
    def hidden(self) -> float:
        """What replaces a hidden logit in a tile."""
        return HIDDEN[self.q.dtype]

    def pieces(self, keys: int, area: int, per_thread: bool = False) -> Iterator[tuple[slice, slice]]:
        """Heads and rows to compute together: about `area` logits, with `keys` keys per row.

        Several heads always come with all their rows, so that the rows are contiguous over all heads.
        per_thread: `area` for each thread, for what is computed row by row; how a sum over pieces rounds would depend
        on it.
        """
        heads, n_q = self.q.shape[:2]
        if self.q.device.type != "cpu":
            area *= 16
        elif per_thread:
            area *= torch.get_num_threads()
        rows = min(n_q, max(1, area // keys))
        together = max(1, area // (rows * keys))
        for head in range(0, heads, together):
            for row in range(0, n_q, rows):
                yield slice(head, min(head + together, heads)), slice(row, min(row + rows, n_q))

    def tiles(self, heads: slice, rows: slice, keys: int) -> Iterator[torch.Tensor]:
        """All tiles of these rows, `keys` keys wide; each is valid until the next."""
        n_k = self.k.shape[1]
        for start in range(0, n_k, keys):
            tile = self.tile(heads, rows, slice(start, min(start + keys, n_k)))
            if tile is not None:
                yield tile

    def tile(self, heads: slice, rows: slice, keys: slice) -> torch.Tensor | None:
        """(heads, rows, keys): a tile, valid until the next; None if spans hide all of it."""
        place = _place(self.spans, rows, keys)
        if place is None:
            return None
        q, k = self.q[heads, rows], self.k[heads, keys].mT
        shape = q.shape[0], q.shape[1], k.shape[2]
        on_cpu = q.device.type == "cpu"
        tile = scratch("logits", *shape, dtype=q.dtype) if on_cpu else q.new_empty(shape)
        width = COLUMNS if q.dtype == torch.float32 else q.shape[2]
        torch.bmm(q[..., :width], k[:, :width], out=tile)
        for start in range(width, q.shape[2], width):
            tile.baddbmm_(q[..., start : start + width], k[:, start : start + width])
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.bias is not None:
            tile += self._part(self.bias, heads, rows, keys)
        if self.seen is not None:
            tile.masked_fill_(~self._part(self.seen, heads, rows, keys), self.hidden)
        if len(place):
            own = torch.from_numpy(place).to(tile.device)
            j = torch.arange(keys.start, keys.start + shape[2], device=tile.device)
            tile.masked_fill_((j < own[:, :1]) | (j >= own[:, 1:]), self.hidden)
        return tile

    def _part(self, array: torch.Tensor, heads: slice, rows: slice, keys: slice) -> torch.Tensor:
        if array.ndim == 2:
            return array[rows, keys]
        indices = (np.unravel_index(head, self.batch) for head in range(heads.start, heads.stop))
        return torch.stack([array[tuple(map(int, index))][rows, keys] for index in indices])


def _place(spans: np.ndarray | None, rows: slice, keys: slice) -> np.ndarray | None:
    """The rows' spans if they cut through these keys, no spans if they see all of them, None if they see none."""
    if spans is None:
        return np.empty((0, 2), np.int64)
    own = spans[rows]
    if own[:, 0].min() >= keys.stop or own[:, 1].max() <= keys.start:
        return None
    return own[:0] if own[:, 0].max() <= keys.start and own[:, 1].min() >= keys.stop else own


def checked_logits(
    q: Array, k: Array, scale: float | None, mask: Any, bias: Array | None, softcap: float | None, dtype: str
) -> Logits:
    """The arguments of attention_statistics, checked. Raises InputError in one line."""
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}")
    kind = DTYPES[dtype]
    queries, keys, _ = queries_and_keys(q, _repeated(q, k))
    batch, (n_q, d), n_k = tuple(queries.shape[:-2]), queries.shape[-2:], keys.shape[-2]
    s = resolve_scale(scale, d)
    cap = None if softcap is None else _positive(softcap)
    added = None if bias is None else _as_bias(bias, (*batch, n_q, n_k), queries.device)
    spans, seen = _masks(mask, (*batch, n_q, n_k), queries.device)
    queries, keys = queries.reshape(-1, n_q, d), keys.reshape(-1, n_k, d)
    lengths = [torch.linalg.vector_norm(x, dim=-1) for x in (queries, keys)]
    one, other = (float(x.max()) if x.numel() else 0.0 for x in lengths)
    most = s * one * other + (float(added.abs().amax()) if added is not None and added.numel() else 0.0)
    if most > LARGEST[kind]:
        raise InputError(f"logits may be {most:.0e}, but {dtype} allows {LARGEST[kind]:.0e}: scale q or k or bias down")
    # Moving a power of 2 from one to the other changes no product and keeps both within float32.
    shift = 0.5 * (math.log2(max(other, _SHORTEST)) - math.log2(s) - math.log2(max(one, _SHORTEST)))
    power = 2.0 ** round(max(-900.0, min(shift, 600.0)))
    return Logits(
        torch.mul(queries, s * power, out=torch.empty_like(queries, dtype=kind)),
        torch.mul(keys, 1.0 / power, out=torch.empty_like(keys, dtype=kind)),
        lengths[0].square() * (0.5 * s),
        cap,
        added,
        seen,
        spans,
        batch,
    )


def _repeated(q: Array, k: Array) -> Array:
    """k with each head repeated for the query heads that share it."""
    if not all(isinstance(x, (np.ndarray, torch.Tensor)) and x.ndim > 2 for x in (q, k)):
        return k
    times, rest = divmod(q.shape[-3], max(1, k.shape[-3]))
    if rest or times < 2:
        return k
    return np.repeat(k, times, axis=-3) if isinstance(k, np.ndarray) else k.detach().repeat_interleave(times, -3)


def _positive(softcap: float) -> float:
    if not (is_number(softcap) and 1e-28 <= float(softcap) <= 1e28):
        raise InputError(f"softcap is {softcap!r}: it must be a positive number, from 1e-28 to 1e28")
    return float(softcap)


def _as_bias(bias: Array, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if isinstance(bias, np.ndarray) and bias.dtype.kind in "fiu":
        bias = tensor_of(bias)
    if not isinstance(bias, torch.Tensor) or bias.is_complex() or bias.dtype == torch.bool:
        raise InputError("bias must be a torch tensor or a NumPy array of real numbers")
    if bias.dtype not in FLOATS:
        # torch lacks operations of some types.
        bias = bias.double()
    if bias.numel() and not bool(torch.isfinite(bias).all()):
        raise InputError("bias holds a NaN or an infinity: hide keys with mask instead")
    return _expanded(bias.detach().to(device), "bias", shape)


def _expanded(array: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The array as (n_q, n_k) if it has only these dimensions, else expanded to all leading dimensions."""
    try:
        whole = array.expand(shape)
    except RuntimeError:
        raise InputError(f"{name} has shape {tuple(array.shape)}: it must broadcast to {shape}") from None
    return array.reshape(array.shape[-2:]).expand(shape[-2:]) if array.shape[:-2].numel() == 1 else whole


def _masks(mask: Any, shape: tuple[int, ...], device: torch.device) -> tuple[np.ndarray | None, torch.Tensor | None]:
    """A mask as spans or as a bool tensor; both None if every query sees every key."""
    n_q, n_k = shape[-2:]
    if isinstance(mask, str) and mask == "none":
        return None, None
    is_window = is_whole(mask) and mask > 0
    if is_window or (isinstance(mask, str) and mask == "causal"):
        if n_q != n_k:
            raise InputError(f"there are {n_q} queries and {n_k} keys: give their mask as spans or a boolean array")
        stops = np.arange(1, n_q + 1)
        starts = np.maximum(stops - min(mask, n_q), 0) if is_window else np.zeros_like(stops)
        return np.stack([starts, stops], 1), None
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biu":
        mask = tensor_of(mask)
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        return None, _expanded(mask.to(device), "mask", shape)
    if not isinstance(mask, torch.Tensor) or mask.is_floating_point() or mask.is_complex():
        raise InputError(
            f'mask is {mask if isinstance(mask, (str, int, float)) else type(mask).__name__!r}: use "none", "causal", '
            "a window of at least 1 key, a boolean array, or whole numbers (n_q, 2) from and before which keys are seen"
        )
    spans = mask.detach().cpu().numpy().astype(np.int64)
    if n_k == 2 and spans.shape == (n_q, 2) and n_q and spans.min() >= 0 and spans.max() <= 1:
        raise InputError(
            "mask has whole numbers 0 and 1 for 2 keys, which may be spans or tell seen keys: give a boolean array"
        )
    if spans.shape != (n_q, 2) or spans.min(initial=0) < 0 or spans.max(initial=0) > n_k:
        raise InputError(f"mask of whole numbers has shape {spans.shape}: spans are ({n_q}, 2), each from 0 to {n_k}")
    if (spans[:, 0] > spans[:, 1]).any():
        raise InputError("mask has a span that ends before it begins: give the first key that is seen, and the end")
    return spans, None


def checked_sinks(sinks: Array | None, logits: Logits) -> torch.Tensor | None:
    """(heads, n_q) float64: one more logit per row. Raises InputError."""
    if sinks is None:
        return None
    given = as_float64(sinks, "sinks").to(logits.q.device)
    shape = (*logits.batch, logits.q.shape[1])
    by_row = given.shape == shape
    try:
        whole = (given if by_row else given.unsqueeze(-1)).expand(shape)
    except RuntimeError:
        raise InputError(
            f"sinks has shape {tuple(given.shape)}: one for each head must broadcast to {shape[:-1]}, one for each "
            f"query is {shape}"
        ) from None
    if given.numel() and float(given.abs().amax()) > LARGEST[torch.float32]:
        raise InputError(f"sinks is as large as {float(given.abs().amax()):.0e}: logits are at most 1e28")
    return whole.reshape(logits.q.shape[:2])
