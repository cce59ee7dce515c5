"""Timing and error of every attention method at equal error: settings in, a table and its record out."""

from approxkmv.sweep.run import run_sweep
from approxkmv.sweep.settings import SweepSettings, WorkloadSettings

__all__ = ["SweepSettings", "WorkloadSettings", "run_sweep"]
