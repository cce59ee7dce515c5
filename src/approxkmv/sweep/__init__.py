"""Timing and error of every attention method at equal error: settings in, a table and its record out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from approxkmv.lazy import attributes
from approxkmv.sweep.settings import SweepSettings, WorkloadSettings

if TYPE_CHECKING:
    from approxkmv.sweep.run import run_sweep as run_sweep

__all__ = ["SweepSettings", "WorkloadSettings", "run_sweep"]
# On demand: a configuration is checked for the settings of sweeps without torch.
__getattr__ = attributes(__name__, {"run": ["run_sweep"]})
