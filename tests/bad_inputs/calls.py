"""Calls of the Python interface that it cannot serve: each raises one of the exceptions of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

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
)
from approxkmv import top_eigenvalue as eigenvalue
from approxkmv.attention import get, methods
from approxkmv.attention.searched.knn_gradients import knn_attention
from approxkmv.kmv.constants import PaperConstants
from approxkmv.kmv.heavy import find_heavy
from approxkmv.kmv.spectral_attention import spectral_attention
from approxkmv.search.doubling_dimension import doubling_dimension
from approxkmv.search.vamana import build, build_exhaustively
from approxkmv.statistics import head_statistics, unmasked_and_masked_statistics
from approxkmv.statistics.streaming import length_statistics
from bad_inputs import Case, python_call

Call = Callable[..., object]
Arguments = Callable[[], dict[str, Any]]


def points(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def holding(value: float, *shape: int) -> torch.Tensor:
    array = points(*shape)
    array.view(-1)[-1] = value
    return array


def changed(call: Call, arguments: Arguments, change: Mapping[str, Any], folder: Path) -> tuple[int, str]:
    given = arguments() | change
    return python_call(lambda: call(**given))


def cases(name: str, call: Call, arguments: Arguments, changes: Mapping[str, Mapping[str, Any]]) -> list[Case]:
    """One call with each of the changes, which are named by what is wrong."""
    return [
        Case("Python calls", f"{name}: {what}", partial(changed, call, arguments, change))
        for what, change in changes.items()
    ]


NAN, INFINITY = float("nan"), float("inf")


# Methods: what all share is asked of one.
def of_a_method() -> dict[str, Any]:
    return {"q": points(2, 20, 4), "k": points(2, 30, 4), "v": points(2, 30, 3), "scale": 0.5, "seed": 0}


SHARED: dict[str, dict[str, Any]] = {
    "q without a batch": {"q": points(20, 4)},
    "q with a dimension too many": {"q": points(1, 2, 20, 4)},
    "k without rows": {"k": points(2, 0, 4), "v": points(2, 0, 3)},
    "q without rows": {"q": points(2, 0, 4)},
    "no batch": {"q": points(0, 20, 4), "k": points(0, 30, 4), "v": points(0, 30, 3)},
    "no width": {"q": points(2, 20, 0), "k": points(2, 30, 0)},
    "v without columns": {"v": points(2, 30, 0)},
    "another width": {"k": points(2, 30, 5)},
    "another batch": {"k": points(1, 30, 4)},
    "a value too few": {"v": points(2, 29, 3)},
    "a NaN in q": {"q": holding(NAN, 2, 20, 4)},
    "a NaN in k": {"k": holding(NAN, 2, 30, 4)},
    "a NaN in v": {"v": holding(NAN, 2, 30, 3)},
    "an infinity in q": {"q": holding(INFINITY, 2, 20, 4)},
    "an infinity in k": {"k": holding(-INFINITY, 2, 30, 4)},
    "an infinity in v": {"v": holding(INFINITY, 2, 30, 3)},
    "infinities of both signs": {"v": torch.cat([holding(INFINITY, 1, 30, 3), holding(-INFINITY, 1, 30, 3)])},
    "a NaN in bfloat16": {
        "q": holding(NAN, 2, 20, 4).bfloat16(),
        "k": points(2, 30, 4).bfloat16(),
        "v": points(2, 30, 3).bfloat16(),
    },
    "whole numbers": {"q": torch.ones(2, 20, 4, dtype=torch.long)},
    "complex numbers": {"q": points(2, 20, 4).to(torch.complex64)},
    "two types": {"k": points(2, 30, 4).bfloat16()},
    "a NumPy array": {"q": points(2, 20, 4).numpy()},
    "arrays with masks": {name: np.ma.masked_less(points(2, 20, 4).numpy(), 0) for name in "qkv"},
    "a list": {"q": points(2, 20, 4).tolist()},
    "None": {"v": None},
    "another device": {"v": torch.empty(2, 30, 3, device="meta")},
    "keys of 1e30": {"k": 1e30 * points(2, 30, 4)},
    "values of 1e30": {"v": 1e30 * points(2, 30, 3)},
    "scale 0": {"scale": 0.0},
    "a negative scale": {"scale": -1.0},
    "a scale that is NaN": {"scale": NAN},
    "an infinite scale": {"scale": INFINITY},
    "a scale of 1e308": {"scale": 1e308},
    "a scale in words": {"scale": "0.5"},
    "a scale that is true": {"scale": True},
    "a scale that is a list": {"scale": [0.5]},
    "a seed in words": {"seed": "one"},
    "a seed that is a fraction": {"seed": 0.5},
    "a negative seed": {"seed": -1},
    "a seed of 2^64": {"seed": 2**64},
    "a seed that is None": {"seed": None},
    "a seed that is true": {"seed": True},
    "an unknown parameter": {"temperature": 2.0},
}


def unlike(default: object) -> dict[str, object]:
    """What a parameter with this default cannot be."""
    if isinstance(default, bool):
        return {"a number": 2, "a word": "yes"}
    if isinstance(default, str):
        return {"an unknown word": "nonsense", "a number": 1}
    if isinstance(default, float):
        return {"0": 0.0, "NaN": NAN, "infinite": INFINITY}
    return {"negative": -1, "a fraction": 1.5, "a word": "many"}


def of_methods() -> list[Case]:
    found = cases("a method", get("exact-fused"), of_a_method, SHARED)
    for name in methods():
        wrong = {
            f"{parameter} is {what}": {parameter: value}
            for parameter, default in get(name).defaults.items()
            for what, value in unlike(default).items()
        }
        found += cases(name, get(name), of_a_method, wrong)
    causal = {
        "fewer queries than keys": {},
        "another width": {"k": points(2, 20, 5), "v": points(2, 20, 3)},
        "a NaN in v": {"k": points(2, 20, 4), "v": holding(NAN, 2, 20, 3)},
    }
    found += cases("a causal method", get("exact-sdpa").attend_causally, of_a_method, causal)
    found += cases(
        "a method without a causal form",
        get("own-key").attend_causally,
        lambda: of_a_method() | {"k": points(2, 20, 4), "v": points(2, 20, 3)},
        {"asked for it": {}},
    )
    return found + cases(
        "get",
        get,
        lambda: {"name": "exact-sdpa"},
        {
            "an unknown name": {"name": "softmax"},
            "an empty name": {"name": ""},
            "None": {"name": None},
            "a number": {"name": 3},
            "a list": {"name": ["exact-sdpa"]},
        },
    )


# Functions of queries and keys alone
def a_head() -> dict[str, Any]:
    return {"q": points(60, 4), "k": points(60, 4)}


HEADS: dict[str, dict[str, Any]] = {
    "one dimension": {"q": points(60)},
    "no rows": {"q": points(0, 4), "k": points(0, 4)},
    "no columns": {"q": points(60, 0), "k": points(60, 0)},
    "another width": {"k": points(60, 5)},
    "another batch": {"q": points(2, 60, 4)},
    "a NaN": {"q": holding(NAN, 60, 4)},
    "an infinity": {"k": holding(INFINITY, 60, 4)},
    "an array and a tensor": {"k": points(60, 4).numpy()},
    "a list": {"q": points(60, 4).tolist()},
    "complex numbers": {"q": points(60, 4).to(torch.complex64)},
    "complex numbers of NumPy": {"q": np.ones((60, 4), complex), "k": np.ones((60, 4))},
    "words": {"q": np.full((60, 4), "a"), "k": np.ones((60, 4))},
    "an array with a mask": {"q": np.ma.masked_less(points(60, 4).numpy(), 0), "k": points(60, 4).numpy()},
    "a nested tensor": {"q": torch.nested.nested_tensor([points(60, 4)])},
    "objects": {"q": np.full((60, 4), None), "k": np.ones((60, 4))},
    "entries of 1e200": {"q": 1e200 * points(60, 4).double(), "k": points(60, 4).double()},
    "scale 0": {"scale": 0.0},
    "a negative scale": {"scale": -0.5},
    "a scale that is NaN": {"scale": NAN},
    "an infinite scale": {"scale": INFINITY},
    "a scale of 1e308": {"scale": 1e308},
    "a scale in words": {"scale": "half"},
}
SEQUENCES: dict[str, dict[str, Any]] = {
    "fewer queries than keys": {"q": points(50, 4)},
    "one token": {"q": points(1, 4), "k": points(1, 4)},
}
PREFIXES: dict[str, dict[str, Any]] = {
    "a first prefix of 0": {"min_prefix": 0},
    "a negative first prefix": {"min_prefix": -3},
    "a first prefix longer than the text": {"min_prefix": 61},
    "a first prefix that is a fraction": {"min_prefix": 1.5},
    "a first prefix in words": {"min_prefix": "50"},
    "no memory": {"memory": 0},
    "memory in words": {"memory": "1 GB"},
}


BLOCKS: dict[str, dict[str, Any]] = {
    "a block of 0": {"block": 0},
    "half a block": {"block": 0.5},
    "a dimension too many": {"q": points(1, 2, 60, 4), "k": points(1, 2, 60, 4)},
}


# ApproxKMV and its parts
def a_product() -> dict[str, Any]:
    return {"queries": points(20, 4), "keys": points(30, 4), "x": points(30), "sigma": 1.0, "epsilon": 0.5, "seed": 0}


def without(arguments: Arguments, *names: str) -> Arguments:
    return lambda: {name: value for name, value in arguments().items() if name not in names}


POINTS: dict[str, dict[str, Any]] = {
    "queries with a batch": {"queries": points(1, 20, 4)},
    "queries of one dimension": {"queries": points(20)},
    "no keys": {"keys": points(0, 4)},
    "another width": {"queries": points(20, 3)},
    "a NaN in keys": {"keys": holding(NAN, 30, 4)},
    "an infinity in queries": {"queries": holding(INFINITY, 20, 4)},
    "arrays and tensors": {"queries": points(20, 4).numpy()},
    "lists": {"queries": points(20, 4).tolist()},
    "sigma 0": {"sigma": 0.0},
    "a negative sigma": {"sigma": -1.0},
    "an infinite sigma": {"sigma": INFINITY},
    "a sigma that is true": {"sigma": True},
    "a sigma in words": {"sigma": "one"},
    "alpha above 1": {"alpha": 1.1},
    "a negative alpha": {"alpha": -0.1},
    "an alpha that is NaN": {"alpha": NAN},
    "a negative seed": {"seed": -1},
    "a seed that is a fraction": {"seed": 0.5},
    "an unknown family": {"family": "e2lsh"},
    "a family that is a list": {"family": ["p-stable"]},
    "memory of 10 bytes": {"memory": 10},
    "memory in words": {"memory": "1 GB"},
}
PRODUCTS: dict[str, dict[str, Any]] = {
    "x too short": {"x": points(29)},
    "x that is a column": {"x": points(30, 1)},
    "a NaN in x": {"x": holding(NAN, 30)},
    "an infinity in x": {"x": holding(INFINITY, 30)},
    "complex x": {"x": points(30).to(torch.complex64)},
    "x of NumPy": {"x": points(30).numpy()},
    "epsilon 0": {"epsilon": 0.0},
    "epsilon 1e-40": {"epsilon": 1e-40},
    "a negative epsilon": {"epsilon": -0.5},
    "an epsilon that is NaN": {"epsilon": NAN},
    "gamma above 1": {"gamma": 2.0},
    "gamma in words": {"gamma": "a"},
    "an unknown density": {"density": "guess"},
    "heavy keys of other queries": {"heavy": find_heavy(points(3, 4), points(30, 4), sigma=1.0, seed=0)},
}


def attention_arguments() -> dict[str, Any]:
    return {"q": points(20, 4), "k": points(30, 4), "v": points(30, 2), "epsilon": 0.5, "seed": 0}


ATTENTION: dict[str, dict[str, Any]] = {
    "v too short": {"v": points(29, 2)},
    "v with a batch": {"v": points(1, 30, 2)},
    "v without columns": {"v": points(30, 0)},
    "a NaN in v": {"v": holding(NAN, 30, 2)},
    "v of NumPy": {"v": points(30, 2).numpy()},
    "a NaN in q": {"q": holding(NAN, 20, 4)},
    "another width": {"k": points(30, 5)},
    "a scale of 0": {"scale": 0.0},
    "a negative seed": {"seed": -1},
}


def square_points() -> dict[str, Any]:
    return {"points": points(20, 4), "sigma": 1.0, "epsilon": 0.5, "seed": 0}


EIGENVALUES: dict[str, dict[str, Any]] = {
    "no points": {"points": points(0, 4)},
    "points of one dimension": {"points": points(20)},
    "a NaN": {"points": holding(NAN, 20, 4)},
    "sigma 0": {"sigma": 0.0},
    "epsilon 1": {"epsilon": 1.0},
    "a negative epsilon": {"epsilon": -0.5},
    "no iteration": {"iterations": 0},
    "half an iteration": {"iterations": 0.5},
    "a negative seed": {"seed": -1},
    "an unknown density": {"density": "guess"},
}
OF_POINTS = {what: change for what, change in POINTS.items() if change.keys() <= {"queries", "keys", "sigma", "seed"}}
OPERATORS: dict[str, dict[str, Any]] = {
    "an epsilon of 1": {"epsilon": 1.0},
    "an epsilon of 0": {"epsilon": 0.0},
    "an epsilon that is NaN": {"epsilon": NAN},
    "an error relative to y": {"relative_to": "y"},
    "an unknown method": {"method": "fast"},
    "keys far apart": {"sigma": 1e-9},
    "half a seed": {"seed": 0.5},
    "x of another length": {"x": points(29)},
    "x of three dimensions": {"x": points(30, 2, 2)},
    "no column of x": {"x": points(30, 0)},
    "x in words": {"x": "ones"},
    "a NaN in x": {"x": holding(NAN, 30)},
    "an enormous x": {"x": holding(1e31, 30)},
    "x of another kind": {"x": np.ones(30)},
}


def a_kernel_product(x: Any, **arguments: Any) -> Any:
    return KernelOperator(**arguments) @ x


CONSTANTS: dict[str, dict[str, Any]] = {
    "a factor of 0": {"table_factor": 0.0},
    "a negative factor": {"repetition_factor": -1.0},
    "a factor that is NaN": {"median_factor": NAN},
    "an infinite exponent": {"small_exponent": INFINITY},
    "a factor in words": {"table_factor": "ten"},
    "an epsilon that is not divided": {"epsilon_divisor": 1.0},
}


SOFTMAX: dict[str, dict[str, Any]] = {
    "an unknown mask": {"mask": "backwards"},
    "a window of no key": {"mask": 0},
    "a mask of another shape": {"mask": torch.ones(3, 4, dtype=torch.bool)},
    "spans beyond the keys": {"mask": torch.full((1000, 2), 10**6)},
    "spans that end before they begin": {"mask": torch.tensor([[1, 0]]).expand(60, 2)},
    "a mask with a mask": {"mask": np.ma.masked_equal(np.tri(60, dtype=bool), False)},
    "a bias that is NaN": {"bias": torch.tensor([[NAN]])},
    "a bias that hides": {"bias": torch.tensor([[-INFINITY]])},
    "a cap of 0": {"softcap": 0.0},
    "sinks of many heads": {"sinks": torch.ones(5)},
    "a share of all": {"shares": (1.0,)},
    "half products": {"dtype": "float16"},
}


def graph() -> dict[str, Any]:
    return {"points": points(30, 4), "alpha": 1.2, "degree": 4, "beam": 8, "generator": torch.Generator()}


SPREAD: dict[str, dict[str, Any]] = {
    "one point": {"points": points(1, 4)},
    "points of one dimension": {"points": points(30)},
    "points of three dimensions": {"points": points(30, 4, 2)},
    "equal points": {"points": torch.ones(5, 4)},
    "a NaN": {"points": holding(NAN, 30, 4)},
    "an infinity": {"points": holding(INFINITY, 30, 4)},
}

CASES = [
    *of_methods(),
    *cases("log_kernel", log_kernel, a_head, HEADS),
    *cases("reduce_attention", reduce_attention, a_head, HEADS),
    *cases("head_to_tail_ratios", head_to_tail_ratios, a_head, HEADS | SEQUENCES | PREFIXES),
    *cases("order_ratios", order_ratios, a_head, HEADS | SEQUENCES),
    *cases("attention_statistics", attention_statistics, a_head, HEADS | SOFTMAX),
    *cases("head_statistics", head_statistics, a_head, SEQUENCES | PREFIXES),
    *cases("unmasked_and_masked_statistics", unmasked_and_masked_statistics, a_head, SEQUENCES | PREFIXES),
    *cases("length_statistics", length_statistics, a_head, HEADS | SEQUENCES | BLOCKS),
    *cases("approx_kmv", approx_kmv, a_product, POINTS | PRODUCTS),
    *cases("find_heavy", find_heavy, without(a_product, "x", "epsilon"), POINTS),
    *cases("approx_attention", approx_attention, attention_arguments, ATTENTION | {"epsilon 0": {"epsilon": 0.0}}),
    *cases(
        "spectral_attention",
        spectral_attention,
        lambda: without(attention_arguments, "epsilon")() | {"samples": 5},
        ATTENTION | {"no sample": {"samples": 0}, "half a sample": {"samples": 0.5}},
    ),
    *cases("top_eigenvalue", eigenvalue, square_points, EIGENVALUES | {"an unknown method": {"method": "exact"}}),
    *cases("KernelOperator", a_kernel_product, a_product, OF_POINTS | OPERATORS),
    *cases("PaperConstants", PaperConstants, dict, CONSTANTS),
    *cases(
        "knn_attention",
        knn_attention,
        of_a_method,
        {"an unknown head": {"head": "some"}, "top -1": {"top": -1}, "a seed of -1": {"seed": -1}},
    ),
    *cases("doubling_dimension", doubling_dimension, without(graph, "alpha", "degree", "beam"), SPREAD),
    *cases("a Vamana graph", build, graph, {"alpha below 1": {"alpha": 0.9}, "a NaN": {"points": holding(NAN, 30, 4)}}),
    *cases(
        "a whole Vamana graph",
        build_exhaustively,
        without(graph, "degree", "beam", "generator"),
        {"alpha that is NaN": {"alpha": NAN}},
    ),
]
