"""Common words: the ten most frequent words of a long list, after one worked example (RULER)."""

from __future__ import annotations

import random
from typing import Any

from data_gen.described_task import words
from data_gen.fit_length import LengthBudget
from data_gen.metrics import string_match_all
from data_gen.tasks.ruler import SOURCE, make_sample
from data_gen.tasks.task import Request, Task, register

PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10  # words asked for
# Counts of each common and each other word, then the example's number of words and their counts, below 4,096 tokens
# and from there on.
SHORT, LONG = ((6, 1), (20, 3, 1)), ((30, 3), (40, 10, 3))
STEP_2024 = 10  # words
MAX_NEW_TOKENS = 120  # RULER's tokens_to_generate


def word_list(chosen: list[str], common: int, other: int, rng: random.Random) -> list[str]:
    """Return shuffled entries: the first ten of ``chosen`` ``common`` times each, the rest ``other`` times."""
    entries = chosen[:COMMON] * common + chosen[COMMON:] * other
    rng.shuffle(entries)
    return entries


def numbered(entries: list[str]) -> str:
    """Return entries as ``1. first 2. second``."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))


def render_example(entries: list[str], common: list[str], version: int | None = None) -> tuple[str, str]:
    """Return the prompt of a worked example, and prefix and answer; in 2024 no space was between these two."""
    return PROMPT.format(context=numbered(entries)), f"{PREFIX}{'' if version == 2024 else ' '}{numbered(common)}"


def sample(request: Request, rng: random.Random, index: int, budget: LengthBudget) -> dict[str, Any]:
    """Draw a sample with as many different words as fit, in RULER's steps of that year.

    With a version of RULER the worked example is an earlier exchange, as where its program wraps example and task in a
    model's template one by one.

    Raises:
        ValueError: the length is too small for the example and ten words, or needs more words than wonderwords has.
    """
    (common, other), (example_words, example_common, example_other) = SHORT if budget.tokens < 4096 else LONG
    pool = sorted({word for category in ("noun", "adjective", "verb") for word in words(category)})
    chosen = rng.sample(pool, len(pool))
    while not budget.accept(numbered(chosen[:COMMON])):
        chosen = rng.sample(pool, len(pool))
    seed = rng.getrandbits(64)
    example_pool = rng.sample(pool, example_words)
    version = request.ruler_version
    shown = word_list(example_pool, example_common, example_other, rng)
    example = render_example(shown, example_pool[:COMMON], version)

    def of_size(count: int) -> dict[str, Any]:
        several = chosen * -(-count // len(chosen))  # a trial may need more than there are
        entries = word_list(several[:count], common, other, random.Random(seed))
        prompt, facts = PROMPT.format(context=numbered(entries)), dict[str, Any](words=count)
        if version is None:
            prompt = "".join(example) + "\n" + prompt
        else:
            facts["example"] = (example[0], example[1].strip())
        return make_sample(prompt, PREFIX, numbered(chosen[:COMMON]), chosen[:COMMON], MAX_NEW_TOKENS, **facts)

    step = STEP_2024 if version == 2024 else 1
    first = COMMON + step
    drawn = budget.fill(of_size, "cwe", first, step)
    if drawn["words"] > len(chosen):
        raise ValueError(f"tokens: {budget.tokens} needs more than wonderwords' {len(chosen)} words: ask for less")
    return drawn


register(Task(
    name="cwe", title="Common words", description="RULER's common words", source=SOURCE, sample=sample,
    shortest=3500, metric=string_match_all, max_new_tokens=MAX_NEW_TOKENS, group="ruler",
    options=("ruler_version",),
))  # fmt: skip
