"""Split of samples into training and test data by a hash of the answer."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "test"]


def in_split(split: Split, answer: str) -> bool:
    """Return whether an answer belongs to a split: one bit of its SHA-256 decides.

    So no answer, and therefore no sample, of one split can be drawn in the other, whatever the seed and length.
    """
    return (hashlib.sha256(answer.encode()).digest()[0] & 1) == (split == "test")
