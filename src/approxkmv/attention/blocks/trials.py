"""What `compute.trial` times to decide how blocks are computed: on a head of common size, in milliseconds each."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from approxkmv.attention.blocks.expansion import Clustering, Expansion, expand, key_side
from approxkmv.attention.blocks.near_keys import NEAR_KEYS_FEW, NEAR_KEYS_MANY, sums_of_keys
from approxkmv.compute.loops import has_bfloat16_instructions
from approxkmv.compute.trial import Runs, by_form

_D = 64
_CLUSTERING = Clustering(block=128, near=512)
_LOOPS = "attention.blocks.trials.loops"

Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _head(n_q: int, n_k: int, d_v: int) -> Head:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, d, generator=generator) for n, d in ((n_q, _D), (n_k, _D), (n_k, d_v)))
    return q, k, v


def _expanded(head: Head, low: torch.dtype) -> Expansion:
    generator = torch.Generator().manual_seed(0)
    q, k, v = head
    side = key_side(k, v, np.empty(0, np.int64), _CLUSTERING, v.to(low))
    return expand(q, side, generator, _CLUSTERING, scale=_D**-0.5)


def _near(e: Expansion, head: Head) -> None:
    sums_of_keys(e.blocks, head[1], e.mean, head[2], e.chosen, e.ends, rounded=e.rounded)


def loops() -> Runs:
    """Blocks by compiled loops, or by library calls."""
    head = _head(1024, 2048, _D)
    return by_form(_LOOPS, lambda: _near(_expanded(head, torch.float32), head), "compiled", "library")


def products() -> Runs:
    """The expansion in float32, or with products of bfloat16 numbers."""
    # Long enough for the products to matter beside what is done once for each key
    head = _head(4096, 8192, _D)
    return {"float32": partial(_expanded, head, torch.float32), "bfloat16": partial(_expanded, head, torch.bfloat16)}


def _near_keys(question: str, d_v: int) -> Runs:
    head = _head(1024, 2048, d_v)
    e = _expanded(head, torch.bfloat16)
    forms = ("float32", "bfloat16") if has_bfloat16_instructions() else ("float32",)
    return by_form(question, partial(_near, e, head), *forms)


def near_keys_few_columns() -> Runs:
    """Sums over near keys with one value column: the loop with products in float32, or in bfloat16."""
    return _near_keys(NEAR_KEYS_FEW, 1)


def near_keys_many_columns() -> Runs:
    """The same for as many value columns as a head has."""
    return _near_keys(NEAR_KEYS_MANY, _D)
