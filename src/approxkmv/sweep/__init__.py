"""Timing and error of every attention method at equal error: settings in, a table and its record out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from approxkmv.sweep.settings import SweepSettings, WorkloadSettings

if TYPE_CHECKING:
    from approxkmv.sweep.run import run_sweep as run_sweep

__all__ = ["SweepSettings", "WorkloadSettings", "run_sweep"]


def __getattr__(name: str) -> Any:
    # A configuration is checked for the settings of sweeps without torch.
    if name != "run_sweep":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from approxkmv.sweep.run import run_sweep

    return run_sweep
