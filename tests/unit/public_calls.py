"""Every public function that takes queries and keys, wrapped as a call with q, k and v, for tests of all of them."""

import dataclasses
from functools import partial
from unittest.mock import patch

import numpy as np
import torch

from approxkmv import (
    KernelOperator,
    approx_attention,
    approx_kmv,
    attention_statistics,
    head_to_tail_ratios,
    log_kernel,
    order_ratios,
    reduce_attention,
    top_eigenvalue,
)
from approxkmv.attention import get, methods
from approxkmv.attention.blocks import chunks
from approxkmv.attention.searched.knn_gradients import knn_attention
from approxkmv.kmv.density import DensityLevels, ExactDensity, HashingBasedDensity, UniformDensity
from approxkmv.kmv.heavy import find_heavy
from approxkmv.kmv.spectral_attention import spectral_attention
from approxkmv.search.doubling_dimension import doubling_dimension
from approxkmv.search.vamana import build, build_exhaustively
from approxkmv.statistics.heads import head_statistics, unmasked_and_masked_statistics
from approxkmv.statistics.streaming import length_statistics

# Settings that approximate 96 keys, as `of_method` calls these
FEW = {name: {"block": 16, "near": 12} for name in ("approxkmv", "local-expansion")}
FEW["window"] = {"window": 12, "sinks": 4}


def of_method(name, q, k, v, scale=None, causal=False):
    method = get(name)
    # Chunks of 32 queries
    with patch.object(chunks, "EXACT_BELOW", 16):
        return (method.attend_causally if causal else method)(q, k, v, scale=scale, seed=3, **FEW.get(name, {}))


METHODS = {name: partial(of_method, name) for name in methods()}
METHODS |= {f"{name}, causal": partial(of_method, name, causal=True) for name in methods() if get(name).causal}


def of_kmv(q, k, v, scale=None):
    return approx_kmv(q[0], k[0], v[0, :, 0], sigma=1.0 if scale is None else scale**-0.5, epsilon=0.5, seed=1).y


def of_spectral_attention(q, k, v, scale=None):
    return spectral_attention(q[0], k[0], v[0], 40, scale=scale, seed=1, density=lambda seed: ExactDensity(1.0)).output


def of_density(kind, q, k, v, scale=None):
    sigma = 1.0 if scale is None else scale**-0.5
    return kind(sigma).fit(k[0]).query(q[0])


def of_graph(make, q, k, v, scale=None):
    found = make(k[0]).search(q[0], 5, 8)
    return found.keys, found.distances.clamp_max(1e38)


def of_practical_graph(k):
    return build(k, alpha=1.2, degree=8, beam=8, generator=torch.Generator().manual_seed(1))


def of_attention(q, k, v, scale=None, dtype="float32"):
    found = attention_statistics(q, k, scale=scale, mask="causal", sinks=v[:, 0, 0], dtype=dtype)
    names = ("entropy", "mean_entropy", "entropy_quantiles", "support", "largest_weight", "first_mass", "sink_mass")
    names += ("keys_per_share", "ratio", "softmax_ratio", "log_next", "log_double", "column_norm", "stable_rank")
    return [getattr(found, name) for name in names]


NUMERIC = {
    "attention_statistics": of_attention,
    "attention_statistics in float64": partial(of_attention, dtype="float64"),
    "reduce_attention": lambda q, k, v, scale=None: reduce_attention(q, k, scale),
    "log_kernel": lambda q, k, v, scale=None: log_kernel(q, k, scale),
    "head_to_tail_ratios": lambda q, k, v, scale=None: head_to_tail_ratios(q, k, 10, scale),
    "order_ratios": lambda q, k, v, scale=None: order_ratios(q, k, scale),
    "head_statistics": lambda q, k, v, scale=None: head_statistics(q, k, 10, scale),
    "both masks": lambda q, k, v, scale=None: unmasked_and_masked_statistics(q, k, 10, scale),
    "length_statistics": lambda q, k, v, scale=None: length_statistics(q, k, scale, causal=True),
    "approx_kmv": of_kmv,
    "KernelOperator": lambda q, k, v, scale=None: (
        KernelOperator(q[0], k[0], 1.0 if scale is None else scale**-0.5, method="blocks", seed=1) @ v[0]
    ),
    "approx_attention": lambda q, k, v, scale=None: approx_attention(q, k, v, 0.5, scale=scale, seed=1),
    "top_eigenvalue": lambda q, k, v, scale=None: top_eigenvalue(k[0], 1.0, 0.5, seed=1, iterations=2).value,
    "spectral_attention": of_spectral_attention,
    "find_heavy": lambda q, k, v, scale=None: (
        find_heavy(q[0], k[0], sigma=1.0 if scale is None else scale**-0.5, seed=1).log_values
    ),
    "exact density": partial(of_density, ExactDensity),
    "uniform density": partial(of_density, lambda sigma: UniformDensity(sigma, samples=20, seed=1)),
    "hashing-based density": partial(of_density, lambda sigma: HashingBasedDensity(sigma, samples=20, seed=1)),
    "density levels": partial(
        of_density, lambda sigma: DensityLevels(sigma, relative_error=0.5, floor=0.1, failure=0.1, seed=1)
    ),
    "graph": partial(of_graph, of_practical_graph),
    "graph with a guarantee": partial(of_graph, partial(build_exhaustively, alpha=1.2)),
    "doubling_dimension": lambda q, k, v, scale=None: doubling_dimension(k[0], centres=None),
}
TRAINED = {"knn_attention": lambda q, k, v, scale=None: knn_attention(q, k, v, scale=scale, seed=1)}
CALLS = METHODS | NUMERIC | TRAINED


def numbers(answer):
    """All numbers of an answer as one float64 tensor."""
    if dataclasses.is_dataclass(answer):
        answer = [getattr(answer, field.name) for field in dataclasses.fields(answer)]
    if isinstance(answer, (list, tuple)):
        return torch.cat([numbers(part) for part in answer])
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().double().numpy()
    return torch.from_numpy(np.array(answer, dtype=np.float64)).flatten()


def inputs(n=96, d=8, d_v=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, w, generator=generator, dtype=torch.float32).to(dtype) for w in (d, d, d_v)]
