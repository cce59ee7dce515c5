"""KernelOperator: products with a Gaussian kernel matrix to within a given error, which is checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count as count_from
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from approxkmv.arrays import Array, as_float64, tensor_of
from approxkmv.compute.counting import count, counting
from approxkmv.compute.drawing import drawn
from approxkmv.compute.memory import free_bytes
from approxkmv.compute.torch_state import plain_torch
from approxkmv.compute.trial import fastest_dtype
from approxkmv.errors import InputError
from approxkmv.kmv import inputs
from approxkmv.operator import exact
from approxkmv.operator.bar import ErrorBar, error_bar, proposal
from approxkmv.operator.blocks import KEPT, ONE_IN, STRIP, Blocks, Plan, make_blocks
from approxkmv.operator.linear import of_blocks, of_points
from approxkmv.operator.pilot import WORTH, Pilot, cost_of_blocks, may_be_worth, near_for, pilot_of, pilot_rows
from approxkmv.operator.points import Points, in_units
from approxkmv.operator.report import Clock, Report

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

METHODS = ("auto", "exact", "blocks")
RELATIVE_TO = ("Kx", "x")
CONFIDENCE = 0.95
# Rows that the error bar draws: at least, and one in so many of all, up to a limit; all where keys are so few.
_BAR_ROWS, _ONE_IN, _MOST_BAR_ROWS, _FEW_KEYS = 256, 100, 384, 32
# The error at which settings aim, relative to epsilon: the bound is above the error, and the pilot is noisy.
_AIM = 0.8
# The share of the doubt at which bounds are computed: contributions are more skewed than their samples show.
_NOMINAL = 0.02
# How often a product is made, each time with twice as many near keys, before it is made exactly.
_ATTEMPTS = 3
# Plans that are kept: the first, which every pilot tries, and the latest.
_PLANS = 2
# Below this epsilon the rounding of float32 could show.
_FLOAT32 = 1e-5


class KernelOperator:
    """The matrix K_ij = exp(-|q_i - k_j|^2 / (2 sigma^2)) as an operator: K @ x to within epsilon, with an error bar.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> queries, keys, x = (torch.randn(n, d, generator=generator) for n, d in ((3000, 8), (4000, 8), (4000, 1)))
    >>> K = KernelOperator(queries, keys, sigma=2.0, epsilon=0.1, seed=0)
    >>> y = K @ x
    >>> tuple(y.shape), K.last.error < 0.1
    ((3000, 1), True)

    Blocks of near-by queries share a list of near keys, which are summed exactly for each query; the other keys are
    seen from the block's centre, to first order. The result is deterministic given the seed, and biased: the error
    is measured, not averaged away. A pilot, in which at most 2 % of K or 16 of its rows are evaluated, finds how many
    near keys epsilon takes, or that the exact product is cheaper. Then rows that did not tune anything are drawn, in
    equal parts uniformly, in proportion to the predicted sizes of their errors and to the squares of these (a far sum,
    times how much its exponents vary from the block's centre), and computed exactly: they give
    `last.error` and `last.bound`. If the bound exceeds epsilon the product is made again with more near keys, and at
    last exactly.

    `last.bound` holds with the stated confidence, 95 %, under one assumption: what the sample sees is what there is.
    That is, no few rows carry much of the squared error while the proposal rarely draws them. Where the sample itself
    shows such rows, or no error at all, the bound is unknown (None). Clustering, what ranks the keys and predicted
    sizes are made once and used for every x.

    Args:
        queries: (n_q, d). keys: (n_k, d). Torch tensors (on a CPU or CUDA) or NumPy arrays, of one kind.
        sigma: the bandwidth.
        epsilon: the error, |Kx - y| <= epsilon |Kx| over all columns, below 1; or epsilon |x| with relative_to="x".
        method: "auto", "exact" (in bfloat16 if a trial found that faster here and epsilon allows it), or "blocks",
            which never falls back.
        seed: of everything random; None draws one.
    Attributes:
        last: a Report of the last product. shape: (n_q, n_k).
    Raises:
        InputError: shapes, kinds or devices that do not fit, a value that is not finite, sigma or epsilon out of
        range, too little memory.
    Source: the idea is that of Indyk, Kapralov, Sheth & Wagner (ICLR 2025): heavy entries exactly, the others
    approximately; `approx_kmv` is their algorithm as printed.
    """

    def __init__(
        self,
        queries: Array,
        keys: Array,
        sigma: float,
        epsilon: float = 0.05,
        relative_to: str = "Kx",
        method: str = "auto",
        seed: int | None = None,
    ) -> None:
        self.epsilon = inputs.positive(epsilon, "epsilon")
        self.relative_to = inputs.choice(relative_to, "relative_to", RELATIVE_TO)
        if relative_to == "Kx" and epsilon >= 1:
            raise InputError(f"epsilon is {epsilon!r}: relative to Kx it must be below 1, the error of y = 0")
        self.method = inputs.choice(method, "method", METHODS)
        width = inputs.positive(sigma, "sigma")
        q, k = _points(queries, keys)
        self.shape = len(q), len(k)
        self._numpy = isinstance(queries, np.ndarray)
        self._answers = torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32
        self._same = queries is keys or (q.shape == k.shape and bool((q == k).all()))
        self._seed = int(inputs.seed_sequence(seed).generate_state(1, np.uint64)[0] >> 1)
        points = in_units(q, k, width, torch.float64)
        largest = float(max(points.query_halves.max(), points.key_halves.max()))
        if not largest < 1e12:
            raise InputError(f"the points lie more than a million bandwidths apart at sigma = {sigma!r}: rescale them")
        # In float32 exponents err by about this much.
        coarse = max(2.0**-22 * largest, _FLOAT32) <= self.epsilon / 4
        self._points = points.to(torch.float32) if coarse else points
        self._exact_points = points
        self._low = _exponents(self._points)
        self._prepared: tuple[Blocks, torch.Tensor] | None = None
        self._plans: dict[int, Plan] = {}
        self._products = 0
        self.last: Report | None = None

    @plain_torch()
    def __matmul__(self, x: Array) -> Array:
        """Kx for x (n_k,) or (n_k, m): (n_q,) or (n_q, m), of the points' kind.

        In float64 if the points or one of them are, or if all of it is too small for float32.
        """
        values, back = self._columns(x)
        # Squares of very small or large entries would leave float32.
        size = float(values.abs().max()) or 1.0
        with counting() as counts:
            y, report = self._product(values / size)
        self.last = replace(report, kernel_evaluations=counts.kernel_evaluations)
        return back(y.double() * size)

    @plain_torch()
    def as_linear_operator(self) -> LinearOperator:
        """The operator with frozen settings and near keys as a scipy LinearOperator, for its solvers.

        A matrix of its own, close to K: linear in x and, where queries and keys are the same, made symmetric as the
        mean with its transpose, both up to rounding (1e-6 in float32), which eigensolvers and conjugate gradients
        need. It may have small negative eigenvalues. The settings are those of the last product, so make one with a
        vector like those to come; without one, those that epsilon takes for a vector of ones. Products have no error
        bar. After an exact last product it is K itself. Vectors are rounded to its dtype: in float32, 1e-46 is 0.

        Raises:
            UnavailableError: scipy is not installed.
        """
        if self.last is None:
            ones = torch.ones(self.shape[1], dtype=torch.float64, device=self._points.keys.device)
            self @ (ones.numpy() if self._numpy else ones)
        assert self.last is not None
        if self.last.near is None:
            return of_points(self._exact_points if self.last.exponents == "float64" else self._points)
        blocks, _ = self._blocks()
        return of_blocks(blocks, self._plan(blocks, self.last.near), self._same)

    def _columns(self, x: Array) -> tuple[torch.Tensor, Any]:
        if isinstance(x, np.ndarray) != self._numpy:
            raise InputError("x and the points are of different kinds: give torch tensors or NumPy arrays for both")
        values = as_float64(x, "x")
        n_k = self.shape[1]
        if values.ndim not in (1, 2) or len(values) != n_k or 0 in values.shape:
            raise InputError(f"x has shape {tuple(values.shape)}: it needs one row per key, ({n_k},) or ({n_k}, m)")
        if values.device != self._points.keys.device:
            raise InputError(f"x is on {values.device}, the points are on {self._points.keys.device}: move one of them")
        if not float(values.abs().max()) < 1e30:
            raise InputError("x has an entry of 1e30 or more: scale it down")

        def back(y: torch.Tensor) -> Array:
            shaped = y[:, 0] if values.ndim == 1 else y
            if not 0 < float(shaped.abs().max()) < torch.finfo(torch.float32).tiny:
                shaped = shaped.to(self._answers)
            return shaped.numpy() if self._numpy else shaped

        return values if values.ndim == 2 else values.unsqueeze(1), back

    def _blocks(self) -> tuple[Blocks, torch.Tensor]:
        """The blocks, and predicted sizes of the rows' errors; made once."""
        if self._prepared is None:
            n_k = self.shape[1]
            # Weights and logs of a strip of blocks and its lists of near keys; the plans that are kept and one more, of
            # at most so many blocks, each with weights of all keys and an int64 list of up to half of them
            n_q, size = self.shape[0], self._points.keys.element_size()
            most = min(n_q, int(4 * max(self.shape) ** 0.5) + n_q // ONE_IN)
            plans = (_PLANS + 1) * min(KEPT, most * n_k * (size + 4))
            needed = STRIP * n_k * (8 + 3 * size) + 8 * self._points.keys.numel() * size + plans
            free = free_bytes(self._points.keys.device)
            if needed > free:
                raise InputError(f"{n_k} keys need {needed >> 20} MiB, and {free >> 20} MiB are free: give fewer keys")
            blocks, plan = make_blocks(self._points, self._low, self._seed)
            self._plans[plan.near] = plan
            self._prepared = blocks, blocks.doubts(plan)
        return self._prepared

    def _plan(self, blocks: Blocks, near: int) -> Plan:
        if blocks.sizes_of_x is not None:
            return blocks.plan(near)
        if near not in self._plans:
            if len(self._plans) == _PLANS:
                self._plans.popitem()
            self._plans[near] = blocks.plan(near)
        return self._plans[near]

    def _product(self, x64: torch.Tensor) -> tuple[torch.Tensor, Report]:
        """y (n_q, m) and its report, in which all evaluations are still those of the pilot."""
        self._products += 1
        # The seed itself is that of the blocks.
        generator = torch.Generator().manual_seed(self._seed + self._products)
        seconds: dict[str, float] = {}
        clock = Clock(seconds, x64.device)
        n_q, n_k = self.shape
        x = x64.to(self._points.keys.dtype)
        if not bool(x.any()):
            nothing = ErrorBar(0.0, 0.0, 0.0, 0.0)
            return x.new_zeros(n_q, x.shape[1]), self._report("zero", "x is 0", nothing, (1.0, 1.0), seconds)
        with clock("preparation"):
            blocks, doubts = (None, x.new_ones(n_q))
            if self.method == "blocks" or (self.method == "auto" and may_be_worth(n_q, n_k)):
                blocks, doubts = self._blocks()
        with clock("pilot"), counting() as tuning:
            by = proposal(doubts, torch.empty(0, dtype=torch.int64))
            rows = drawn(by, pilot_rows(n_q), generator).to(x.device)
            pilot = pilot_of(by, rows, lambda some: exact.product(self._points, x, self._points.keys.dtype, some))
            scale = float(x.norm()) if self.relative_to == "x" else pilot.norm(pilot.exact)
            target = self.epsilon * scale
        choices = self._choices(pilot, blocks, x, target)
        evaluations = tuning.kernel_evaluations
        for attempt in count_from(0):
            with clock("pilot"), counting() as tuning:
                following = next(choices, None)
            evaluations += tuning.kernel_evaluations
            if following is None:
                break
            choice = following
            with clock("product"):
                y = self._made(choice, x64 if choice.low == torch.float64 else x)
            if not choice.in_full:
                # Known exactly, and never drawn again
                y[rows] = pilot.exact
            with clock("error bar"):
                bar = self._bar(x64, y, doubts, rows, generator, _NOMINAL * (1 - CONFIDENCE) * 0.5**attempt, choice)
            norms = (float(x.norm()),) * 2 if self.relative_to == "x" else (bar.answer, bar.least_answer)
            if bar.bound is not None and bar.bound <= self.epsilon * norms[1]:
                break
            if choice.in_full and bar.error <= self.epsilon * norms[0]:
                break
        report = self._report(choice.method, choice.reason, bar, norms, seconds)
        return y, replace(
            report,
            fell_back=choice.fell_back,
            near=choice.near,
            blocks=len(blocks) if blocks is not None and choice.near else None,
            exponents=str(choice.low)[6:],
            pilot_evaluations=evaluations,
        )

    def _choices(self, pilot: Pilot, blocks: Blocks | None, x: torch.Tensor, target: float) -> Iterator[_Choice]:
        """What to try, in this order, until epsilon is met; what finds it out is computed when its turn comes."""
        full = self._points.keys.dtype
        aim = _AIM * target
        if self.method == "auto":
            if pilot.norm(pilot.exact) <= aim:
                yield _Choice("zero", "y = 0 meets epsilon", full)
            elif pilot.norm(pilot.exact - pilot.constant) <= aim:
                yield _Choice("constant", "the mean of the answer meets epsilon", full, constant=pilot.constant)
        reason, near, made = "asked for", None, None
        if blocks is not None:
            ranked = blocks.ranked_by(x)
            most = float("inf") if self.method == "blocks" else WORTH * float(np.prod(self.shape))
            near, reason, made = near_for(pilot, ranked, self._plan, x, aim, target / self.epsilon, most)
            if self.method == "blocks" and near is None:
                near = self.shape[1] // 4
            for more in range(_ATTEMPTS):
                wanted = self.shape[1] if near is None else near << more
                if wanted < self.shape[1] / 2 and cost_of_blocks(ranked, wanted) < most:
                    yield _Choice("blocks", reason, self._low, near=wanted, blocks=ranked, made=made)
                    made = None
        elif self.method != "exact":
            reason = "there are so few queries or keys that exact is cheaper"
        if self.method != "blocks":
            worse = self.method == "auto" and blocks is not None
            why = f"blocks miss epsilon or cost more than {WORTH} of the exact product: {reason}" if worse else reason
            in_full = _Choice("exact", why, full, fell_back=worse, in_full=True)
            if self._low != full:
                error = pilot.norm(exact.product(self._points, x, self._low, pilot.rows) - pilot.exact)
                if error <= 0.5 * aim:
                    yield replace(in_full, low=self._low, in_full=False)
            yield in_full
            if full != torch.float64:
                # So little is left of sums that cancel, or of entries that underflow, that rounding shows.
                yield replace(in_full, low=torch.float64, reason=f"float32 misses epsilon: {why}")

    def _made(self, choice: _Choice, x: torch.Tensor) -> torch.Tensor:
        if choice.made is not None:
            return choice.made
        y = x.new_zeros(self.shape[0], x.shape[1])
        if choice.constant is not None:
            y += choice.constant
        elif choice.blocks is not None:
            plan = self._plan(choice.blocks, choice.near or 1)
            y[choice.blocks.order] = choice.blocks.products(plan, x)[0]
        elif choice.method == "exact":
            points = self._exact_points if choice.low == torch.float64 else self._points
            y = exact.product(points, x, choice.low)
        return y

    def _bar(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        doubts: torch.Tensor,
        known: torch.Tensor,
        generator: torch.Generator,
        doubt: float,
        choice: _Choice,
    ) -> ErrorBar:
        everything = torch.arange(self.shape[0], device=x.device)
        kept = torch.promote_types(choice.low, self._points.keys.dtype)
        if len(known.unique()) == len(everything) or (self.shape[1] <= _FEW_KEYS and not choice.in_full):
            # Exact, to rounding
            values = self._values(x, everything, kept)
            error, answer = float((values - y).norm()), float(values.norm())
            return ErrorBar(error, error, answer, answer)
        # The rows of the pilot are rounded as all others of an exact product.
        by = proposal(doubts if choice.near else y.norm(dim=1), known[:0] if choice.in_full else known)
        number = max(_BAR_ROWS, min(_MOST_BAR_ROWS, len(everything) // _ONE_IN))
        rows = drawn(by, _BAR_ROWS if choice.in_full else number, generator).to(x.device)
        distinct, place = rows.unique(return_inverse=True)
        bar = error_bar(y, self._values(x, distinct, kept if choice.in_full else None)[place], rows, by, doubt)
        # Where so little is seen, the rounding of float32 is part of it.
        margin = bar.error if bar.bound is None else min(bar.error, bar.bound - bar.error)
        if margin <= _FLOAT32 * bar.answer and not choice.in_full:
            bar = error_bar(y, self._values(x, distinct, kept)[place], rows, by, doubt)
        return bar

    def _values(self, x: torch.Tensor, rows: torch.Tensor, than: torch.dtype | None) -> torch.Tensor:
        """Exact rows; with more digits than products in this type: those of float64, or distances by differences."""
        if than == torch.float64:
            queries, keys = self._exact_points.queries[rows], self._exact_points.keys
            distances = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
            count(kernel_evaluations=distances.numel())
            return (-0.5 * distances.square()).exp2_() @ x
        points = self._exact_points if than is not None else self._points
        return exact.product(points, x.to(points.keys.dtype), points.keys.dtype, rows)

    def _report(
        self, method: str, reason: str, bar: ErrorBar, norms: tuple[float, float], seconds: dict[str, float]
    ) -> Report:
        """norms: what the error is relative to, and what its bound is relative to."""

        def relative(value: float, norm: float) -> float | None:
            return value / norm if norm > 0 else 0.0 if value == 0 else None

        error = relative(bar.error, norms[0])
        bound = None if bar.bound is None else relative(bar.bound, norms[1])
        known = float("inf") if error is None else error, bound, CONFIDENCE, self.relative_to, self.epsilon
        return Report(method, reason, *known, False, None, None, str(self._points.keys.dtype)[6:], 0, 0, seconds)


@dataclass(frozen=True)
class _Choice:
    """A way of making a product."""

    method: str
    reason: str
    low: torch.dtype
    near: int | None = None
    blocks: Blocks | None = None
    constant: torch.Tensor | None = None
    made: torch.Tensor | None = None
    """The product, where the pilot has made it."""
    fell_back: bool = False
    in_full: bool = False
    """Whether it is the exact product but for the rounding of its type."""


def _points(queries: Array, keys: Array) -> tuple[torch.Tensor, torch.Tensor]:
    inputs.same_kind(queries, "queries", keys, "keys")
    for array, name in ((queries, "queries"), (keys, "keys")):
        inputs.matrix(array, name)
    q, k = (tensor_of(t) if isinstance(t, np.ndarray) else t.detach() for t in (queries, keys))
    if q.shape[1] != k.shape[1]:
        raise InputError(f"queries {tuple(q.shape)} and keys {tuple(k.shape)} differ in width d")
    if q.device != k.device:
        raise InputError(f"queries are on {q.device} and keys on {k.device}: move one of them")
    return q, k


def _exponents(points: Points) -> torch.dtype:
    """The format of exponents where not every digit counts."""
    if points.keys.dtype != torch.float32:
        return points.keys.dtype
    if points.keys.device.type == "cuda":
        return torch.bfloat16
    return fastest_dtype("operator.trials.exponents")
