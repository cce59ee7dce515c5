"""Densities of 100,000 word vectors: python benchmarks/density.py

The sums of a Gaussian kernel over 100,000 word vectors (d = 100) at 1,000 and 10,000 others, by KernelOperator, by
torch in float32 and, at 1,000, by scikit-learn's KernelDensity, on one thread. KernelOperator's first product, which
makes the blocks, is timed apart, once its loops are compiled. Writes results/benchmarks/density.csv and .json; --out
changes the name.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.neighbors import KernelDensity
from writing import out_of, write

from approxkmv.config import load_config, study_of
from approxkmv.operator.kernel_operator import KernelOperator
from approxkmv.operator.points import in_units
from approxkmv.steps.operator import REFERENCE, blocked
from approxkmv.sweep.word_vectors import fetch_vectors, word_vectors

POINTS, QUERIES, SIGMA, EPSILONS, REPEATS = 100_000, (1000, 10_000), 1.778, (0.05, 0.15), 3


def seconds_of(product: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """The median time of some runs, and the last answer."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        answer = product()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), np.asarray(answer, np.float64)


def main() -> None:
    """Run everything, print a table and write it."""
    out = out_of(__doc__, "density")
    config = load_config(Path("config.yaml"))
    settings = study_of(config, "operator").operator
    assert settings is not None
    assert settings.path is not None
    vectors = word_vectors(str(fetch_vectors(settings.path, settings.sha256, Path(config.cache) / "vectors")))
    vectors = np.random.default_rng(0).permutation(vectors)[: POINTS + max(QUERIES)]
    keys, others = vectors[:POINTS], vectors[POINTS:]
    torch.set_num_threads(1)
    rows = []
    for count in QUERIES:
        queries, ones = others[:count], np.ones(POINTS, np.float32)
        points = in_units(torch.from_numpy(queries), torch.from_numpy(keys), SIGMA, torch.float32)
        plain, truth = seconds_of(lambda p=points, x=ones: blocked(p, torch.from_numpy(x)).numpy(), REPEATS)
        rows.append({"queries": count, "method": REFERENCE, "seconds": plain, "error": 0.0})
        for epsilon in EPSILONS:
            new = partial(KernelOperator, queries, keys, SIGMA, epsilon, seed=0)
            operator = new()
            operator @ ones  # compiles the loops
            first, _ = seconds_of(lambda n=new, x=ones: n() @ x, REPEATS)
            taken, found = seconds_of(lambda o=operator, x=ones: o @ x, REPEATS)
            last = operator.last
            assert last is not None
            rows.append({"queries": count, "method": f"KernelOperator, epsilon {epsilon:g}", "seconds": taken})
            rows[-1]["seconds_first"] = first
            rows[-1] |= {"error": np.linalg.norm(found - truth) / np.linalg.norm(truth), "bound": last.bound}
            rows[-1] |= {"way": last.method, "evaluated": last.kernel_evaluations / (count * POINTS)}
        if count == min(QUERIES):
            trees = KernelDensity(bandwidth=SIGMA, rtol=EPSILONS[0], atol=0).fit(keys)
            taken, logs = seconds_of(lambda t=trees, q=queries: t.score_samples(q), 1)
            found = np.exp(logs + np.log(POINTS) + 50 * np.log(2 * np.pi * SIGMA**2))
            rows.append({"queries": count, "method": f"scikit-learn, rtol {EPSILONS[0]:g}", "seconds": taken})
            rows[-1]["error"] = np.linalg.norm(found - truth) / np.linalg.norm(truth)
    table = pd.DataFrame(rows)
    plainly = table.groupby("queries")["seconds"].transform("first")
    table["times_faster"], table["times_faster_first"] = plainly / table["seconds"], plainly / table["seconds_first"]
    write(out, table, {"points": POINTS, "sigma": SIGMA, "repeats": REPEATS, "threads": 1})
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))


if __name__ == "__main__":
    main()
