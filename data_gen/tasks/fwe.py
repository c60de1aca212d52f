"""Frequent words: the three most frequent of coded words, ranks 2 to 4; the first rank is a row of dots (RULER)."""

from __future__ import annotations

import math
import random
import string
from typing import Any

from data_gen.fit_length import LengthBudget
from data_gen.metrics import string_match_all
from data_gen.tasks.ruler import SOURCE, draw_names, make_sample
from data_gen.tasks.task import Request, Task, register

PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text?"
)
PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
ALPHA = 2.0  # exponent of the Zeta distribution
WORD_LETTERS = 6
MAX_NEW_TOKENS = 50  # RULER's tokens_to_generate


def frequencies(total: int, vocabulary: int) -> list[int]:
    """Return the count of each rank among ``total`` words: Zeta-distributed with ``ALPHA``, rounded down."""
    zeta = math.pi**2 / 6  # of ALPHA = 2
    return [int(total * rank**-ALPHA / zeta) for rank in range(1, vocabulary + 1)]


def sample(request: Request, rng: random.Random, index: int, budget: LengthBudget) -> dict[str, Any]:
    """Draw a sample of as many words as fit, with a version of RULER in its steps.

    Its program of 2024 did not subtract the answer from the length; here no sample exceeds the length.

    Raises:
        ValueError: the length is too small for ranks 1 to 5 to differ in frequency.
    """
    tokens = budget.tokens - (0 if request.ruler_version == 2024 else MAX_NEW_TOKENS)
    size = max(tokens // 50, 5)
    vocabulary = draw_names(size, WORD_LETTERS, rng, string.ascii_lowercase)
    while not budget.accept(" ".join(vocabulary[1:4])):
        vocabulary = draw_names(size, WORD_LETTERS, rng, string.ascii_lowercase)
    vocabulary[0] = "..."
    seed = rng.getrandbits(64)
    top = vocabulary[1:4]

    def of_size(total: int) -> dict[str, Any]:
        text = [word for word, n in zip(vocabulary, frequencies(total, size), strict=True) for _ in range(n)]
        random.Random(seed).shuffle(text)
        prompt = PROMPT.format(context=" ".join(text))
        return make_sample(prompt, PREFIX, " ".join(top), top, MAX_NEW_TOKENS, words=total)

    # The smallest total at which ranks 1 to 5 all differ in frequency.
    first = next(n for n in range(1, 10_000) if len(set(frequencies(n, 5))) == 5)
    step = 1
    if request.ruler_version:  # words, counted up from a sixth of the tokens
        step = max(1, tokens // 32)
        first += (tokens // WORD_LETTERS - first) % step
    return budget.fill(of_size, "fwe", first, step)


register(Task(
    name="fwe", title="Frequent words", description="RULER's frequent words", source=SOURCE, sample=sample,
    shortest=2500, metric=string_match_all, max_new_tokens=MAX_NEW_TOKENS, group="ruler",
    options=("ruler_version",),
))  # fmt: skip
