"""The cheapest parameters of a method whose error is at most a target, on inputs used for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from approxkmv.attention import Method, UnavailableError
from approxkmv.errors import InputError

# A later setting of the grid replaces an earlier one only if it is faster by more than the noise of a few runs.
_CLEARLY_FASTER = 0.9
# With more rows than this recomputed exactly, error and time are partly those of exact attention, not of the method.
MOST_RECOMPUTED = 0.01


@dataclass(frozen=True)
class Trial:
    """One setting of a method: its largest error over the tuning seeds, and the time of its fastest run in seconds."""

    parameters: dict[str, Any]
    error: float
    seconds: float
    recomputed: float
    """The largest share of rows that were recomputed exactly, over the tuning seeds."""

    @property
    def counts(self) -> bool:
        """Whether error and time are those of the method itself."""
        return self.recomputed <= MOST_RECOMPUTED


@dataclass(frozen=True)
class Choice:
    """The result of tuning for one target."""

    target: float
    trial: Trial
    """The fastest setting that reaches the target, or the most accurate one if none does."""
    reached: bool


def tune(
    method: Method,
    grid: Sequence[dict[str, Any]],
    trial_of: Callable[[dict[str, Any], int], tuple[float, float, float]],
    targets: Sequence[float],
    seeds: Sequence[int],
    band: float | None = None,
) -> list[Choice]:
    """Walk the grid from its cheap end until the smallest target is reached; for each target choose the fastest.

    trial_of(parameters, i) returns the error, the seconds and the share of recomputed rows with the i-th tuning seed.
    A setting whose error is not finite reaches no target, nor does one with more than MOST_RECOMPUTED of its rows
    recomputed. The order of the grid is a guess that holds for most inputs; a later setting is chosen if it was clearly
    faster.
    With a band the error must lie within target +- band, so that a better answer than requested does not count.
    Raises UnavailableError when no setting of the grid can run, or InputError when the method refuses the inputs.
    """
    trials: list[Trial] = []
    refused: UnavailableError | InputError = UnavailableError(f"{method.name} has an empty grid")
    for given in grid:
        parameters = method.parameters(given)
        try:
            # At least twice: the first run may compile its loops.
            runs = [trial_of(parameters, i) for i in range(len(seeds) if method.seeded else min(2, len(seeds)))]
        except (UnavailableError, InputError) as refusal:
            # Without its traceback, which would keep the scarce memory in use.
            refused = type(refusal)(str(refusal))
            continue
        # The largest error: with the median, half of all other inputs would miss the target.
        error = float(np.max([run[0] for run in runs]))
        seconds, recomputed = min(run[1] for run in runs), max(run[2] for run in runs)
        trials.append(Trial(parameters, error if np.isfinite(error) else float("inf"), seconds, recomputed))
        # With a band a later, more expensive setting may be the first that is inaccurate enough; more gains nothing.
        if error <= min(targets) and trials[-1].counts:
            break
    if not trials:
        raise refused
    choices = []
    for target in targets:
        low, high = (0.0, target) if band is None else (max(0.0, target - band), target + band)
        fitting = [t for t in trials if low <= t.error <= high and t.counts and np.isfinite(t.error)]
        if fitting:
            chosen = fitting[0]
            for trial in fitting[1:]:
                if trial.seconds < _CLEARLY_FASTER * chosen.seconds:
                    chosen = trial
            choices.append(Choice(target, chosen, True))
        else:
            best = min(trials, key=lambda t: (not t.counts, abs(t.error - target) if band is not None else t.error))
            choices.append(Choice(target, best, False))
    return choices
