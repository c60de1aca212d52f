"""What RULER's tasks share (Hsieh et al. 2024, NVIDIA/RULER, ``scripts/data/synthetic/``; paper Table 2).

RULER's answer prefix begins the assistant's turn. A space at its end belongs to the answer instead, so that the tokens
of a prompt are a prefix of those of its training sample. As in RULER, a sample's length includes the response budget.

RULER's text and the steps in which it enlarges a sample changed in May 2025. ``Request.ruler_version`` chooses; without
it, the text is that of 2025, the worked example of common words is in the prompt itself, and samples are as long as
fits.
"""

from __future__ import annotations

import random
import string
from typing import Any

SOURCE = "RULER (Hsieh et al. 2024), NVIDIA/RULER"


def make_sample(
    prompt: str, prefix: str, answer: str, references: list[str], max_new_tokens: int, **facts: Any
) -> dict[str, Any]:
    """Return a sample whose answer begins with the prefix; chat templates put their own space before it."""
    return {
        "prompt": prompt,
        "prefix": prefix.strip(),
        "answer": f"{prefix.strip()} {answer}",
        "references": references,
        "budget": max_new_tokens,
        **facts,
    }


def draw_names(count: int, letters: int, rng: random.Random, alphabet: str = string.ascii_uppercase) -> list[str]:
    """Draw distinct names of so many letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(alphabet, k=letters))] = None
    return list(names)
