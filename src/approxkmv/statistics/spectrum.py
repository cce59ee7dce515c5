"""Norms of D^-1 A in passes over strips of rows: of its columns, and its largest singular value."""

from __future__ import annotations

from types import ModuleType

import torch

from approxkmv.statistics.logits import Logits

# Logits of one strip of whole rows; a matrix that fits is computed once instead of in each pass.
STRIP = 2**21
# Passes between two checks of the singular value, the change at which it has converged, and the most passes.
EVERY = 4
UNCHANGED = 1e-3
PASSES = 96


class _Strips:
    """D^-1 A of some heads, strip by strip; kept in memory if it is one strip."""

    def __init__(self, form: ModuleType, logits: Logits, log_sums: torch.Tensor, heads: slice) -> None:
        self._form, self._logits, self._log_sums, self._heads = form, logits, log_sums, heads
        self._rows = [rows for group, rows in logits.pieces(logits.k.shape[1], STRIP) if group == heads]
        self._kept: torch.Tensor | None = None

    def __iter__(self):
        if self._kept is not None:
            yield self._kept
            return
        for rows in self._rows:
            tile = self._logits.tile(self._heads, rows, slice(0, self._logits.k.shape[1]))
            if tile is None:
                continue
            # Rows without a key have an infinite sum here. Clamped values are 0 in float32, and slow to compute with.
            tile -= self._log_sums[self._heads, rows].to(tile.dtype).unsqueeze(2)
            weights = tile.clamp_min_(-80.0 if tile.dtype == torch.float32 else -700.0).exp_()
            if len(self._rows) == 1:
                self._kept = weights = weights.clone()
            yield weights

    def keep(self, heads: torch.Tensor) -> None:
        """Go on with these heads alone, bool; several heads are always in memory."""
        if self._kept is not None:
            self._kept = self._kept[heads]

    def gram(self, x: torch.Tensor, squares: torch.Tensor | None = None) -> torch.Tensor:
        """P^T P x for x (heads, n_k); adds the columns' sums of squares to `squares`, float64."""
        out = torch.zeros_like(x)
        for weights in self:
            self._form.add_gram(weights, x, out)
            if squares is not None:
                squares += weights.square().sum(1)
        return out


def column_norm_and_stable_rank(
    form: ModuleType, logits: Logits, log_sums: torch.Tensor, log_largest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per head n_q max_j |P e_j|^2 and |P|_F^2 / |P|_2^2 of P = D^-1 A, float64; 0 if P has no entries.

    form: `rows` or `row_loops`. log_sums: (heads, n_q) float64, the logarithms of D; infinite for a row without keys.
    log_largest: (heads,) the logarithm of each head's largest weight, by which P is divided: where sinks take nearly
    all, the squares of what is left to the keys would underflow.
    """
    n_q, n_k = logits.q.shape[1], logits.k.shape[1]
    norms, ranks = [], []
    for heads in dict.fromkeys((group.start, group.stop) for group, _ in logits.pieces(n_k, STRIP)):
        strips = _Strips(form, logits, log_sums + log_largest.unsqueeze(1), slice(*heads))
        squares = log_sums.new_zeros(heads[1] - heads[0], n_k)
        largest = _largest_eigenvalue(strips, squares)
        norms.append(n_q * squares.amax(1))
        whole = squares.sum(1)
        ranks.append(torch.where(largest > 0, whole / largest, 0.0))
    empty = log_sums.new_zeros(0)
    return torch.cat([empty, *norms]) * (2 * log_largest).exp(), torch.cat([empty, *ranks])


def _largest_eigenvalue(strips: _Strips, squares: torch.Tensor) -> torch.Tensor:
    """|P|_2^2 of each head by Lanczos' method on P^T P, from below; fills `squares` with the columns' sums of squares.

    P is non-negative, so P^T P has a non-negative leading eigenvector (Perron and Frobenius), and the vector of ones,
    with which the iteration starts, is never nearly orthogonal to it: their cosine is at least 1/sqrt(n).
    """
    heads, n = squares.shape
    kind = strips._logits.q.dtype
    basis = [squares.new_full((heads, n), n**-0.5).to(kind)]
    steps = min(PASSES, n)
    matrix = squares.new_zeros(heads, steps + 1, steps + 1)
    # Each head ends at its own step, so that its answer does not depend on the heads that are computed with it.
    answer = squares.new_zeros(heads)
    left = torch.arange(heads, device=squares.device)
    before, settled = squares.new_zeros(heads), torch.zeros(heads, dtype=torch.bool, device=squares.device)
    for step in range(steps):
        image = strips.gram(basis[-1], None if step else squares).double()
        matrix[:, step, step] = torch.linalg.vecdot(image, basis[-1].double())
        whole = torch.stack(basis, 1).double()
        # Twice, since otherwise the remains of earlier directions would grow from pass to pass.
        for _ in range(2):
            image -= torch.einsum("hsn,hs->hn", whole, torch.einsum("hsn,hn->hs", whole, image))
        length = torch.linalg.vector_norm(image, dim=1)
        # Only rounding is left: the space that the iteration can reach is exhausted.
        length = torch.where(length > 1e-6 * matrix[:, 0, 0], length, 0.0)
        if step % EVERY == EVERY - 1:
            found = torch.linalg.eigvalsh(matrix[:, : step + 1, : step + 1])[:, -1]
            # Twice in a row: a second singular value near the first may hold the iteration up for a while.
            was_settled, settled = settled, found - before <= UNCHANGED * found
            answer[left] = before = found
            goes_on = ~(settled & was_settled)
            if not bool(goes_on.any()):
                return answer
            if not bool(goes_on.all()):
                strips.keep(goes_on)
                left, before, settled, matrix, image, length, *basis = (
                    values[goes_on] for values in (left, before, settled, matrix, image, length, *basis)
                )
        if not bool(length.any()):
            break
        matrix[:, step, step + 1] = matrix[:, step + 1, step] = length
        basis.append(torch.where(length > 0, 1 / length, 0.0).unsqueeze(1).mul(image).nan_to_num_(0.0).to(kind))
    answer[left] = torch.linalg.eigvalsh(matrix[:, : len(basis), : len(basis)])[:, -1]
    return answer
