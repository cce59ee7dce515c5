"""The largest numbers of scale q k^T + row terms on CUDA, of which no n x n array is made: one pass of a Triton kernel.

The product is three of bfloat16, of q and k split in two. What may be among the largest is listed and made again in
float64, so that these are exact; of all else only the sum of the exponentials is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from approxkmv.compute.launching import launched
from approxkmv.statistics.largest import Largest

_LOG2_E = 1.4426950408889634
# Lists, each with a counter of its own: tiles take them in turn, so that they fill evenly.
_LISTS = 64
# Programs that keep a GPU busy: a step of few rows is cut into pieces of the keys.
_PROGRAMS = 1024
_ROWS, _KEYS = 64, 64
# Rows of the first step, in float64 throughout, which give the first bound
_FIRST = 64
_MOST_ROWS = 1 << 14
_ENTRIES = 1 << 20


@triton.jit
def _strip_kernel(
    qh_pointer, qm_pointer, kh_pointer, km_pointer, shift_pointer, far_pointer, count_pointer, place_pointer,
    first, last, n_k, piece, scale, margin,
    LISTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows first to last - 1 of x = scale q.k + shift, relative to the bound, in powers of two; a piece of the keys."""
    begin = tl.program_id(1) * piece
    rows = first + tl.program_id(0) * BM + tl.arange(0, BM)
    along = tl.arange(0, BD)
    here = rows < last
    at = rows[:, None].to(tl.int64) * BD + along[None, :]
    qh = tl.load(qh_pointer + at, mask=here[:, None], other=0.0)
    qm = tl.load(qm_pointer + at, mask=here[:, None], other=0.0)
    shift = tl.load(shift_pointer + rows, mask=here, other=-1e30)
    far = tl.zeros((BM,), tl.float64)
    for start in range(0, piece, BN):
        keys = begin + start + tl.arange(0, BN)
        # Keys are padded to whole pieces.
        of_keys = keys[:, None].to(tl.int64) * BD + along[None, :]
        kh = tl.load(kh_pointer + of_keys)
        km = tl.load(km_pointer + of_keys)
        x = tl.dot(qh, tl.trans(kh), tl.zeros((BM, BN), tl.float32))
        x = tl.dot(qh, tl.trans(km), x)
        x = tl.dot(qm, tl.trans(kh), x)
        x = x * scale + shift[:, None]
        if begin + start + BN > n_k:
            x = tl.where(keys[None, :] < n_k, x, -1e30)
        above = x > margin
        far += tl.sum(tl.where(above, 0.0, tl.exp2(x)), 1).to(tl.float64)
        if tl.max(x) > margin:
            # Rare once the bound is known: an atomic for each
            part = (tl.program_id(0) + (begin + start) // BN) % LISTS
            where = rows[:, None].to(tl.int64) * n_k + keys[None, :]
            place = tl.atomic_add(count_pointer + part + tl.zeros((BM, BN), tl.int32), 1, mask=above, sem="relaxed")
            tl.store(place_pointer + part.to(tl.int64) * n_k + place, where, mask=above & (place < n_k))
    tl.store(far_pointer + tl.program_id(1) * (last - first) + rows - first, far, mask=here)


def _split(x: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (n, d) in float32 as the sum of two bfloat16 numbers, padded with zeros to (rows, width)."""
    x = torch.nn.functional.pad(x.float(), (0, width - x.shape[1], 0, rows - len(x)))
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)


def largest_of(q: torch.Tensor, k: torch.Tensor, scale: float, row_terms: torch.Tensor) -> Largest:
    """The largest of scale <q_i, k_j> + row_terms_i: q (n_q, d), k (n_k, d), float64 row_terms (n_q,), all on CUDA."""
    (n_q, d), n_k, device = q.shape, len(k), q.device
    found = Largest(n_k, device)
    q64, k64 = q.double(), k.double()
    # What is common to all keys belongs to the rows: the kernel's rounding is relative to |q| |k|.
    mean = k64.mean(0)
    k64, row_terms = k64 - mean, row_terms + scale * (q64 @ mean)
    done = min(n_q, _FIRST)
    found.add_strip(torch.addmm(row_terms[:done, None], q64[:done], k64.mT, alpha=scale))
    if done == n_q:
        return found
    width = max(16, triton.next_power_of_2(d))
    # Pieces of whole tiles, of which one step or another takes 1, 2, 4, ... at a time
    most = 2 ** max(0, min(_PROGRAMS, n_k // (8 * _KEYS)).bit_length() - 1)
    shortest = -(-n_k // (most * _KEYS)) * _KEYS
    padded = most * shortest
    queries, keys = _split(q, n_q, width), _split(k64, padded, width)
    # A row fits into one list, so that a step of one row always does.
    places = torch.empty(_LISTS, n_k, dtype=torch.int64, device=device)
    counts = torch.zeros(_LISTS, dtype=torch.int32, device=device)
    longest = scale * float(q64.square().sum(1).max().sqrt() * k64.square().sum(1).max().sqrt())
    step = done
    while done < n_q:
        last, bound = min(n_q, done + step), found.bound
        counts.zero_()
        shift = (row_terms - bound) * _LOG2_E
        # Rounding of the three products and of the shift, in powers of two: far above what they can be.
        margin = _LOG2_E * 2.0**-15 * longest + 2.0**-20 * float(shift.abs().max()) + 1e-3
        programs = triton.cdiv(last - done, _ROWS)
        pieces = most
        while pieces * programs > _PROGRAMS:
            pieces //= 2
        piece = padded // pieces
        far = torch.empty(pieces, last - done, dtype=torch.float64, device=device)
        with torch.cuda.device(device):
            launched(
                _strip_kernel, (programs, pieces), *queries, *keys, shift.float(), far, counts, places, done, last,
                n_k, piece, scale * _LOG2_E, -margin, LISTS=_LISTS, BM=_ROWS, BN=_KEYS, BD=width,
            )  # fmt: skip
        listed = counts.tolist()
        if max(listed) > n_k:
            step //= 2
            continue
        at = torch.cat([places[i, :number] for i, number in enumerate(listed)])
        exact = [
            (q64[some // n_k] * k64[some % n_k]).sum(1) * scale + row_terms[some // n_k] for some in at.split(_ENTRIES)
        ]
        found.add(torch.cat(exact), far.sum().log() + bound)
        done, step = last, min(4 * step, _MOST_ROWS)
    return found
