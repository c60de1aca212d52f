"""Find the largest sample that fits into a length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Interpolation finds the size of near-linear text in a few trials; after so many, bisection bounds their number.
INTERPOLATIONS = 12
# Extrapolate at most to so many times the largest size known to fit.
FARTHEST = 100


@dataclass(frozen=True)
class LengthBudget:
    """The length limit of a sample, with functions that measure against it.

    Attributes:
        tokens: longest chat, template and answer included.
        count: length in tokens of the chat of a prompt and an answer, and of prompt and answer of an earlier exchange.
        accept: whether an answer belongs to the split.
        encode: token ids of a text, without special tokens.
        decode: text of token ids.
    """

    tokens: int
    count: Callable[..., int]
    accept: Callable[[str], bool]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    def length(self, sample: dict[str, Any]) -> int:
        """Return the tokens of a sample with its answer, or with its response ``budget`` if that is longer (RULER)."""
        prompt, example = sample["prompt"], sample.get("example")
        full = self.count(prompt, sample["answer"], example)
        if "budget" not in sample:
            return full
        return max(full, self.count(prompt, sample["prefix"], example) + sample["budget"])

    def fill(
        self, of_size: Callable[[int], dict[str, Any]], what: str, first: int = 1, step: int = 1
    ) -> dict[str, Any]:
        """Return the largest sample that fits; for arguments and errors see ``largest``."""
        size = largest(lambda size: self.length(of_size(size)), self.tokens, first=first, step=step, what=what)
        return of_size(size)


def largest(length: Callable[[int], int], limit: int, *, first: int = 1, step: int = 1, what: str) -> int:
    """Return the largest ``n >= first`` whose length is within the limit, by interpolation, then bisection.

    Takes few trials if lengths grow almost linearly, as those of text; O(log n) otherwise.

    Args:
        length: tokens of a sample of size n; increases with n.
        limit: in tokens.
        first: smallest valid size.
        step: sizes are this far apart.
        what: names the sample in error messages.

    Raises:
        ValueError: not even ``first`` fits, or length does not increase.
    """
    if step > 1:
        return first + step * (largest(lambda index: length(first + step * (index - 1)), limit, what=what) - 1)
    low, low_length = first, (shortest := length(first))
    if shortest > limit:
        raise ValueError(f"tokens: {limit} is too short for {what}, whose shortest sample has {shortest} here")
    trial, high, trials = low + 16, None, 0
    while high is None or high - low > 1:
        trial_length = length(trial)
        constant = trial > 10 * limit + first and trial_length == shortest
        if constant or (trial > FARTHEST * limit + first and trial_length <= limit):
            raise ValueError(
                f"tokens: {what} of size {trial} still has {trial_length} tokens: the chat template drops the text"
            )
        slope = max((trial_length - low_length) / (trial - low), 1e-9)
        if trial_length <= limit:
            low, low_length = trial, trial_length
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
