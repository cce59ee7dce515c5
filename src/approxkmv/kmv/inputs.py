"""Checks of this package's arguments, all made before any work: each raises InputError, in one line."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from approxkmv.arrays import Array, as_float64, is_number, is_whole
from approxkmv.errors import InputError


def matrix(array: Array, name: str) -> np.ndarray:
    """A float64 NumPy matrix with at least one row and one column, or an InputError that names the argument."""
    tensor = as_float64(array, name)
    if tensor.ndim != 2:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: give a matrix (n, d)")
    if 0 in tensor.shape:
        raise InputError(f"{name} is empty, shape {tuple(tensor.shape)}: give at least one row and one column")
    return tensor.cpu().numpy()


def bounded(array: np.ndarray, name: str, most: float) -> np.ndarray:
    """The array itself. Raises InputError if an entry is so large that sums of products would overflow float64."""
    largest = float(np.abs(array).max())
    if not largest <= most:
        raise InputError(f"{name} has an entry of size {largest:.3g}, more than {most:g}: scale it down")
    return array


def points(queries: Array, keys: Array) -> tuple[np.ndarray, np.ndarray]:
    """Queries (n_q, d) and keys (n_k, d) of one kind and one width."""
    same_kind(queries, "queries", keys, "keys")
    q, k = matrix(queries, "queries"), matrix(keys, "keys")
    if q.shape[1] != k.shape[1]:
        raise InputError(f"queries {q.shape} and keys {k.shape} differ in width d")
    return q, k


def vector(x: Array, name: str, n: int) -> np.ndarray:
    """A float64 vector of n entries."""
    tensor = as_float64(x, name)
    if tuple(tensor.shape) != (n,):
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: it needs one entry per key, ({n},)")
    return tensor.cpu().numpy()


def same_kind(a: Array, name_a: str, b: Array, name_b: str) -> None:
    """Refuse a mixture of torch tensors and NumPy arrays."""
    if isinstance(a, np.ndarray) != isinstance(b, np.ndarray):
        raise InputError(f"{name_a} and {name_b} are of different kinds: give two torch tensors or two NumPy arrays")


def positive(value: float, name: str) -> float:
    """A positive finite number."""
    if not is_number(value) or not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is {value!r}: it must be a positive finite number")
    return float(value)


def error(value: float) -> float:
    """epsilon: a positive number for which float64 can hold its square and the budgets."""
    if positive(value, "epsilon") < 1e-30 or value > 1e30:
        raise InputError(f"epsilon is {value!r}: it must lie between 1e-30 and 1e30")
    return float(value)


def fraction(value: float, name: str) -> float:
    """A number in [0, 1]."""
    if not is_number(value) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}: it must lie in [0, 1]")
    return float(value)


def count(value: int, name: str) -> int:
    """A positive integer."""
    if not is_whole(value) or value < 1:
        raise InputError(f"{name} is {value!r}: it must be a positive whole number")
    return int(value)


def seed_sequence(seed: int | None) -> np.random.SeedSequence:
    """The source of all random numbers of one call; None draws a fresh one."""
    if seed is not None and (not is_whole(seed) or seed < 0):
        raise InputError(f"seed is {seed!r}: it must be a whole number, at least 0, or None")
    return np.random.SeedSequence(None if seed is None else int(seed))


def generator(source: np.random.SeedSequence, *purpose: int) -> np.random.Generator:
    """The random numbers for one purpose: the same each time."""
    return np.random.default_rng([*(int(word) for word in source.generate_state(4)), *purpose])


def choice(value: str, name: str, allowed: tuple[str, ...]) -> str:
    """One of the allowed options."""
    if value not in allowed:
        raise InputError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")
    return value


def enough_memory(memory: int, least: int, what: str) -> int:
    """The bound on temporary storage. Raises InputError, giving the least that would do, if it is too small."""
    given = count(memory, "memory")
    if given < least:
        raise InputError(f"memory is {given} bytes: {what} needs at least {least}")
    return given


def back_to_kind(like: Array) -> Callable[[np.ndarray], Array]:
    """A function that converts back to the caller's kind of array: float64, on the caller's device."""
    if isinstance(like, torch.Tensor):
        device = like.device
        return lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(device)
    return lambda values: values
