"""The cheapest parameters of a method whose error is at most a target, on inputs that are used for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from approxkmv.attention import Method, UnavailableError


@dataclass(frozen=True)
class Trial:
    """One setting of a method and its largest error over the tuning seeds."""

    parameters: dict[str, Any]
    error: float


@dataclass(frozen=True)
class Choice:
    """What tuning found for one target."""

    target: float
    trial: Trial
    """The cheapest setting that reaches the target, or the best there is."""
    reached: bool


def tune(
    method: Method,
    grid: Sequence[dict[str, Any]],
    error_of: Callable[[dict[str, Any], int], float],
    targets: Sequence[float],
    seeds: Sequence[int],
    band: float | None = None,
) -> list[Choice]:
    """Walk the grid from its cheap end until the smallest target is reached.

    error_of(parameters, i) is the error with the i-th tuning seed. An error that is not finite reaches nothing.
    With a band the error must lie within target +- band, so that an answer better than was asked for does not count.
    Raises UnavailableError when no setting of the grid can run.
    """
    trials: list[Trial] = []
    refused: UnavailableError | None = None
    for given in grid:
        parameters = method.parameters(given)
        try:
            measured = [error_of(parameters, i) for i in range(len(seeds) if method.seeded else 1)]
        except UnavailableError as refusal:
            refused = refusal
            continue
        # The largest: with the median half of all other inputs would miss the target.
        error = float(np.max(measured))
        trials.append(Trial(parameters, error if np.isfinite(error) else float("inf")))
        # Within a band a later, dearer setting may be the first that is bad enough; nothing is gained by more.
        if error <= min(targets):
            break
    if not trials:
        raise refused if refused is not None else UnavailableError(f"{method.name} has an empty grid")
    choices = []
    for target in targets:
        low, high = (0.0, target) if band is None else (max(0.0, target - band), target + band)
        fitting = [t for t in trials if low <= t.error <= high]
        if fitting:
            choices.append(Choice(target, fitting[0], True))
        else:
            best = min(trials, key=lambda t: abs(t.error - target) if band is not None else t.error)
            choices.append(Choice(target, best, False))
    return choices
