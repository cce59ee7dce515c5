"""Kernel density estimators with a common interface, `fit` and `query`."""

from approxkmv.kmv.density.base import KernelDensity
from approxkmv.kmv.density.hashing_based import HashingBasedDensity
from approxkmv.kmv.density.levels import DensityLevels
from approxkmv.kmv.density.plain import ExactDensity, UniformDensity

__all__ = ["DensityLevels", "ExactDensity", "HashingBasedDensity", "KernelDensity", "UniformDensity"]
