"""Confidence intervals of mean scores."""

from __future__ import annotations

import math


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a proportion, conservative for a mean of scores in [0, 1].

    Args:
        share: observed, in [0, 1].
        count: samples, at least 1.
        z: quantile of the normal distribution.

    Returns:
        Lower and upper bound, in [0, 1].
    """
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # At shares 0 and 1 a bound equals the share, and rounding must not move it past.
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))
