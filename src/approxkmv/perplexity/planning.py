"""Making a plan: measure on a calibration text, head by head, which method is fastest within an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from approxkmv.attention import Method, get
from approxkmv.compute.counting import counting
from approxkmv.errors import InputError, UnavailableError
from approxkmv.perplexity.model import CausalModel
from approxkmv.perplexity.plan import HeadPlan, Plan
from approxkmv.perplexity.replacement import Replacement
from approxkmv.sweep.measure import errors, machine, timer
from approxkmv.sweep.tuning import MOST_RECOMPUTED

METHODS = ("window", "local-expansion", "approxkmv", "balancekv")
_EXACT = ("exact-sdpa-bf16", "exact-tiles-bf16", "exact-sdpa")
_REFERENCE = "exact-sdpa"
# A method must be this much faster than exact attention, and its error this much below the target: times and errors on
# another text differ.
_FASTER, _MARGIN = 0.9, 0.8
_SEEDS = (1000, 1001)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


def make_plan(model: CausalModel, ids: Sequence[int], target: float, say: Callable[[str], None]) -> Plan:
    """Run the text `ids` through the model with exact attention, measuring every head's q, k, v on the way.

    On a CPU times are of one thread. say: receives a line for each layer. Raises InputError for a target outside (0, 1)
    or a text of a wrong length, CaptureError for a model whose attention is not plainly causal.
    """
    if not 0 < target < 1:
        raise InputError(f"target is {target}: give an error between 0 and 1, relative to the answer")
    planner = _Planner(target, say)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model.perplexity(ids, Replacement(planner, {}, model.attending, 0))
    finally:
        torch.set_num_threads(threads)
    layers = tuple(planner.layers.get(layer, ()) for layer in range(model.n_layers))
    return Plan(model.identity(), target, len(ids), layers, machine(str(model.device)) | {"threads": 1})


class _Planner:
    """Answers exactly, and measures while doing so."""

    def __init__(self, target: float, say: Callable[[str], None]) -> None:
        self.target, self.say = target, say
        self.layers: dict[int, tuple[HeadPlan, ...]] = {}

    def of_layer(self, layer: int) -> Callable[..., torch.Tensor]:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int) -> torch.Tensor:
            exact = _run(get(_REFERENCE), (q, k, v, scale), {})

            def plan(head: int) -> HeadPlan:
                one = slice(head, head + 1)
                return best((q[one], k[one], v[one], scale), exact[one], self.target)

            if not self.layers:
                plan(0)  # compiles what is to be timed
            # The first call of a run is repeated.
            if layer not in self.layers:
                self.layers[layer] = tuple(plan(head) for head in range(len(q)))
                names = [head.method for head in self.layers[layer]]
                self.say(f"layer {layer}: " + ", ".join(f"{name} {names.count(name)}" for name in sorted({*names})))
            return exact

        return attend


def best(inputs: Inputs, exact: torch.Tensor, target: float) -> HeadPlan:
    """The plan for one head's q, k, v (1, n, width) and scale, whose answer is `exact` (1, n, d_v)."""
    found = None
    for name in _EXACT:
        try:
            error, seconds, _ = _measured(get(name), {}, inputs, exact, _SEEDS)
        except UnavailableError:
            # On a GPU
            continue
        # At most half of the target, as for the exact rows of a sweep.
        if error <= target / 2 and (found is None or seconds < found.seconds):
            found = HeadPlan(name, get(name).parameters(), error, seconds, name, seconds)
    assert found is not None, "the reference itself has no error"
    exact_seconds = found.exact_seconds
    for name in METHODS:
        method, slower = get(name), 0
        for given in method.grid:
            parameters = method.parameters(given)
            try:
                error, seconds, recomputed = _measured(method, parameters, inputs, exact, _SEEDS[:1])
                slower += seconds > exact_seconds and recomputed <= MOST_RECOMPUTED
                # Settings come cheapest first, but for rows made again: after two that are slower than exact none wins.
                if slower == 2:
                    break
                limit = min(_FASTER * exact_seconds, found.seconds)
                if error > _MARGIN * target or recomputed > MOST_RECOMPUTED or seconds > limit:
                    continue
                error, seconds, _ = _measured(method, parameters, inputs, exact, _SEEDS)
            except (UnavailableError, InputError):
                continue
            if error <= _MARGIN * target and seconds <= limit:
                found = HeadPlan(name, parameters, error, seconds, found.exact, exact_seconds)
                break
    return found


def _measured(
    method: Method, parameters: dict[str, Any], inputs: Inputs, exact: torch.Tensor, seeds: Sequence[int]
) -> tuple[float, float, float]:
    """The largest error over the seeds, the fewest seconds and the largest share of rows recomputed exactly."""
    seconds_of = timer(inputs[0].device, "cpu")
    found = []
    for seed in seeds:
        answer: list[torch.Tensor] = []
        with counting() as counts:
            seconds = seconds_of(lambda: answer.append(_run(method, inputs, parameters, seed)))  # noqa: B023
        error = errors(answer[0], exact, inputs[2])[1]
        found.append((error if error == error else float("inf"), seconds, counts.recomputed_rows / exact.shape[1]))
    return max(f[0] for f in found), min(f[1] for f in found), max(f[2] for f in found)


def _run(method: Method, inputs: Inputs, parameters: dict[str, Any], seed: int = 0) -> torch.Tensor:
    q, k, v, scale = inputs
    return method.causal_form()(q, k, v, scale=scale, seed=seed, **method.parameters(parameters))
