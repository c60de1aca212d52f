"""Scores of responses, and how sure one can be of their mean."""

from __future__ import annotations

import math
import re


def last_integer(response: str) -> int | None:
    """The last run of digits in a response, as LongEval parses it (``longeval/utils.py``); None where there is none."""
    found = re.findall(r"\d+", response)
    return int(found[-1]) if found else None


def wilson(correct: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    Args:
        correct: how many of ``count`` were right.
        count: at least 1.
        z: normal quantile.

    Returns:
        Lower and upper bound, in [0, 1].
    """
    share = correct / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # The bounds meet the share itself at none and all right, where rounding must not put them on its wrong side.
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))
