"""The cheapest parameters of a method whose error is at most a target, on inputs that are used for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from approxkmv.attention import Method, UnavailableError

# A later setting of the grid takes an earlier one's place only if it is faster by more than the noise of a few runs.
_CLEARLY_FASTER = 0.9
# With more rows than this made again exactly, error and time are those of exact attention on a part of the rows, which
# is no property of the method.
MOST_RECOMPUTED = 0.01


@dataclass(frozen=True)
class Trial:
    """One setting of a method: its largest error over the tuning seeds, and the seconds of its fastest run."""

    parameters: dict[str, Any]
    error: float
    seconds: float
    recomputed: float
    """The largest share of rows that were made again exactly, over the tuning seeds."""

    @property
    def counts(self) -> bool:
        """Whether error and time are the method's own."""
        return self.recomputed <= MOST_RECOMPUTED


@dataclass(frozen=True)
class Choice:
    """What tuning found for one target."""

    target: float
    trial: Trial
    """The fastest setting that reaches the target, or the best there is."""
    reached: bool


def tune(
    method: Method,
    grid: Sequence[dict[str, Any]],
    trial_of: Callable[[dict[str, Any], int], tuple[float, float, float]],
    targets: Sequence[float],
    seeds: Sequence[int],
    band: float | None = None,
) -> list[Choice]:
    """Walk the grid from its cheap end until the smallest target is reached; of what reaches a target, the fastest.

    trial_of(parameters, i) gives the error, the seconds and the share of recomputed rows with the i-th tuning seed. An
    error that is not finite reaches nothing, nor does a setting with more than MOST_RECOMPUTED of its rows recomputed.
    The grid's order is a guess that holds for most inputs; where a setting that comes later was
    clearly faster, it is taken.
    With a band the error must lie within target +- band, so that an answer better than was asked for does not count.
    Raises UnavailableError when no setting of the grid can run.
    """
    trials: list[Trial] = []
    refused = f"{method.name} has an empty grid"
    for given in grid:
        parameters = method.parameters(given)
        try:
            # Twice at least: the first run may compile its loops.
            runs = [trial_of(parameters, i) for i in range(len(seeds) if method.seeded else min(2, len(seeds)))]
        except UnavailableError as refusal:
            # Its words alone: with its traceback the memory that was too little would stay taken.
            refused = str(refusal)
            continue
        # The largest: with the median half of all other inputs would miss the target.
        error = float(np.max([run[0] for run in runs]))
        seconds, recomputed = min(run[1] for run in runs), max(run[2] for run in runs)
        trials.append(Trial(parameters, error if np.isfinite(error) else float("inf"), seconds, recomputed))
        # Within a band a later, dearer setting may be the first that is bad enough; nothing is gained by more.
        if error <= min(targets) and trials[-1].counts:
            break
    if not trials:
        raise UnavailableError(refused)
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
