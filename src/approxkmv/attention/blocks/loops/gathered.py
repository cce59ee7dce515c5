"""Compiled sums over the keys gathered for each block."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from approxkmv.attention.kernels.numbers import FLAGS, bits, exp, f32, fading
from approxkmv.attention.kernels.tiles import KEYS, LANES, WIDE, multiply_tile, multiply_tile_of_pairs
from approxkmv.compute.compiling import cached_njit

FEW_COLUMNS = 8  # columns of v up to which their sums are not computed as products of tiles
_QUERIES = 64  # queries per panel: the panel and its logits fit the L1 cache
_BATCH = 64  # keys whose products with many value columns are summed together


@njit(inline="always")
def _weigh_keys(chosen, k, mean, extra, centre, places, weights):
    """Copy `chosen` to places, and fill weights with exp(centre.(k - mean) + extra - shift).

    Returns the shift, the largest of these exponents before it is subtracted.
    """
    shift = f32(-np.inf)
    for j in range(len(chosen)):
        key = chosen[j]
        places[j] = key
        dot = f32(0.0)
        for p in range(k.shape[1]):
            dot += centre[p] * (k[key, p] - mean[p])
        dot += extra[j]
        weights[j] = dot
        shift = max(shift, dot)
    for j in range(len(chosen)):
        weights[j] = fading(weights[j] - shift)
    return shift


@njit(inline="always")
def _numbers_to_panel(deltas, i, some, mean, panel, start):
    """Copy rows i to i + some - 1 of deltas to the columns of panel (d, queries), and set start = -deltas.mean."""
    for t in range(some):
        dot = f32(0.0)
        for p in range(deltas.shape[1]):
            x = deltas[i + t, p]
            panel[p, t] = x
            dot += x * mean[p]
        start[t] = -dot


@njit(inline="always")
def _pairs_to_panel(deltas, i, some, panel):
    """Copy rows i to i + some - 1 of deltas, rounded, to the columns of panel (pairs, queries), two per word."""
    d = deltas.shape[1]
    for t in range(some):
        for p in range(d // 2):
            first, second = bits(deltas[i + t, 2 * p]), bits(deltas[i + t, 2 * p + 1])
            panel[p, t] = np.uint32(first) | (np.uint32(second) << np.uint32(16))


# The type of `rounded` selects float32 or bfloat16 products at compile time, so a processor without the bfloat16
# instruction never meets it.
def _lanes(rounded):
    """How many queries a tile multiplies at once."""
    raise NotImplementedError


def _empty_panel(rounded, d):
    """Zeros of the shape and type of a panel of queries of d numbers."""
    raise NotImplementedError


def _fill_panel(rounded, deltas, i, some, mean, panel, start):
    """Fill a panel with rows i to i + some - 1 of deltas, and start with the initial values of their products."""
    raise NotImplementedError


def _multiply(rounded, k, places, j, panel, t, start, out):
    """Multiply the keys and queries of one tile."""
    raise NotImplementedError


@overload(_lanes)
def _lanes_by_type(rounded):
    lanes = LANES if isinstance(rounded, types.NoneType) else WIDE
    return lambda rounded: lanes


@overload(_empty_panel)
def _empty_panel_by_type(rounded, d):
    if isinstance(rounded, types.NoneType):
        return lambda rounded, d: np.zeros((d, _QUERIES), np.float32)
    return lambda rounded, d: np.zeros((rounded.shape[1] // 2, _QUERIES), np.uint32)


@overload(_fill_panel, inline="always")
def _fill_panel_by_type(rounded, deltas, i, some, mean, panel, start):
    if isinstance(rounded, types.NoneType):
        return lambda rounded, deltas, i, some, mean, panel, start: _numbers_to_panel(
            deltas, i, some, mean, panel, start
        )
    return lambda rounded, deltas, i, some, mean, panel, start: _pairs_to_panel(deltas, i, some, panel)


@overload(_multiply, inline="always")
def _multiply_by_type(rounded, k, places, j, panel, t, start, out):
    if isinstance(rounded, types.NoneType):
        return lambda rounded, k, places, j, panel, t, start, out: multiply_tile(  # type: ignore[call-arg]
            k, places, j, panel, t, start, out
        )
    return lambda rounded, k, places, j, panel, t, start, out: multiply_tile_of_pairs(  # type: ignore[call-arg]
        rounded, places, j, panel, t, out
    )


@njit(inline="always")
def _add_tile(logits, span, pairs, j, totals):
    """Add exp(logits) (KEYS, queries) times rows j to j + KEYS - 1 of pairs to totals (columns, queries)."""
    for r in range(0, KEYS, 4):
        for t in range(span):
            logits[r, t] = exp(logits[r, t])
            logits[r + 1, t] = exp(logits[r + 1, t])
            logits[r + 2, t] = exp(logits[r + 2, t])
            logits[r + 3, t] = exp(logits[r + 3, t])
        for c in range(pairs.shape[1]):
            w0 = pairs[j + r, c]
            w1 = pairs[j + r + 1, c]
            w2 = pairs[j + r + 2, c]
            w3 = pairs[j + r + 3, c]
            for t in range(span):
                totals[c, t] += (
                    w0 * logits[r, t] + w1 * logits[r + 1, t] + w2 * logits[r + 2, t] + w3 * logits[r + 3, t]
                )


@cached_njit(fastmath=FLAGS, nogil=True)
def sums_of_keys(low, high, blocks, chosen, ends, extra, keys, rounded, out):
    """Sums of exp(q.(k - mean) + extra) [1, v] over the chosen keys of blocks low to high - 1, for their queries.

    q is its block's centre plus its row of deltas (rows, d); chosen[ends[b-1]:ends[b]] are the keys of block b. out, a
    ScaledSums, receives the sums and the scales. rounded: None, or k - mean (n, d) in bfloat16 as bits, d even;
    products of deltas and keys are then bfloat16, those of centres and keys are not.
    """
    starts, sizes, centres, deltas = blocks.starts, blocks.sizes, blocks.centres, blocks.deltas
    k, mean, v = keys
    sums, scales = out
    width = v.shape[1]
    panel = _empty_panel(rounded, k.shape[1])
    lanes = _lanes(rounded)
    start = np.zeros(_QUERIES, np.float32)
    logits = np.zeros((KEYS, _QUERIES), np.float32)
    totals = np.zeros((1 + width, _QUERIES), np.float32)
    for b in range(low, high):
        begin = ends[b - 1] if b > 0 else 0
        number = ends[b] - begin
        # The last tile is padded with key 0 at weight 0.
        whole = (number + KEYS - 1) // KEYS * KEYS
        places = np.zeros(whole, np.int64)
        weights = np.empty(number, np.float32)
        pairs = np.zeros((whole, 1 + width), np.float32)
        here = slice(begin, ends[b])
        scales[b] = _weigh_keys(chosen[here], k, mean, extra[here], centres[b], places, weights)
        for j in range(number):
            pairs[j, 0] = weights[j]
            for c in range(width):
                pairs[j, 1 + c] = weights[j] * v[places[j], c]
        for i in range(starts[b], starts[b] + sizes[b], _QUERIES):
            some = min(_QUERIES, starts[b] + sizes[b] - i)
            span = (some + lanes - 1) // lanes * lanes
            _fill_panel(rounded, deltas, i, some, mean, panel, start)
            totals[:, :span] = f32(0.0)
            for j in range(0, whole, KEYS):
                for t in range(0, span, lanes):
                    _multiply(rounded, k, places, j, panel, t, start, logits)
                _add_tile(logits, span, pairs, j, totals)
            for c in range(1 + width):
                for t in range(some):
                    sums[i + t, c] = totals[c, t]


@cached_njit(fastmath=FLAGS, nogil=True)
def wide_sums_of_keys(low, high, blocks, chosen, ends, extra, keys, rounded, out):
    """Like sums_of_keys, for many columns of v: their sums are also products of tiles, over _BATCH keys at a time."""
    starts, sizes, centres, deltas = blocks.starts, blocks.sizes, blocks.centres, blocks.deltas
    k, mean, v = keys
    sums, scales = out
    width = v.shape[1]
    panel = _empty_panel(rounded, k.shape[1])
    lanes = _lanes(rounded)
    start = np.zeros(_QUERIES, np.float32)
    nothing = np.zeros(_QUERIES, np.float32)
    heights = np.zeros((_BATCH, _QUERIES), np.float32)
    tile = np.zeros((KEYS, _QUERIES), np.float32)
    columns = np.arange((1 + width + KEYS - 1) // KEYS * KEYS)
    totals = np.zeros((len(columns), _QUERIES), np.float32)
    for b in range(low, high):
        begin = ends[b - 1] if b > 0 else 0
        number = ends[b] - begin
        batches = (number + _BATCH - 1) // _BATCH
        places = np.zeros(batches * _BATCH, np.int64)
        weights = np.empty(number, np.float32)
        pairs = np.zeros((batches, len(columns), _BATCH), np.float32)
        here = slice(begin, ends[b])
        scales[b] = _weigh_keys(chosen[here], k, mean, extra[here], centres[b], places, weights)
        for j in range(number):
            batch, at = j // _BATCH, j % _BATCH
            pairs[batch, 0, at] = weights[j]
            for c in range(width):
                pairs[batch, 1 + c, at] = weights[j] * v[places[j], c]
        for i in range(starts[b], starts[b] + sizes[b], _QUERIES):
            some = min(_QUERIES, starts[b] + sizes[b] - i)
            span = (some + lanes - 1) // lanes * lanes
            _fill_panel(rounded, deltas, i, some, mean, panel, start)
            totals[:, :span] = f32(0.0)
            for batch in range(batches):
                for r in range(0, _BATCH, KEYS):
                    rows = heights[r : r + KEYS]
                    for t in range(0, span, lanes):
                        _multiply(rounded, k, places, batch * _BATCH + r, panel, t, start, rows)
                    for row in range(KEYS):
                        for t in range(span):
                            rows[row, t] = exp(rows[row, t])
                for c in range(0, len(columns), KEYS):
                    for t in range(0, span, LANES):
                        multiply_tile(pairs[batch], columns, c, heights, t, nothing, tile)  # type: ignore[call-arg]
                    for row in range(KEYS):
                        for t in range(span):
                            totals[c + row, t] += tile[row, t]
            for c in range(1 + width):
                for t in range(some):
                    sums[i + t, c] = totals[c, t]
