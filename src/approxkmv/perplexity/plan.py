"""A plan: which method and setting computes each head of a language model, exact attention where none is faster."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from approxkmv.attention import Method, get
from approxkmv.compute.trial import decisions
from approxkmv.errors import InputError
from approxkmv.files import read_json, write_json


@dataclass(frozen=True)
class HeadPlan:
    """One head's method, with what was measured on the calibration text."""

    method: str
    parameters: dict[str, Any]
    error: float
    """|out - exact|_2 / |exact|_2, the largest over seeds."""
    seconds: float
    exact: str
    """The fastest exact method, and its seconds; both times are CPU seconds of one thread, or a GPU's."""
    exact_seconds: float


@dataclass(frozen=True)
class Plan:
    """Use read_plan, or `planning.make_plan`."""

    model: str
    """Identifies the files of the weights."""
    target: float
    """The largest error of a head, relative to its answer."""
    tokens: int
    """The length of the calibration text."""
    layers: tuple[tuple[HeadPlan, ...], ...]
    """No heads in a layer without softmax attention."""
    machine: dict[str, Any]

    def of_layer(self, layer: int) -> Callable[..., torch.Tensor]:
        """f(q, k, v, *, scale, seed): causal attention of (heads, n, d), (heads, n, d), (heads, n, d_v).

        Raises InputError for a layer without heads.
        """
        groups = self._groups[layer]
        if not groups:
            raise InputError(f"the plan has no heads in layer {layer}: make it again with approxkmv plan")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int) -> torch.Tensor:
            # Another for each layer, whose seeds follow each other, and each run of its heads
            seeds = [(seed * len(q) + first) % 2**63 for first in range(len(q))]
            if len(groups) == 1:
                method, parameters, _ = groups[0]
                return method.causal_form()(q, k, v, scale=scale, seed=seeds[0], **parameters)
            out = torch.empty(*q.shape[:2], v.shape[2], dtype=v.dtype, device=v.device)
            for method, parameters, heads in groups:
                for first, last in _runs(heads):
                    some = (t[first:last] for t in (q, k, v))
                    out[first:last] = method.causal_form()(*some, scale=scale, seed=seeds[first], **parameters)
            return out

        return attend

    @cached_property
    def _groups(self) -> list[list[tuple[Method, dict[str, Any], list[int]]]]:
        """For each layer its methods with their parameters and heads."""
        layers = []
        for heads in self.layers:
            same: dict[tuple[str, str], list[int]] = defaultdict(list)
            for number, head in enumerate(heads):
                same[head.method, json.dumps(head.parameters, sort_keys=True)].append(number)
            layers.append([(get(name), json.loads(given), numbers) for (name, given), numbers in same.items()])
        return layers

    def heads_by_method(self) -> dict[str, int]:
        """How many heads each method computes."""
        return dict(Counter(head.method for heads in self.layers for head in heads).most_common())

    def check_shape(self, heads: list[int]) -> None:
        """Raise InputError unless the plan is for a model whose layers have so many heads each."""
        own = [len(of_layer) for of_layer in self.layers]
        if own != heads:
            ours, theirs = (numbers[0] if len({*numbers}) == 1 else numbers for numbers in (own, heads))
            raise InputError(
                f"the plan is for {len(own)} layers of {ours} heads, but the model has {len(heads)} layers of {theirs}"
            )


def write_plan(path: Path, plan: Plan, record: dict[str, Any]) -> None:
    """Write a plan as JSON, with the record of how it was made. Raises TableError if that fails."""
    write_json(path, asdict(plan) | {"provenance": record, "trials": decisions()})


def read_plan(path: Path) -> Plan:
    """The plan in a file of write_plan. Raises TableError or InputError for a file that is not one."""
    keys = {"model": str, "target": float, "tokens": int, "layers": list, "machine": dict}
    found = read_json(path, keys)
    try:
        layers = tuple(tuple(HeadPlan(**head) for head in heads) for heads in found["layers"])
        if not any(layers):
            raise InputError(f"{path} names no heads")
        for head in (head for heads in layers for head in heads):
            get(head.method).causal_form()
            get(head.method).parameters(head.parameters)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a plan: {error}") from error
    return Plan(**{name: found[name] for name in keys} | {"layers": layers})


def _runs(heads: list[int]) -> Iterator[tuple[int, int]]:
    """Slices of consecutive heads: a view costs nothing, where a copy takes as long as a cheap method."""
    first = heads[0]
    for head, following in zip(heads, [*heads[1:], -1], strict=True):
        if following != head + 1:
            yield first, head + 1
            first = following
