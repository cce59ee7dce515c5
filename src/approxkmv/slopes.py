"""The exponent of a power law: a line through the logarithms."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def log_log_line(x: ArrayLike, y: ArrayLike) -> tuple[float, float, float | None]:
    """Slope and level of log y on log x by least squares, and the slope's standard error, None of two points.

    >>> slope, level, error = log_log_line([1000, 2000, 4000], [3e6, 12e6, 48e6])
    >>> round(slope, 9), round(float(np.exp(level)), 9), round(error, 9)
    (2.0, 3.0, 0.0)

    x and y are positive, at least two of x different.
    """
    log_x, log_y = np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64))
    if len(log_x) < 3:
        slope, level = np.polyfit(log_x, log_y, 1)
        return float(slope), float(level), None
    (slope, level), covariance = np.polyfit(log_x, log_y, 1, cov=True)
    return float(slope), float(level), float(np.sqrt(covariance[0, 0]))
