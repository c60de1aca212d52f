"""How much of something fits."""

from collections.abc import Callable


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """An ``n >= 1`` that fits while ``n + 1`` does not, found near ``guess`` in O(log |n - guess|) trials.

    Args:
        fits: true at 1, false from some size on.
        guess: where to look first.
    """
    low, high, step = max(1, guess), max(1, guess) + 1, 1
    if low == 1 or fits(low):
        while fits(high):
            low, high, step = high, high + 2 * step, 2 * step
    else:
        low, high = low - 1, low
        while low > 1 and not fits(low):
            low, high, step = max(1, low - 2 * step), low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
