"""Convert queries and keys (torch or NumPy, any floating dtype) to float64 tensors, and check arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from approxkmv.errors import InputError

# Far above any activation and far below float64's overflow; the scale may be as large.
LARGEST_PRODUCT = 1e100

Array: TypeAlias = torch.Tensor | np.ndarray


def as_float64(array: Array, name: str) -> torch.Tensor:
    """The same numbers as a float64 tensor on the same device.

    Raises InputError, naming the argument, unless it is a tensor or array of finite real numbers.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiu":
            raise InputError(f"{name} has dtype {array.dtype}: give real numbers")
        tensor = torch.from_numpy(_whole(array, np.float64))
    elif isinstance(array, torch.Tensor):
        if array.is_complex() or array.dtype == torch.bool:
            raise InputError(f"{name} has dtype {array.dtype}: give real numbers")
        tensor = _dense(array, name).detach().to(torch.float64)
    else:
        raise InputError(f"{name} is a {type(array).__name__}: give a torch tensor or a NumPy array")
    if not math.isfinite(_largest(tensor)):
        raise InputError(f"{name} holds a NaN or an infinity: remove it first")
    return tensor


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """The same real numbers as a tensor: torch has only this machine's byte order, and nothing above float64."""
    return torch.from_numpy(
        _whole(array, np.float64 if array.dtype.type is np.longdouble else array.dtype.newbyteorder("="))
    )


def _whole(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in order, and writable, without which torch warns. Raises InputError for one with a mask of its own."""
    if isinstance(array, np.ma.MaskedArray):
        raise InputError("a masked array's mask would be ignored: give plain arrays, of what is to be seen")
    return np.require(array, dtype, ["C", "W", "E"])


def _dense(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor with signs written out. Raises InputError for one without numbers, or that is not dense."""
    sparse = tensor.layout != torch.strided
    kinds = {"nested": tensor.is_nested, "a meta tensor, without numbers": tensor.is_meta, "sparse": sparse}
    for kind, is_one in kinds.items():
        if is_one:
            raise InputError(f"{name} is {kind}: give a dense tensor")
    return tensor.resolve_neg()


def _largest(tensor: torch.Tensor) -> float:
    """The largest absolute value, 0 if there are no entries; NaN and infinity propagate. Makes no copy."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(-low.item(), high.item())


def queries_and_keys(q: Array, k: Array) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], Array]]:
    """q (..., n_q, d) and k (..., n_k, d) as float64 tensors, and a function back to the caller's kind of array.

    Raises InputError if the two do not match: different kinds, devices, batch shapes or widths, or no rows.
    """
    if isinstance(q, np.ndarray) != isinstance(k, np.ndarray):
        raise InputError("q and k are of different kinds: give two torch tensors or two NumPy arrays")
    queries, keys = as_float64(q, "q"), as_float64(k, "k")
    if queries.ndim < 2 or keys.ndim < 2:
        raise InputError(f"q {tuple(queries.shape)} and k {tuple(keys.shape)} must be (..., n_q, d) and (..., n_k, d)")
    if queries.shape[-1] != keys.shape[-1] or queries.shape[:-2] != keys.shape[:-2]:
        raise InputError(
            f"q {tuple(queries.shape)} and k {tuple(keys.shape)} differ in width d or in their batch dimensions"
        )
    if queries.device != keys.device:
        raise InputError(f"q is on {queries.device} and k on {keys.device}: move one of them")
    if 0 in queries.shape[-2:] or 0 in keys.shape[-2:]:
        raise InputError(f"q {tuple(queries.shape)} or k {tuple(keys.shape)} has no rows or no columns")
    # These bound the logits and the lemma's row terms; beyond them float64 cannot hold the logarithms.
    if max(_largest(queries), _largest(keys)) > math.sqrt(LARGEST_PRODUCT / queries.shape[-1]):
        raise InputError(f"q or k is so large that products of entries exceed {LARGEST_PRODUCT:g}: scale them down")
    back: Callable[[torch.Tensor], Array] = (lambda t: t.numpy()) if isinstance(q, np.ndarray) else (lambda t: t)
    return queries, keys, back


def is_whole(value: object) -> bool:
    """Whether this is a whole number of Python's or NumPy's; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def true_or_false(value: object, name: str) -> bool:
    """A bool of Python's or NumPy's as Python's. Raises InputError for anything else, such as a mask."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is of the type {type(value).__name__}: give True or False")
    return bool(value)


def is_number(value: object) -> bool:
    """Whether this is a whole or floating-point number of Python's or NumPy's."""
    return is_whole(value) or isinstance(value, (float, np.floating))


def resolve_scale(scale: float | None, d: int) -> float:
    """The factor of the logits; None means 1/sqrt(d). Raises InputError unless positive and at most 1e100."""
    if scale is None:
        return 1.0 / math.sqrt(d)
    if not (is_number(scale) and 0 < float(scale) <= LARGEST_PRODUCT):
        raise InputError(f"scale is {scale!r}: it must be a positive number, at most {LARGEST_PRODUCT:g}")
    return float(scale)


def resolve_seed(seed: int) -> int:
    """The seed of a method's random numbers. Raises InputError unless an integer in 0 ... 2^63 - 1."""
    if not (is_whole(seed) and 0 <= seed < 2**63):
        raise InputError(f"seed is {seed!r}: it must be a whole number, at least 0 and below 2^63")
    return int(seed)


# What attention methods take.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_batches(
    q: Array, k: Array, v: Array
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Callable[[torch.Tensor], Array]]:
    """q, k and v as (batch, n, width) tensors in float32 or bfloat16, and a function that brings an answer back.

    They are three tensors or three NumPy arrays of one dtype, float16 to float64, and of one number of dimensions:
    (n, width), (batch, n, width) or (batch, heads, n, width). With four, queries may have several heads per head of the
    keys. Methods compute in bfloat16 or float32, so float64 answers have the precision of float32. The answer comes
    back in q's kind, dtype and leading dimensions. Raises InputError for anything else.
    """
    given = {"q": q, "k": k, "v": v}
    for name, array in given.items():
        if not isinstance(array, (torch.Tensor, np.ndarray)):
            raise InputError(f"{name} is a {type(array).__name__}: give a torch tensor or a NumPy array")
        if isinstance(array, np.ndarray) != isinstance(q, np.ndarray):
            raise InputError("q, k and v are of different kinds: give three torch tensors or three NumPy arrays")
        if isinstance(array, np.ndarray) and array.dtype not in (np.float16, np.float32, np.float64):
            raise InputError(f"{name} has dtype {array.dtype}: give float16, float32 or float64")
    tensors = [
        tensor_of(array) if isinstance(array, np.ndarray) else _dense(array, name) for name, array in given.items()
    ]
    for name, tensor in zip(given, tensors, strict=True):
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} has dtype {tensor.dtype}: give float16, bfloat16, float32 or float64")
        if tensor.dtype != tensors[0].dtype:
            raise InputError(f"{name} is {tensor.dtype}, but q is {tensors[0].dtype}")
        if not 2 <= tensor.ndim <= 4 or 0 in tensor.shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}: it must be (n, width), (batch, n, width) or "
                "(batch, heads, n, width), none of them 0"
            )
        if tensor.ndim != tensors[0].ndim:
            raise InputError(f"{name} has {tensor.ndim} dimensions, but q has {tensors[0].ndim}")
    leading, dtype = tensors[0].shape[:-1], tensors[0].dtype
    tensors = _with_heads_repeated(*tensors)
    compute = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    # In order: torch's flash attention reads beyond, or refuses, rows that are not.
    flat = [tensor.reshape(-1, *tensor.shape[-2:]).to(compute).contiguous() for tensor in tensors]

    def back(answer: torch.Tensor) -> Array:
        if dtype == torch.float16:
            # Rounding in bfloat16 takes its largest numbers beyond it.
            answer = answer.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        shaped = answer.to(dtype).reshape(*leading, answer.shape[-1])
        return shaped.numpy() if isinstance(q, np.ndarray) else shaped

    return flat[0], flat[1], flat[2], back


def _with_heads_repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """With four dimensions, the heads of k and v as often as the queries' heads share them."""
    if q.ndim == 4 and k.shape[:2] != v.shape[:2]:
        raise InputError(f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in their heads or batch")
    if q.ndim < 3 or q.shape[:-2] == k.shape[:-2]:
        return [q, k, v]
    queries, keys = q.shape[-3], k.shape[-3]
    grouped = q.ndim == 4 and q.shape[0] == k.shape[0] and queries % keys == 0
    if not grouped:
        times = (
            f" {queries // keys} times, as k.repeat_interleave({queries // keys}, -3) does" if keys < queries else ""
        )
        differ = f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in their heads or batch"
        raise InputError(f"{differ}: repeat the key heads{times}")
    return [q, *(tensor.repeat_interleave(queries // keys, 1) for tensor in (k, v))]
