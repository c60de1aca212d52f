"""How much of something fits into a length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Interpolation finds the size of near-linear text in a few trials; from here on halving bounds their number.
INTERPOLATIONS = 12
# A step goes at most to so many times the largest size that is known to fit.
FARTHEST = 100


@dataclass(frozen=True)
class LengthBudget:
    """The length that one sample has to keep.

    Attributes:
        tokens: longest chat, template and answer included.
        count: length in tokens of the chat that a prompt and an assistant's text make.
        accept: whether an answer belongs to the split that is drawn.
        encode: a text's token ids, without special tokens.
        decode: the text of token ids.
    """

    tokens: int
    count: Callable[[str, str], int]
    accept: Callable[[str], bool]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def largest(length: Callable[[int], int], limit: int, *, first: int = 1, what: str) -> int:
    """The largest ``n >= first`` whose length keeps the limit, ``n + 1`` exceeding it.

    Few trials where lengths grow about linearly, which text does; O(log n) in any case.

    Args:
        length: tokens of a sample of size n; grows with n.
        limit: in tokens.
        first: smallest size that makes sense.
        what: names the sample in the error.

    Raises:
        ValueError: not even ``first`` fits.
    """
    low, low_length = first, length(first)
    if low_length > limit:
        raise ValueError(f"tokens: {limit} is too short for {what}, whose shortest sample has {low_length} here")
    trial, high, trials = low + 16, None, 0
    while high is None or high - low > 1:
        found = length(trial)
        slope = max((found - low_length) / (trial - low), 1e-9)
        if found <= limit:
            low, low_length = trial, found
        else:
            high = trial
        trials += 1
        step = int((limit - low_length) / slope) if slope > 1e-9 else low
        trial = low + max(1, step)
        if high is not None:
            trial = min(trial, high - 1) if trials < INTERPOLATIONS else (low + high) // 2
        else:
            trial = min(max(trial, 2 * low) if trials >= INTERPOLATIONS else trial, FARTHEST * low)
    return low
